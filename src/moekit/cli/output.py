"""What every verb shares: options, JSON on standard output, and tables for people."""

from __future__ import annotations

import contextlib
import json
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import click
from click.core import ParameterSource

F = TypeVar("F", bound=Callable[..., Any])


def json_option(function: F) -> F:
    """Adds --json, passed as `as_json`."""
    text = "print the answer as JSON on standard output, and nothing else there"
    return click.option("--json", "as_json", is_flag=True, help=text)(function)


def folder_option(name: str, default: str, help: str) -> Callable[[F], F]:
    """An option that takes the path of a folder, which need not exist."""
    kind = click.Path(path_type=Path, file_okay=False)
    return click.option(name, type=kind, default=Path(default), show_default=True, help=help)


def overrides_argument(function: F) -> F:
    """Adds [KEY=VALUE]..., passed as `overrides`."""
    return click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")(function)


def dtype_option(default: str, what: str = "of the stored weights") -> Callable[[F], F]:
    """Adds --dtype, passed as `dtype`: the name of a type of torch."""
    kinds = click.Choice(["float32", "bfloat16"])
    return click.option("--dtype", type=kinds, default=default, show_default=True, help=f"type {what}")


def data_option(function: F) -> F:
    """Adds --data, passed as `data`: keys of the data configuration."""
    text = "a key of the data configuration, such as data.corpus=quickstart; may be given again"
    return click.option("--data", multiple=True, metavar="KEY=VALUE", help=text)(function)


def typed(context: click.Context) -> str:
    """The command line of a verb as it was typed, but for options that only change what is printed."""
    words, options = ["moekit", context.info_name or ""], []
    for parameter in context.command.params:
        name = parameter.name or ""
        value = context.params.get(name)
        if isinstance(parameter, click.Argument):
            words += map(str, value) if isinstance(value, tuple) else [str(value)]
        elif name != "as_json" and context.get_parameter_source(name) is ParameterSource.COMMANDLINE:
            options += [parameter.opts[0]] if isinstance(value, bool) else [parameter.opts[0], str(value)]
    return shlex.join([*words, *options])


@contextlib.contextmanager
def progress_to_stderr(active: bool) -> Iterator[None]:
    """While `active`, prints go to standard error, so that standard output holds only the answer."""
    with contextlib.redirect_stdout(sys.stderr) if active else contextlib.nullcontext():
        yield


def print_json(answer: Any) -> None:
    """One JSON document; NaN and infinity become null, which JSON can hold."""
    from moekit.config.atomic import json_ready

    click.echo(json.dumps(json_ready(answer), indent=2, ensure_ascii=False, allow_nan=False))


def print_tables(answer: Mapping[str, Any], title: str) -> None:
    """A nested answer as tables: single values first, then one table for each group."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    singles = {key: value for key, value in answer.items() if not isinstance(value, Mapping)}
    if singles:
        console.print(title, style="bold", highlight=False, markup=False)
        table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
        for key, value in singles.items():
            # as plain text: rich takes [llama-cpp] for markup and drops it
            table.add_row(Text(key.replace("_", " ")), Text(cell(value)))
        console.print(table)
    for key, value in answer.items():
        if isinstance(value, Mapping):
            name = f"{title}: {key}" if not singles else key
            print_tables(value, name.replace("_", " "))


def print_result(result: Mapping[str, Any]) -> None:
    """A table of results: its title, columns and rows, and below what is said of it.

    Where the terminal is too narrow for it, columns and rows change places; where that is too wide as well, each row is
    a paragraph. No figure is cut off.
    """
    from rich.console import Console
    from rich.measure import Measurement
    from rich.table import Table

    # ** marks what stands out on a page of Markdown
    lines = [[cell(value).replace("**", "") for value in row] for row in result["table"]["rows"]]
    console, names = Console(), result["table"]["columns"]
    turned = [[name, *(row[place] for row in lines)] for place, name in enumerate(names) if place]
    for columns, rows in ((names, lines), ([names[0], *(row[0] for row in lines)], turned)):
        table = Table(title=result["title"], title_justify="left")
        for position, column in enumerate(columns):
            table.add_column(column, justify="left" if position == 0 else "right")
        for row in rows:
            table.add_row(*row)
        if Measurement.get(console, console.options.update(max_width=10_000), table).maximum <= console.width:
            console.print(table)
            break
    else:
        console.print(result["title"], style="bold", highlight=False, markup=False)
        for first, *rest in lines:
            console.print(first, style="bold", highlight=False, markup=False)
            for name, value in zip(names[1:], rest, strict=True):
                console.print(f"  {name}: {value}", highlight=False, markup=False)
    for words in (result.get("note"), result.get("observed")):
        if words:
            console.print(words, highlight=False, markup=False)


def print_certificate(certificate: Mapping[str, Any], title: str, as_json: bool) -> None:
    """What a conversion proved."""
    if as_json:
        print_json(certificate)
    else:
        print_tables(certificate, title)


def cell(value: Any) -> str:
    """One value of a table, as people read it."""
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "-"}[value]
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    if isinstance(value, list | tuple):
        return ", ".join(cell(item) for item in value)
    return str(value)


def in_units(number: float, unit: str = "", base: int = 1000) -> str:
    """A large number with its prefix.

    >>> in_units(4_500_000), in_units(3 * 2**30, "B", base=1024), in_units(12, "FLOP")
    ('4.50 M', '3.00 GiB', '12 FLOP')
    """
    prefixes = ["", "k", "M", "G", "T", "P", "E"]
    if base == 1024:
        prefixes = ["", "Ki", "Mi", "Gi", "Ti", "Pi", "Ei"]
    power = 0
    while abs(number) >= base and power < len(prefixes) - 1:
        number, power = number / base, power + 1
    return f"{number:.2f} {prefixes[power]}{unit}".strip() if power else f"{number:.0f} {unit}".strip()


def duration(seconds: float) -> str:
    """Seconds as people say them.

    >>> duration(42.4), duration(185), duration(7300), duration(200_000)
    ('42 s', '3 min 5 s', '2 h 1 min', '2 d 7 h')
    """
    if seconds < 10:
        return f"{seconds:.1f} s"
    total = round(seconds)
    for big, small, size, step in (("d", "h", 86400, 3600), ("h", "min", 3600, 60), ("min", "s", 60, 1)):
        if total >= size:
            return f"{total // size} {big} {total % size // step} {small}"
    return f"{total} s"
