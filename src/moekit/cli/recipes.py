"""moekit recipes list, show, table; run and run-all are in `recipes_run`"""

from __future__ import annotations

from pathlib import Path

import click

from moekit.cli.output import json_option, print_json, print_result, progress_to_stderr
from moekit.cli.recipes_run import run, run_all


@click.group("recipes", no_args_is_help=True)
def command() -> None:
    """Tasks on real data, each by one command, against honest baselines."""


command.add_command(run)
command.add_command(run_all)


@command.command("list")
@json_option
def list_(as_json: bool) -> None:
    """All recipes: what they do, their data and licence, and how long they take."""
    with progress_to_stderr(as_json):
        from moekit.recipes.tables import catalogue, catalogue_text

        found = catalogue()
    if as_json:
        print_json(found)
    else:
        click.echo(catalogue_text(found))


@command.command("show")
@click.argument("name")
@click.option("--variant", help="the same recipe on other data")
def show(name: str, variant: str | None) -> None:
    """The whole configuration of a recipe, as YAML to start from."""
    from moekit.recipes.tasks import recipe_yaml

    click.echo(recipe_yaml(name, variant), nl=False)


@command.command("table")
@click.argument("folder", type=click.Path(path_type=Path, exists=True, file_okay=False))
@json_option
def table(folder: Path, as_json: bool) -> None:
    """The table of all results in FOLDER."""
    with progress_to_stderr(as_json):
        from moekit.recipes.tables import table_of_all

        result = table_of_all(folder)
    if as_json:
        print_json(result)
    else:
        print_result(result)
