"""Write docs/reference from the code: command line, configuration keys, sources of examples, recipes with results.

    python docs/generate_reference.py            # write
    python docs/generate_reference.py --check    # only compare; exit code 1 where a page is out of date

What stands in a page before the marker `<!-- generated -->` is written by hand and stays.
"""

from __future__ import annotations

import argparse
import inspect
import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import click

from moekit.cli.main import VERBS, cli
from moekit.config.explain import all_keys, describe_key
from moekit.data.task_sources.base import task_sources
from moekit.layers.routing import ROUTERS
from moekit.recipes.tables import catalogue, table_of_all

sys.path.insert(0, str(Path(__file__).resolve().parent))
from generate_tables import load, render

ROOT = Path(__file__).resolve().parents[1]
MARKER = "<!-- generated -->\n"


def command_line() -> str:
    """Markdown of every verb: usage, what it does, its options."""
    return "\n".join(line for name in VERBS for line in _command([name], _verb(name)))


def _verb(name: str) -> click.Command:
    command = cli.get_command(click.Context(cli), name)
    assert command is not None
    return command


def _command(words: list[str], command: click.Command) -> Iterator[str]:
    arguments = [parameter for parameter in command.params if isinstance(parameter, click.Argument)]
    options = [parameter for parameter in command.params if isinstance(parameter, click.Option)]
    usage = " ".join(["moekit", *words, *(_argument(argument) for argument in arguments)])
    if isinstance(command, click.Group):
        for name, inner in command.commands.items():
            yield from _command([*words, name], inner)
        return
    yield from ["", f"## moekit {' '.join(words)}", "", "```text", usage, "```", ""]
    text, *examples = inspect.cleandoc(command.help or "").split("\n\n\b\n")
    yield text
    for example in examples:
        body = [line[4:] if line.startswith("    ") else line for line in example.splitlines()]
        yield from ["", "```console", *(f"$ {line}" for line in body if line), "```"]
    if options:
        yield from ["", "| option | default | meaning |", "|---|---|---|"]
        yield from (_option(option) for option in options)


def _argument(argument: click.Argument) -> str:
    name = argument.metavar or (argument.name or "").upper()
    return name if argument.required or name.startswith("[") else f"[{name}]"


def _option(option: click.Option) -> str:
    names = "`, `".join([*option.opts, *option.secondary_opts])
    default = f"`{option.default}`" if option.show_default else ""
    return f"| `{names}` | {default} | {option.help} |"


def configuration() -> str:
    """Markdown of every key, a table for each group, and of the options of every router."""
    lines: list[str] = []
    groups = [""] + [key for key in all_keys() if describe_key(key)[0].children]
    for group in groups:
        if group == "model.moe.router":
            lines += _routers()
            continue
        title = f"`{group}`" if group else "the run"
        lines += ["", f"## {title}", ""]
        description = " ".join(
            dict.fromkeys(info.description for info in describe_key(group) if info.description)
        )
        lines += [description, ""] if description else []
        lines += ["| key | type | default | allowed | meaning |", "|---|---|---|---|---|"]
        for name in describe_key(group)[0].children:
            for info in describe_key(f"{group}.{name}" if group else name):
                lines.append(_key(name, info.kind, info.type, info.default, info.allowed, info.description))
    return "\n".join(lines)


def _key(name: str, kind: str, type: str, default: str | None, allowed: str, description: str) -> str:
    of_kind = f" ({kind})" if kind else ""
    shown = f"`{default}`" if default is not None else ""
    return f"| `{name}`{of_kind} | {type} | {shown} | {allowed} | {description} |".replace("| |", "|  |")


def _routers() -> list[str]:
    lines = ["", "## `model.moe.router`", "", "A name alone, `router: sigmoid`, or a name and its options,"]
    lines += ["`router: {name: softmax, normalize: before}`.", ""]
    lines += ["| router | option | type | default | allowed | meaning |", "|---|---|---|---|---|---|"]
    for name, router in sorted(ROUTERS.items()):
        summary = " ".join((router.__doc__ or "").strip().split("\n\n")[0].split())
        lines.append(f"| `{name}` | | | | | {summary} |")
        for option in router.Options.model_fields:
            (info,) = describe_key(option, router.Options)
            shown = f"`{info.default}`" if info.default is not None else ""
            lines.append(f"| | `{option}` | {info.type} | {shown} | {info.allowed} | {info.description} |")
    return lines


