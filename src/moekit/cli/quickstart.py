"""moekit quickstart"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import click

from moekit.cli.output import folder_option, json_option, print_json, progress_to_stderr


@click.command("quickstart")
@folder_option("--out", "runs/quickstart", help="folder for report.html, report.json and the runs")
@click.option("--steps", type=click.IntRange(min=1), help="optimizer steps of each model")
@click.option(
    "--seed", type=click.IntRange(min=0), default=0, show_default=True, help="seed of weights and data order"
)
@click.option(
    "--short", is_flag=True, help="the same on real text in about a minute: smaller models, fewer steps"
)
@click.option(
    "--offline", is_flag=True, help="fetch nothing: the cache, or the text of this Python installation"
)
@click.option(
    "--open/--no-open", "open_page", default=None, help="open report.html; by default, on a terminal"
)
@click.option("--quiet", is_flag=True, help="no live view; warnings and the answer only")
@json_option
def command(
    out: Path,
    steps: int | None,
    seed: int,
    short: bool,
    offline: bool,
    open_page: bool | None,
    quiet: bool,
    as_json: bool,
) -> None:
    """Train a dense, a recurrent and a sparse model on real text and compare them.

    Fetches a small corpus (Python source, English prose, Chinese text), trains the dense twin, Transformer-XL
    and the MoE at equal active parameters and equal tokens, and writes report.html and report.json. Takes up
    to ten minutes on two cores.
    """
    with progress_to_stderr(as_json):
        from moekit.recipes.quickstart import run_quickstart

        report = run_quickstart(out=out, steps=steps, seed=seed, short=short, offline=offline, quiet=quiet)
    if as_json:
        print_json(report)
    else:
        click.echo(f"report: {out / 'report.html'}")
    if open_page or (open_page is None and not as_json and _has_desktop()):
        click.launch(str((out / "report.html").resolve()))


def _has_desktop() -> bool:
    """Whether a page opens in a window: on a plain terminal, a text browser would take it over."""
    windows = (
        sys.platform in ("darwin", "win32") or os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")
    )
    return sys.stdout.isatty() and bool(windows)
