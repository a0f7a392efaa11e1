"""moekit train"""

from __future__ import annotations

from pathlib import Path

import click

from moekit.cli.output import json_option, overrides_argument, print_json, print_tables, progress_to_stderr
from moekit.config.errors import ConfigError


@click.command("train")
@click.argument("config")
@overrides_argument
@json_option
@click.option(
    "--from", "source", metavar="MODEL", help="begin with the weights and the tokenizer of this model"
)
@click.option("--quiet", is_flag=True, help="no live view; warnings and the answer only")
def command(config: str, overrides: tuple[str, ...], as_json: bool, source: str | None, quiet: bool) -> None:
    """Train a model from a YAML configuration.

    CONFIG is a YAML file of a language model or of a task, or recipe:NAME; KEY=VALUE changes single keys of it.
    Everything about the run (configuration, metrics, checkpoints) lies in one new folder, whose path is printed.

    \b
        moekit train examples/moe-small.yaml
        moekit train examples/moe-small.yaml train.steps=500 model.moe.router=sigmoid
        moekit train recipe:news-topics data.path=mine.csv data.columns.label=topic

    With --from, the model of CONFIG is replaced by that of MODEL (a run, a model folder, a Hugging Face folder or a
    GGUF file); KEY=VALUE may still change what is no weight, such as model.moe.balance. Train parts of it alone with
    train.trainable=[routers,experts] or train.lora={rank: 8}. train.distill.teacher=MODEL learns its answers too.

    \b
        moekit train examples/moe-small.yaml --from my-model train.trainable=[routers]
    """
    with progress_to_stderr(as_json):
        from moekit.convert.training import train_model
        from moekit.recipes.tasks import is_task, train_task

        if is_task(config):
            if source is not None:
                raise ConfigError("--from begins with a language model; a task has none to begin with")
            result = train_task(config, overrides, quiet=quiet)
        else:
            result = train_model(Path(config), overrides, source=source, quiet=quiet)
    if as_json:
        print_json({"folder": result.folder, "final": result.final})
    else:
        print_tables({"folder": str(result.folder), **result.final}, "Finished")