def sources_of_examples() -> str:
    """Markdown of every named source of examples: what it holds, its columns, its options and its licence."""
    sources = task_sources()
    lines = ["", "| source | examples | licence |", "|---|---|---|"]
    for name, source in sources.items():
        use = "**Research only.** " if source.research_only else ""
        lines.append(f"| [`{name}`](#{name}) | {source.description} | {use}{source.licence} |")
    for name, source in sources.items():
        summary, *rest = inspect.cleandoc(source.load.__doc__ or "").split("\n\n")
        meanings = _arguments("\n\n".join(rest))
        lines += ["", f"## {name}", "", summary, "", "| column | what it holds |", "|---|---|"]
        lines += [f"| `{column}` | {meaning} |" for column, meaning in source.columns.items()]
        if source.options:
            lines += ["", "| option | default | meaning |", "|---|---|---|"]
            lines += [
                f"| `{option}` | `{default}` | {meanings.get(option, '')} |"
                for option, default in source.options.items()
            ]
    return "\n".join(lines)


def recipes() -> str:
    """Markdown of every recipe: what it is, how it is run, and the results in docs/results/recipes, if it has any."""
    folder = ROOT / "docs" / "results" / "recipes"
    lines = []
    results = [json.loads(path.read_text("utf-8")) for path in sorted(folder.glob("*.json"))]
    if results:
        # of the latest result, so that the page does not change with the clock
        everything = {**table_of_all(folder), "created": max(result["created"] for result in results)}
        lines += ["", render(everything).strip()]
    lines += ["", "| recipe | what it answers | minutes |", "|---|---|---:|"]
    entries = catalogue()
    lines += [f"| [`{e['recipe']}`](#{e['recipe']}) | {e['about']} | {e['minutes']} |" for e in entries]
    for entry in entries:
        name = entry["recipe"]
        lines += [
            "",
            f"## {name}",
            "",
            f"{entry['about']} Data: {entry['data']} ({entry['licence']}).",
        ]
        many = len(entry["variants"]) > 1
        if many:
            lines += ["", f"Variants: {', '.join(f'`{variant}`' for variant in entry['variants'])}."]
        for variant in entry["variants"]:
            path = folder / f"{name}-{variant}.json" if many else folder / f"{name}.json"
            if path.is_file():
                result = load(path, "recipes.md")
                lines += ["", render(result).strip()]
                if result.get("observed"):
                    lines += ["", result["observed"]]
    return "\n".join(lines)


def _arguments(text: str) -> dict[str, str]:
    """The meaning of each argument in the part `Args:` of a docstring."""
    _, _, args = text.partition("Args:\n")
    found: dict[str, str] = {}
    name = ""
    for line in args.split("\n\n")[0].splitlines():
        match = re.match(r"    (\w+): (.*)", line)
        if match:
            name, found[match[1]] = match[1], match[2]
        elif name:
            found[name] += f" {line.strip()}"
    return found


PAGES: dict[str, Callable[[], str]] = {
    "cli.md": command_line,
    "configuration.md": configuration,
    "recipes.md": recipes,
    "task-sources.md": sources_of_examples,
}


def main(arguments: list[str] | None = None) -> int:
    """Write or check the pages; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--check", action="store_true", help="change nothing; fail where a page is out of date"
    )
    options = parser.parse_args(arguments)
    stale = []
    for name, generate in PAGES.items():
        page = ROOT / "docs" / "reference" / name
        old = page.read_text(encoding="utf-8")
        by_hand, marker, _ = old.partition(MARKER)
        if not marker:
            print(f"error: {page} has no line {MARKER.strip()}", file=sys.stderr)
            return 1
        new = f"{by_hand}{MARKER}{generate()}\n"
        if new != old:
            stale.append(name)
            if not options.check:
                page.write_text(new, encoding="utf-8")
    for name in stale:
        how = "out of date; run python docs/generate_reference.py" if options.check else "written"
        print(f"docs/reference/{name}: {how}")
    return 1 if stale and options.check else 0


if __name__ == "__main__":
    sys.exit(main())
