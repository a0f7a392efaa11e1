"""moekit league"""

from __future__ import annotations

from pathlib import Path

import click

from moekit.cli.output import folder_option, json_option, print_json, print_result, progress_to_stderr


@click.command("league")
@folder_option("--out", "runs/league", help="folder for the table and the runs")
@click.option(
    "--steps", type=click.IntRange(min=1), default=300, show_default=True, help="steps of each router"
)
@click.option(
    "--seeds", type=click.IntRange(min=1), default=1, show_default=True, help="seeds for each router"
)
@click.option("--router", "routers", multiple=True, metavar="NAME", help="only this router; may be repeated")
@click.option("--short", is_flag=True, help="smaller models and fewer steps, to see that everything runs")
@json_option
def command(out: Path, steps: int, seeds: int, routers: tuple[str, ...], short: bool, as_json: bool) -> None:
    """Train every causal router for the same steps and rank them in one table.

    Columns: loss, max violation, entropy of the load, mean active experts and time.
    """
    with progress_to_stderr(as_json):
        from moekit.recipes.league import run_league

        answer = run_league(out=out, steps=steps, seeds=seeds, routers=list(routers) or None, short=short)
    if as_json:
        print_json(answer)
        return
    if answer.get("table"):
        print_result({"title": "Router league", "table": answer["table"]})
