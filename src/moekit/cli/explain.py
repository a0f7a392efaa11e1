"""moekit explain"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from moekit.cli.explained_input import input_options
from moekit.cli.output import json_option, print_json, progress_to_stderr


@click.command("explain")
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--out", metavar="FILE", type=click.Path(path_type=Path, dir_okay=False),
              help="the page; explain.html in the run's folder by default")  # fmt: skip
@click.option("--tokens", type=click.IntRange(min=1), default=50_000, show_default=True,
              help="about so many tokens are recorded one by one")  # fmt: skip
@click.option(
    "--causes", is_flag=True, help="switch each group's own experts off and measure what the groups miss"
)
@click.option("--data", multiple=True, metavar="PATH", type=click.Path(path_type=Path),
              help="text that a Hugging Face folder's model reads; a group of its own each time")  # fmt: skip
@input_options
@json_option
def command(
    run: Path, out: Path | None, tokens: int, causes: bool, data: tuple[Path, ...], as_json: bool, **given: Any
) -> None:  # fmt: skip
    """Show what the experts of a run do: loads, specialisation, routes and texts on one page.

    RUN is the folder of a language model's run, of a routing record, or a Hugging Face folder with text to read
    (--data). The page is one HTML file that needs no network; its figures lie beside it as JSON. Claims of
    specialisation are held against two nulls, and with --causes against the loss without the experts.

    With --text, --file or --input one answer is explained: the experts of each token, and how the answer changes
    without each of them. RUN is then any language model that moekit opens, or the run of a task.

    \b
        moekit explain runs/moe-small-1
        moekit explain runs/moe-small-1 --causes --out experts.html
        moekit explain OLMoE-1B-7B-0924 --data prose.txt --data code/ --out olmoe.html
        moekit explain runs/moe-small-1 --text "def read(path):"
        moekit explain runs/news-topics-1 --text "The shuttle lifted off at dawn."
    """
    from moekit.cli.explained_input import explained, is_one_input, print_report

    with progress_to_stderr(as_json):
        if is_one_input(given):
            page, report = explained(run, given, out)
            lines = []
        elif data or _is_foreign(run):
            from moekit.convert.recording import explain_folder
            from moekit.explain.run import in_words

            if causes or not _is_foreign(run):
                raise click.UsageError("--data is for Hugging Face folders, and --causes for runs of moekit")
            page, report = explain_folder(run, data, out, tokens=tokens, progress=click.echo)
            lines = in_words(report)
        else:
            from moekit.explain.run import explain, in_words

            _refuse_tasks(run)
            page, report = explain(run, out, tokens=tokens, causes=causes, progress=click.echo)
            lines = in_words(report)
    if as_json:
        print_json({**report, "page": str(page)})
        return
    if not lines:
        print_report(report)
    for line in lines:
        click.echo(line)
    click.echo(f"page: {page}")


def _is_foreign(run: Path) -> bool:
    """Whether a folder is one of Hugging Face, and neither a run nor a record."""
    names = {
        name
        for name in ("config.json", "config.yaml", "moekit.json", "routing.json")
        if (run / name).is_file()
    }
    return names == {"config.json"}


def _refuse_tasks(run: Path) -> None:
    from moekit.cli.evaluated_task import is_task

    if is_task(run):
        raise click.UsageError(
            f"{run} is the run of a task; what its experts do is on the page of: moekit evaluate {run} --page FILE. "
            f"Why it answers one input as it does: moekit explain {run} --text INPUT"
        )
