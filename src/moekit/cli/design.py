"""moekit design"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from moekit.cli.output import json_option, overrides_argument, print_json, print_result, progress_to_stderr

F = Any


def search_options(function: F) -> F:
    """What `moekit design` and `moekit tune` share."""
    folder = click.Path(path_type=Path, file_okay=False)
    for option in reversed([
        click.option("--out", type=folder, help="folder of the search; runs/VERB/TASK by default"),
        click.option("--trials", type=click.IntRange(min=1), help="at most; 40 where the budget names no time"),
        click.option("--effort", type=click.FloatRange(0, 1, min_open=True), help="share of a whole run in each trial"),
        click.option("--by", metavar="FIGURE", help="what to improve: a metric of the task, or loss"),
        click.option("--workers", type=click.IntRange(min=1), default=1, show_default=True, help="processes at once"),
        click.option("--seeds", type=click.IntRange(min=1), default=3, show_default=True, help="of the finals"),
        click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="of the search"),
        click.option("--short", is_flag=True, help="the small version of a recipe, to see that all runs"),
        click.option("--report", type=folder, metavar="FOLDER", help="only write and show the report of a search"),
        json_option,
    ]):  # fmt: skip
        function = option(function)
    return function


@click.command("design")
@click.argument("task", required=False)
@overrides_argument
@click.option(
    "--budget", default="active=default", show_default=True, help="active=, total=, latency=, time="
)
@search_options
def command(task: str | None, **options: Any) -> None:
    """Search for the experts, routers and sizes that serve a task best within a budget.

    TASK is a recipe (digits, digits:small), quickstart, or a YAML file of a task or of a language model. Trials are
    short runs; those that fall behind are given up. The best few are repeated with other seeds, and the chosen one
    is trained against the default from scratch. The folder holds the report, its page, and best.yaml for `moekit
    train`.

    \b
        moekit design digits:small --budget active=default,time=20m
        moekit design tumours --budget active=20k,total=4x,latency=5ms,time=10m --workers 2
        moekit design spam data.path=mine.csv --budget time=30m
        moekit design --report runs/design/digits-small

    The same command goes on where it was interrupted; started twice, both work on one search.
    """
    searched("design", task, effort=options.pop("effort") or 0.5, **options)


def searched(
    kind: Any, task: str | None, *, overrides: tuple[str, ...], budget: str, out: Path | None, trials: int | None,
    effort: float, by: str | None, workers: int, seeds: int, seed: int, short: bool, report: Path | None, as_json: bool,
) -> None:  # fmt: skip
    """Run a search, or show one, and print it."""
    if (task is None) == (report is None):
        raise click.UsageError("name a TASK to search, or --report FOLDER to show a search")
    with progress_to_stderr(as_json):
        from moekit.design.report import report_table, write_report
        from moekit.design.search import Plan, search

        if report is not None:
            found = write_report(report)
        else:
            from moekit.recipes.designing import subject_of

            assert task is not None
            subject = subject_of(task, overrides, by=by, short=short)
            folder = out or Path("runs") / kind / subject.title.replace(":", "-")
            plan = Plan(kind, budget, effort, trials, seed, seeds=seeds)
            found = search(
                subject, plan, folder, workers=workers, say=lambda text: click.echo(text, err=True)
            )
    if as_json:
        print_json(found)
        return
    print_result(report_table(found))
    for name in ("report.html", "best.yaml"):
        click.echo(f"{Path(found['folder']) / name}")
