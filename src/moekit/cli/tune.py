"""moekit tune"""

from __future__ import annotations

from typing import Any

import click

from moekit.cli.design import search_options, searched
from moekit.cli.output import overrides_argument


@click.command("tune")
@click.argument("task", required=False)
@overrides_argument
@click.option("--budget", default="examples=default", show_default=True, help="examples=, time=")
@search_options
def command(task: str | None, **options: Any) -> None:
    """Search for the learning rate, batch size, dropout and other settings that serve a task best.

    As `moekit design`, but the model stays: learning rate, batch size, dropout, weight decay, balancing, warm-up and
    length. A run never sees more examples than budget.examples, which is the recipe's own number by default.

    \b
        moekit tune digits:small --budget time=20m
        moekit tune best.yaml --budget examples=2x,time=30m --workers 2
    """
    searched("tune", task, effort=options.pop("effort") or 1.0, **options)
