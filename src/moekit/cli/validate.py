"""moekit validate"""

from __future__ import annotations

import click

from moekit.cli.output import json_option, overrides_argument, print_json, print_tables, progress_to_stderr


@click.command("validate")
@click.argument("config")
@overrides_argument
@json_option
def command(config: str, overrides: tuple[str, ...], as_json: bool) -> None:
    """Read and encode all examples of a task; what is wrong in a file is said with line and column.

    Nothing is trained.

    CONFIG is a YAML file or recipe:NAME.

    \b
        moekit validate recipe:news-topics data.path=mine.csv data.columns.text=body data.columns.label=topic
    """
    with progress_to_stderr(as_json):
        from moekit.recipes.tasks import validate_task

        found = validate_task(config, overrides)
    if as_json:
        print_json(found)
    else:
        print_tables(found, "All examples can be read")
