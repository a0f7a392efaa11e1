"""moekit evaluate"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from moekit.cli.attack_options import attack_options, attacked, print_attack
from moekit.cli.elastic_options import numbers, print_settings, settings_of
from moekit.cli.evaluated_task import FIGURES, evaluated_task, experts_in_words, is_task
from moekit.cli.output import data_option, json_option, print_json, print_tables, progress_to_stderr


@click.command("evaluate")
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--max-batches", type=click.IntRange(min=1), help="stop after this many batches of each domain")
@click.option("--k", metavar="K,K,...", callback=numbers,
              help="compare these numbers of experts per token: quality, cost and speed")  # fmt: skip
@data_option
@click.option("--file", metavar="FILE", type=click.Path(path_type=Path),
              help="examples with answers, in place of a task's test split")  # fmt: skip
@click.option(
    "--by",
    multiple=True,
    metavar="COLUMN",
    help="compare a task's experts by this column; may be given again",
)
@click.option("--page", metavar="HTML", type=click.Path(path_type=Path, dir_okay=False),
              help="write a task's figures and experts as a page, and as JSON beside it")  # fmt: skip
@attack_options
@json_option
def command(
    run: Path, max_batches: int | None, k: tuple[int, ...], data: tuple[str, ...], file: Path | None,
    by: tuple[str, ...], page: Path | None, as_json: bool, **attack: Any,
) -> None:  # fmt: skip
    """Measure a run: bits per byte per domain, speed, memory and balance; a task's metrics and experts.

    RUN is the folder of a run, or a model folder. A run's last checkpoint is measured on the validation split and on
    the held-out domain; a model folder on the text of the run that it came from, or on what --data names. A task is
    measured on its test split, or on the examples of --file, by the metrics of its recipe. With --attack pgd
    the answers and the routes of a run are measured under attack, and nothing else.
    """
    if attack["attack"] is None:
        _refuse({f"--{name.replace('_', '-')}": value for name, value in attack.items()}, "--attack pgd")
    of_tasks, of_models = (
        {"--file": file, "--by": by, "--page": page},
        {"--data": data, "--max-batches": max_batches, "--k": k},
    )
    with progress_to_stderr(as_json):
        if attack["attack"] is not None:
            _refuse({**of_tasks, **of_models}, "measuring without --attack")
            answer = attacked(run, attack)
        elif is_task(run):
            _refuse(of_models, "language models; this is the run of a task")
            answer = evaluated_task(run, file, by, page)
        elif (run / "moekit.json").is_file():
            from moekit.cli.model_folder import evaluate_folder

            _refuse(of_tasks, "runs of tasks; this is the folder of a model")
            answer = evaluate_folder(run, data, max_batches, settings_of(k))
        else:
            from moekit.evaluate.run import evaluate_run

            _refuse(of_tasks, "runs of tasks; this is the run of a language model")
            _refuse({"--data": data}, "model folders; a run is measured on its own text")
            answer = evaluate_run(run, max_batches=max_batches, settings=settings_of(k))
    if as_json:
        print_json(answer)
    elif "attack" in answer:
        print_attack(answer)
    else:
        print_tables(
            {name: value for name, value in answer.items() if name not in (*FIGURES, "by_setting")},
            f"Evaluation of {run}",
        )
        if "by_setting" in answer:
            print_settings(answer["by_setting"])
        for line in experts_in_words(answer.get("experts_by", ())):
            click.echo(line)
        if page is not None:
            click.echo(f"page: {page}")


def _refuse(options: dict[str, Any], wanted: str) -> None:
    for name, value in options.items():
        if value:
            raise click.UsageError(f"{name} is for {wanted}")
