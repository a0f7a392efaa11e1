"""moekit data list, moekit data describe"""

from __future__ import annotations

from typing import Any

import click

from moekit.cli.output import in_units, json_option, overrides_argument, print_json, progress_to_stderr


@click.group("data", no_args_is_help=True)
def command() -> None:
    """List the named corpora, or describe one."""


@command.command("list")
@json_option
def list_corpora(as_json: bool) -> None:
    """The corpora that `data.corpus` can name."""
    from moekit.data.corpora import CORPORA

    if as_json:
        print_json({name: corpus.description for name, corpus in CORPORA.items()})
        return
    width = max(map(len, CORPORA))
    for name, corpus in CORPORA.items():
        click.echo(f"{name:<{width}}  {corpus.description}")


@command.command("describe")
@click.argument("source", default="quickstart")
@overrides_argument
@json_option
def describe(source: str, overrides: tuple[str, ...], as_json: bool) -> None:
    """Documents and bytes of each domain and split, and where the text comes from.

    SOURCE is a named corpus, a YAML configuration, or your own text: a .txt, .jsonl or .parquet file, or a
    folder.

    \b
        moekit data describe quickstart
        moekit data describe novels/ data.validation_share=0.1
    """
    from moekit.cli.describe import described

    with progress_to_stderr(as_json):
        facts = described(source, overrides, lambda line: click.echo(line, err=True))
    if as_json:
        print_json(facts)
    else:
        _show(facts)


def _show(facts: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    table = Table(title="Documents and text", title_justify="left")
    table.add_column("domain")
    splits = list(next(iter(facts["domains"].values())))
    for split in splits:
        table.add_column(split.replace("_", " "), justify="right")
    for domain, sizes in facts["domains"].items():
        table.add_row(domain, *(_size(sizes[split]) for split in splits))
    console.print(table)
    for source in facts["sources"]:
        console.print(Text(source["name"], style="bold"))
        for field in ("origin", "licence", "sha256", "note"):
            if source[field]:
                console.print(Text(f"  {field}: {source[field]}"))


def _size(size: dict[str, int]) -> str:
    if not size["documents"]:
        return "-"
    return f"{size['documents']:,} documents, {in_units(size['bytes'], 'B')}"
