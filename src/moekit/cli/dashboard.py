"""moekit dashboard"""

from __future__ import annotations

from pathlib import Path

import click

from moekit.cli.output import json_option


@click.command("dashboard")
@click.argument("runs", nargs=-1, metavar="[RUNS]...", type=click.Path(path_type=Path))
@click.option("--port", type=click.IntRange(0, 65535), default=None,
              help="to listen on; 0 for a free one; 8765 by default, or a free one where that is taken")  # fmt: skip
@click.option("--open/--no-open", "open_page", default=None,
              help="show the page in the browser; by default where a terminal is attached")  # fmt: skip
@json_option
def command(runs: tuple[Path, ...], port: int | None, open_page: bool | None, as_json: bool) -> None:
    """Watch runs while they train and compare them, on a live page of this machine alone.

    RUNS are folders of runs, or folders that hold some; ./runs by default. Runs that begin later appear by themselves.
    Nothing is written and no run is touched. With --json the address stands alone on the first line. Ctrl-C ends it.

    \b
        moekit dashboard
        moekit dashboard runs/moe-small-1 runs/dense-1 --port 9000 --no-open
    """
    import sys

    from moekit.serve.dashboard.server import serve

    folders = runs or (Path("runs"),)

    def announce(address: str) -> None:
        if as_json:
            click.echo(address)
            return
        for folder in folders:
            if not folder.is_dir():
                click.echo(f"{folder} is not there yet: its runs will be shown when they begin")
        click.echo(f"dashboard: {address}  (Ctrl-C ends it)")

    terminal = sys.stdout.isatty() and not as_json
    serve(folders, port=port, open_page=terminal if open_page is None else open_page, announce=announce)
