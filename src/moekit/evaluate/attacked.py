"""`moekit evaluate RUN --attack`: a run of a task, or of a language model, under attack."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from moekit.config.adversarial import AttackConfig
from moekit.config.errors import ConfigError, require
from moekit.data.encoding.base import Continuous
from moekit.data.loader import evaluation_batches
from moekit.data.prepare import prepare
from moekit.data.task_data import load_task_data
from moekit.data.task_loader import task_batches
from moekit.evaluate.robustness import AnyBatch, gradient_checks, measure_attack
from moekit.evaluate.task import BATCH
from moekit.train.attack import continuous_inputs
from moekit.train.device import resolve_device
from moekit.train.run import load_run, load_task_run, require_same_data

Material = tuple[nn.Module, list[AnyBatch], Mapping[str, Continuous | None]]


def evaluate_attack(
    run: Path | str, attack: AttackConfig, *, examples: int | None = None, restarts: int = 1, checks: bool = False,
    transfer_from: Path | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Accuracy and changed routes of a run under attack, JSON-ready; see `moekit.evaluate.robustness`.

    Args:
        run: of a task, attacked on its test split, or of a language model, on its validation split.
        attack: its size and steps.
        examples: attack an even sample of so many; all where None.
        restarts: attacks on each example.
        checks: also look for gradients that mislead the attack.
        transfer_from: a run on the same inputs; the attack is made on its model in place of this one, and with
            `checks` compared with the one made on this model.

    Errors: those of the run and of its data; `ConfigError` for what cannot be attacked.
    """
    require(restarts >= 1, "restarts", restarts, "must be at least 1")
    loads = _task if (Path(run) / "encoding.json").is_file() else _text
    model, batches, continuous = loads(Path(run), attack, examples)
    source = None
    if transfer_from is not None:
        source, others, _ = loads(transfer_from, attack, examples)
        if type(source) is not type(model) or not _same(batches[0], others[0]):
            raise ConfigError(
                f"{transfer_from} reads other inputs than {run}: an attack made on the one does not fit the other. "
                "Name a run on the same data"
            )
    made_on = None if checks else source
    report = measure_attack(model, batches, attack, continuous=continuous, restarts=restarts, source=made_on)
    if checks:
        report["checks"] = gradient_checks(model, batches, attack, continuous=continuous, source=source)
    return {"run": str(run), **report}


def _task(folder: Path, attack: AttackConfig, examples: int | None) -> Material:
    loaded = load_task_run(folder)
    data = load_task_data(loaded.config)
    device = resolve_device(loaded.config.train.device)
    chosen = data.test
    if examples is not None and examples < len(chosen):
        chosen = chosen.rows([int(i) for i in np.linspace(0, len(chosen) - 1, examples)])
    # what is valid is what training saw
    train = loaded.encoding.encode(data.train, targets=False)
    batches: list[AnyBatch] = [
        batch.to(device) for batch in task_batches(loaded.encoding.encode(chosen), BATCH)
    ]
    return loaded.model.to(device), batches, continuous_inputs(train.inputs, attack)


def _text(folder: Path, attack: AttackConfig, examples: int | None) -> Material:
    loaded = load_run(folder)
    data = prepare(loaded.config.data)
    require_same_data(loaded.folder, data)
    train = loaded.config.train
    device = resolve_device(train.device)
    rows = evaluation_batches(data.validation, train.batch_size, loaded.config.data.seq_len)
    wanted = None if examples is None else max(1, examples // train.batch_size)
    return loaded.model.to(device), [batch.to(device) for batch in islice(rows, wanted)], {}


def _same(batch: Any, other: Any) -> bool:
    def shapes(one: Any) -> Any:
        given = one.arguments()
        if "inputs" not in given:
            return tuple(given["token_ids"].shape)
        return {
            name: {key: tuple(array.shape) for key, array in arrays.items()}
            for name, arrays in given["inputs"].items()
        }

    return bool(shapes(batch) == shapes(other))
