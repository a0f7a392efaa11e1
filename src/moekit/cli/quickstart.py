"""moekit quickstart"""

from __future__ import annotations

import sys
from pathlib import Path

import click

from moekit.cli.output import json_option, print_json, progress_to_stderr


@click.command("quickstart")
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), default=Path("runs/quickstart"),
              show_default=True, help="folder for report.html, report.json and the runs")  # fmt: skip
@click.option("--steps", type=click.IntRange(min=1), help="optimizer steps of each model")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="seed of weights and data order")
@click.option("--short", is_flag=True, help="the same on real text in about a minute: smaller models, fewer steps")
@click.option("--offline", is_flag=True, help="fetch nothing: the cache, or the text of this Python installation")
@click.option("--open/--no-open", "open_page", default=None, help="open report.html; by default, on a terminal")
@click.option("--quiet", is_flag=True, help="no live view; warnings and the answer only")
@json_option
def command(
    out: Path, steps: int | None, seed: int, short: bool, offline: bool, open_page: bool | None, quiet: bool, as_json: bool
) -> None:
    """Train a dense, a recurrent and a sparse model on real text and compare them.

    Fetches a small corpus (Python source, English prose, Chinese text), trains the dense twin, Transformer-XL and
    the MoE at equal active parameters and equal tokens, and writes report.html and report.json. Takes up to ten
    minutes on two cores.
    """
    with progress_to_stderr(as_json):
        from moekit.recipes.quickstart import run_quickstart

        report = run_quickstart(out=out, steps=steps, seed=seed, short=short, offline=offline, quiet=quiet)
    if as_json:
        print_json(report)
    else:
        click.echo(f"report: {out / 'report.html'}")
    if open_page or (open_page is None and not as_json and sys.stdout.isatty()):
        click.launch(str((out / "report.html").resolve()))
