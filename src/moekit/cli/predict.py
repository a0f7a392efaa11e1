"""moekit predict"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from moekit.cli.output import json_option, print_json, progress_to_stderr


@click.command("predict")
@click.argument("run", type=click.Path(path_type=Path))
@click.argument("input")
@click.option(
    "--columns", metavar="NAME=COLUMN", multiple=True, help="your name of a column; may be repeated"
)
@click.option("--experts", "n_experts", type=click.IntRange(min=0), default=2, show_default=True,
              help="name so many experts of each layer")  # fmt: skip
@click.option("--draw", metavar="FOLDER", type=click.Path(path_type=Path, file_okay=False),
              help="write a PNG of each answer that is a picture: boxes, a mask, a generated one")  # fmt: skip
@click.option("--record", metavar="FOLDER", type=click.Path(path_type=Path, file_okay=False),
              help="write what routers decided of every token")  # fmt: skip
@json_option
def command(
    run: Path, input: str, columns: tuple[str, ...], n_experts: int, draw: Path | None, record: Path | None,
    as_json: bool,
) -> None:  # fmt: skip
    """What a trained task says of an input, how sure it is, and which experts decided.

    RUN is the folder of a run. INPUT is a text, a file of examples (.csv, .tsv, .jsonl, .parquet), or
    one picture, sound or array (.png, .jpg, .wav, .npy).

    \b
        moekit predict runs/news-topics-1 "The shuttle lifted off at dawn."
        moekit predict runs/news-topics-1 mine.csv --columns text=body --json
    """
    with progress_to_stderr(as_json):
        from moekit.evaluate.answers import answers_to

        named = dict(pair.partition("=")[::2] for pair in columns)
        found = answers_to(run, input, named, n_experts=n_experts, draw=draw, record=record)
    if as_json:
        print_json(found)
        return
    for entry in found:
        _show(entry, many=len(found) > 1)


def _show(entry: dict[str, Any], many: bool) -> None:
    if many:
        click.echo(f"{entry['example']}: ", nl=False)
    parts = []
    for name, answer in entry["answers"].items():
        said = answer.get("text", answer["prediction"])
        if isinstance(said, list) and len(said) == len(entry.get("words", ())):
            said = " ".join(f"{word}/{tag}" for word, tag in zip(entry["words"], said, strict=True))
        elif isinstance(said, list):
            said = " ".join(f"{one:.4g}" if isinstance(one, float) else str(one) for one in said)
        elif isinstance(said, float):
            said = f"{said:.4g}"
        sure = f" ({answer['probability']:.1%})" if "probability" in answer else ""
        drawn = f" in {answer['drawn']}" if "drawn" in answer else ""
        parts.append(f"{name}: {said}{sure}{drawn}")
    experts = entry["experts"]
    if many:
        # the first one of each layer and task, so that an example stays on its line
        places = {(one["layer"], one.get("task")): one for one in reversed(experts)}
        said = ", ".join(
            _expert(places[place]) for place in sorted(places, key=lambda place: (place[0], place[1] or ""))
        )
        click.echo("; ".join(parts) + (f"  [{said}]" if said else ""))
        return
    click.echo("; ".join(parts))
    for answer in entry["answers"].values():
        for place, one in enumerate(answer.get("best", ())[1:], 2):
            click.echo(f"  {place}. {one['entity']} ({one['probability']:.1%})")
    if experts:
        click.echo(f"experts: {', '.join(map(_expert, experts))}")


def _expert(one: dict[str, Any]) -> str:
    """`layer 0 expert 3 (71%)`, with the task that mixes and the expert's name where there are such."""
    of = f" for {one['task']}" if "task" in one else ""
    return f"layer {one['layer']}{of} expert {one.get('name', one['expert'])} ({one['share']:.0%})"
