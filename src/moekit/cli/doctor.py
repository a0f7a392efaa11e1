"""moekit doctor"""

from __future__ import annotations

from typing import Any

import click

from moekit.cli.output import in_units, json_option, print_json


@click.command("doctor")
@json_option
def command(as_json: bool) -> None:
    """Look at this machine: what moekit will use, what is missing and how to get it.

    Ends with exit code 1 where something stops moekit from working.
    """
    from moekit.cli.diagnosis import diagnose

    facts = diagnose()
    if as_json:
        print_json(facts)
    else:
        _show(facts)
    if not facts["healthy"]:
        raise click.exceptions.Exit(1)


def _show(facts: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    table = Table(title=f"moekit {facts['moekit']}", title_justify="left", show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for subject, show in _ROWS.items():
        if facts[subject] is not None:
            table.add_row(subject, Text(show(facts[subject])))
    console.print(table)
    for remedy in facts["remedies"]:
        color = "red" if remedy["level"] == "problem" else "yellow"
        console.print(f"[{color}]{remedy['level']}:[/{color}]", remedy["finding"], highlight=False)
        console.print("   ->", remedy["remedy"], highlight=False, markup=False)
    if facts["healthy"]:
        console.print("[green]ready[/green]: moekit quickstart")


def _cpu(value: dict[str, Any]) -> str:
    cores = value["cores"]
    features = ", ".join(f"{name} {'yes' if has else 'no'}" for name, has in value["features"].items())
    usable = f"{cores['usable']} of {cores['logical']} cores usable (limit: {cores['limit']})"
    return f"{value['name']}, {usable}\n{features}"


def _kernels(value: dict[str, Any]) -> str:
    lines = []
    for place, rows in value.items():
        lines.append(place)
        for row in rows:
            state = "picked" if row["picked"] else "usable" if row["usable"] else "not usable"
            lines.append(f"  {row['name']}: {state} ({row['reason']})")
    return "\n".join(lines)


def _extras(value: dict[str, Any]) -> str:
    return "\n".join(f"{name}: {row['install'] or 'installed'}" for name, row in sorted(value.items()))


def _gib(number: int) -> str:
    return in_units(number, "B", base=1024)


_ROWS = {
    "python": lambda v: f"{v['version']}  {v['executable']}",
    "torch": lambda v: f"{v['version']}, {v['build']} build, {v['cpu_capability']}, {v['threads']} threads",
    "cpu": _cpu,
    "memory": lambda v: f"{_gib(v['total'])}, {_gib(v['available'])} free (limit: {v['limit']})",
    "gpu": lambda v: "\n".join(f"{g['device']}: {g['name']}, {_gib(g['memory_bytes'])}" for g in v) or "none",
    "precision": lambda v: "train.precision=auto is " + ", ".join(f"{p} on {kind}" for kind, p in v.items()),
    "kernels": _kernels,
    "extras": _extras,
    "clients": lambda v: ", ".join(f"{name} {version or 'not installed'}" for name, version in v.items()),
    "cache": lambda v: f"{v['folder']}, {_gib(v['used_bytes'])} used, {_gib(v['free_bytes'])} free",
}
