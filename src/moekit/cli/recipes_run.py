"""moekit recipes run, run-all"""

from __future__ import annotations

from typing import Any

import click

from moekit.cli.output import (
    folder_option,
    json_option,
    overrides_argument,
    print_json,
    print_result,
    progress_to_stderr,
)

seeds_option = click.option(
    "--seeds", type=click.IntRange(min=1), default=1, show_default=True, help="of the trained models"
)
out_option = folder_option("--out", "runs/recipes", help="folder for tables and runs")
short_option = click.option("--short", is_flag=True, help="few examples and steps, to see that all runs")


@click.command("run")
@click.argument("name")
@overrides_argument
@click.option("--variant", help="the same recipe on other data")
@seeds_option
@out_option
@short_option
@json_option
def run(name: str, variant: str | None, as_json: bool, **options: Any) -> None:
    """Train the sparse model and its dense twin, fit the baselines, and print the table.

    \b
        moekit recipes run news-topics --variant r8
    """
    with progress_to_stderr(as_json):
        from moekit.recipes.running import run_recipe

        result = run_recipe(name, variant=variant, **options, say=_say)
    _show(result, as_json)


@click.command("run-all")
@click.argument("names", nargs=-1)
@seeds_option
@out_option
@short_option
@json_option
def run_all(names: tuple[str, ...], as_json: bool, **options: Any) -> None:
    """Run every recipe with every variant, or those of NAMES, and print the table of all.

    What is finished in the folder is taken as it is, so that an interrupted run goes on. A recipe that fails is named
    below the table, and the command ends with an error.
    """
    with progress_to_stderr(as_json):
        from moekit.recipes.running import run_all as everything

        result = everything(names=names, **options, say=_say)
    _show(result, as_json)
    if result["failed"]:
        raise click.exceptions.Exit(1)


def _say(message: str) -> None:
    click.echo(message, err=True)


def _show(result: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print_json(result)
    else:
        print_result(result)
