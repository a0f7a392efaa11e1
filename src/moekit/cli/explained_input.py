"""What `moekit explain` does with one input: its options, and its report for people."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import click

from moekit.config.errors import ConfigError

F = TypeVar("F", bound=Callable[..., Any])
PAGE = "explain-text.html"
# experts in the list below the tokens, and of a token where not all fit
EXPERTS, STRONGEST = 10, 3


def input_options(function: F) -> F:
    """Adds the options that `explained` reads."""
    for option in reversed((
        click.option("--text", help="explain what the model says of this text, or of standard input: -"),
        click.option("--file", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE",
                     help="explain the text of a file"),
        click.option("--input", metavar="FILE", help="explain a task's answers to examples, as for moekit predict"),
        click.option("--columns", metavar="NAME=COLUMN", multiple=True, help="your name of a column of --input"),
        click.option("--effects", type=click.Choice(["both", "token", "text", "none"]), default="both",
                     show_default=True, help="switch each expert off for one token by itself, for all of them"),
        click.option("--instead", type=click.Choice(["nothing", "next", "share"]), default="nothing",
                     show_default=True, help="in its place: nothing, the next best expert, more of the others"),
        click.option("--swap", metavar="LAYER:EXPERT:EXPERT", multiple=True, help="let two experts exchange their "
                     "tokens; may be given again"),
        click.option("--limit", type=click.IntRange(min=1), default=500_000, show_default=True,
                     help="tokens that may be read to switch experts off"),
    )):  # fmt: skip
        function = option(function)
    return function


def is_one_input(given: Mapping[str, Any]) -> bool:
    """Whether one input is to be explained, and not a whole run. Errors: `ConfigError` for several of them."""
    named = [name for name in ("text", "file", "input") if given[name] is not None]
    if len(named) > 1:
        raise ConfigError(
            f"--{' and --'.join(named)} exclude each other: each names the input. Give one of them"
        )
    if not named and given["swap"]:
        raise ConfigError("--swap needs an input to be explained. Give --text, --file or --input")
    return bool(named)


def explained(run: Path, given: Mapping[str, Any], out: Path | None) -> tuple[Path, dict[str, Any]]:
    """The report of one input, and its page, which is written with the report as JSON beside it."""
    import json

    from moekit.cli.evaluated_task import is_task
    from moekit.config.atomic import write_text
    from moekit.explain.page import render_prediction_page

    how = {
        "instead": given["instead"],
        "scope": given["effects"],
        "limit": given["limit"],
        "source": str(run),
    }
    report = _of_task(run, given, how) if is_task(run) else _of_text(run, given, how)
    page = out or (run / PAGE if (run / "config.yaml").is_file() else Path(PAGE))
    write_text(page, render_prediction_page(report))
    write_text(page.with_suffix(".json"), json.dumps(report, ensure_ascii=False, allow_nan=False) + "\n")
    return page, report


def _text(given: Mapping[str, Any]) -> str:
    if given["file"] is not None:
        return str(given["file"].read_text("utf-8"))
    return sys.stdin.read() if given["text"] == "-" else str(given["text"])


def _of_task(run: Path, given: Mapping[str, Any], how: dict[str, Any]) -> dict[str, Any]:
    from moekit.evaluate.answers import examples_given
    from moekit.explain.task_predictions import explain_examples
    from moekit.train.run import load_task_run

    if given["swap"]:
        raise ConfigError("--swap is for language models; this is the run of a task. Leave it out")
    task = load_task_run(run)
    said = given["input"] if given["input"] is not None else _text(given)
    columns = dict(pair.partition("=")[::2] for pair in given["columns"])
    return explain_examples(task, examples_given(task, said, columns), **how)


def _of_text(run: Path, given: Mapping[str, Any], how: dict[str, Any]) -> dict[str, Any]:
    from moekit.convert.formats.opening import open_model
    from moekit.explain.predictions import explain_text, parse_swap

    if given["input"] is not None or given["columns"]:
        raise ConfigError(
            "--input and --columns are for runs of tasks; give a language model --text or --file"
        )
    swaps = [parse_swap(swap) for swap in given["swap"]]
    opened = open_model(run)
    if opened.tokenizer is None:
        raise ConfigError(f"{run} has no tokenizer that moekit reads")
    return explain_text(opened.decoder, opened.tokenizer, _text(given), swaps=swaps, title=opened.name, **how)


def print_report(report: Mapping[str, Any]) -> None:
    """The report in a terminal: each token with its experts, the strongest experts, swaps."""
    from rich.console import Console

    console = Console()
    for number, text in enumerate(report["texts"]):
        if len(report["texts"]) > 1:
            console.print(
                f"{text['group']}: {_answers(text['answers'])}", style="bold", markup=False, highlight=False
            )
        console.print(_legend(report, shown_measure(report)), markup=False, highlight=False)
        console.print(_tokens(report, number, console.width))
    if report["measures"]:
        name = _measure(report, shown_measure(report))["title"]
        console.print(f"Strongest experts, by the mean effect {name}", markup=False, highlight=False)
        console.print(_experts(report))
    for swap in report["swaps"]:
        mean = "-" if swap["mean"] is None else f"{swap['mean']:+.4f}"
        both = f"experts {swap['one']} and {swap['other']} exchanged"
        said = f"layer {swap['layer']}, {both}: {swap['moved']} tokens moved, {mean} nats a token"
        console.print(said, highlight=False)
    for line in (report["verdict"], *report["details"], *report["notes"]):
        console.print(line, markup=False, highlight=False)


def _tokens(report: Mapping[str, Any], number: int, width: int) -> Any:
    """A row for each token: what follows, its experts as "number weight effect" by layer, or the strongest alone."""
    from rich.table import Table
    from rich.text import Text

    from moekit.explain.predictions import visible

    text, is_text = report["texts"][number], report["kind"] == "text"
    key = shown_measure(report)
    cells = [[_cell(report, layer, one, token, key) for layer, one in enumerate(text["layers"])]
             for token in range(len(text["tokens"]))]  # fmt: skip
    widths = [
        max((len(line) for row in cells for line, _ in row[layer]), default=0)
        for layer in range(len(text["layers"]))
    ]
    wide = sum(widths) + 3 * len(widths) + (46 if is_text else 24) <= width
    table = Table()
    table.add_column("token")
    if is_text:
        table.add_column("next")
        table.add_column("p", justify="right")
    for layer in range(len(widths)) if wide else ():
        table.add_column(f"layer {layer}")
    if not wide:
        table.add_column("strongest experts, layer:expert")
    for token, piece in enumerate(text["tokens"]):
        row = [Text(visible(piece), overflow="fold")]
        if is_text:
            answer = text["answers"][token]
            row.append(Text(visible(answer["next"] or f"(expects {visible(answer['top'])})")))
            row.append(Text(f"{answer['probability'] if answer['next'] else answer['top_probability']:.1%}"))
        if wide:
            row += [Text("\n".join(line for line, _ in one)) for one in cells[token]]
        else:
            every = [
                (abs(effect), f"{layer}:{line}")
                for layer, one in enumerate(cells[token])
                for line, effect in one
            ]
            row.append(
                Text(", ".join(line for _, line in sorted(every, key=lambda one: -one[0])[:STRONGEST]))
            )
        table.add_row(*row)
    return table


def _cell(
    report: Mapping[str, Any], number: int, layer: Mapping[str, Any], token: int, key: str
) -> list[tuple[str, float]]:
    labels, effects = report["layers"][number]["labels"], layer["effects"].get(key)
    found = []
    for rank, expert in enumerate(layer["experts"][token]):
        effect = None if effects is None else effects[token][rank]
        said = "" if effect is None else f" {effect:+.3f}" if effect else " 0"
        found.append((f"{labels[expert]} {layer['weights'][token][rank]:.2f}{said}", effect or 0.0))
    return found


def _experts(report: Mapping[str, Any]) -> Any:
    from rich.table import Table

    key = shown_measure(report)
    table = Table()
    keys = [one["key"] for one in report["measures"]]
    several = len(report["texts"]) > 1
    for name in (
        *(["example"] if several else []),
        "layer",
        "expert",
        "tokens",
        "weight",
        *map(_short, keys),
    ):
        table.add_column(name, justify="right")
    order = sorted(report["experts"], key=lambda one: -abs(one["effects"].get(key) or 0))
    for one in order[:EXPERTS]:
        said = [one["effects"].get(each) for each in keys]
        table.add_row(*([str(one["text"] + 1)] if several else []), str(one["layer"]), one["label"], str(one["tokens"]),
                      f"{one['weight']:.2f}", *("-" if v is None else f"{v:+.4f}" for v in said))  # fmt: skip
    return table


def shown_measure(report: Mapping[str, Any]) -> str:
    """The measure that tables show: of a text the next token, of a task what has room to change; "" where none is."""
    keys = [one["key"] for one in report["measures"] if one["unit"] != "probability"]
    return str(keys[0]) if keys else ""


def _measure(report: Mapping[str, Any], key: str) -> Mapping[str, str]:
    found: Mapping[str, str] = next(one for one in report["measures"] if one["key"] == key)
    return found


def _short(key: str) -> str:
    return {"token": "token: next", "top": "token: expected", "later": "token: later", "text": "text: next",
            "text_top": "text: expected"}.get(key, key.replace(":", " "))  # fmt: skip


def _legend(report: Mapping[str, Any], key: str) -> str:
    if not key:
        return "Experts with their weights"
    measure = _measure(report, key)
    return f"Experts with weight and effect ({measure['unit']}): {measure['words']}"


def _answers(answers: Mapping[str, Any]) -> str:
    return "; ".join(
        f"{name}: {answer.get('text', answer['prediction'])}"
        + (f" ({answer['probability']:.1%})" if "probability" in answer else "")
        for name, answer in answers.items()
    )
