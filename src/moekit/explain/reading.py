"""Routing records of trained runs, of language models and of tasks: their validation split read once more."""

from __future__ import annotations

from pathlib import Path

import torch

from moekit.config.errors import require
from moekit.config.loading import load_any_config
from moekit.config.task_run import TaskRunConfig
from moekit.data.encoding.whole import EncodedExamples
from moekit.data.examples import Examples
from moekit.data.groups import groups_of
from moekit.data.loader import evaluation_batches
from moekit.data.packing import TokenizedSplit
from moekit.data.prepare import prepare
from moekit.data.task_loader import task_batches
from moekit.observe.record import RoutingRecord
from moekit.observe.recorder import Recorder, layers_of
from moekit.observe.tasks import add_task
from moekit.train.device import autocast, resolve_device, resolve_dtype
from moekit.train.material import TaskMaterial
from moekit.train.run import LoadedRun, LoadedTask, load_run, load_task_run, require_same_data

# rows of tokens that a page is made of, unless more are asked for
TOKENS = 50_000


def record_run(
    folder: Path | str, *, tokens: int = TOKENS, max_batches: int | None = None, by: str | None = None
) -> RoutingRecord:
    """The routing of a run on its validation split: by domain, or by the classes of a task.

    Args:
        folder: the run.
        tokens: about so many tokens get a row of their own.
        max_batches: at most so many batches.
        by: of a task, the column whose values are the groups; the first target that is one class where None.

    Errors: `CheckpointError` where the folder is no run, holds no good checkpoint, or its data has changed since;
    `ConfigError` for `by` with a language model, or a column that is not there.
    """
    folder = Path(folder)
    if (folder / "config.yaml").is_file() and isinstance(
        load_any_config(folder / "config.yaml"), TaskRunConfig
    ):
        task = load_task_run(folder)
        material = TaskMaterial.of(task.config, None, task.encoding)
        require_same_data(folder, material)
        return record_examples(task, material.held, tokens=tokens, max_batches=max_batches, by=by)
    require(by is None, "by", by, "is for runs of tasks", "The groups of a language model are its domains")
    run = load_run(folder)
    data = prepare(run.config.data)
    require_same_data(run.folder, data)
    return record_split(run, data.validation, tokens=tokens, max_batches=max_batches)


@torch.inference_mode()
def record_split(
    run: LoadedRun, split: TokenizedSplit, *, tokens: int = TOKENS, max_batches: int | None = None
) -> RoutingRecord:
    """As `record_run`, of a model that is loaded already, on any split in its tokens."""
    train, model = run.config.train, run.model
    device = resolve_device(train.device)
    dtype = resolve_dtype(train.precision, device)
    model.to(device).eval()
    share = min(1.0, tokens / max(split.n_tokens, 1))
    recorder = Recorder(layers_of(model), split.domains, tokens=share, most=tokens)
    for batch in evaluation_batches(
        split, train.batch_size, run.config.data.seq_len, max_batches=max_batches
    ):
        batch = batch.to(device)
        mask = batch.token_mask
        with autocast(device, dtype):
            out = model(
                batch.token_ids, segment_ids=batch.segment_ids, token_mask=None if bool(mask.all()) else mask
            )
        assert out.logits is not None
        recorder.add(
            out.routing, token_ids=batch.token_ids, targets=batch.targets, predicted=out.logits.argmax(dim=-1),
            groups=batch.domain_ids, texts=batch.segment_ids, step=run.step,
        )  # fmt: skip
    return recorder.record(run=run.folder.name, step=run.step, split="validation")


@torch.inference_mode()
def record_examples(
    task: LoadedTask, examples: Examples | EncodedExamples, *, tokens: int = TOKENS,
    max_batches: int | None = None, by: str | None = None, split: str = "validation",
) -> RoutingRecord:  # fmt: skip
    """As `record_run`, of a task's model that is loaded already, on any examples.

    Args:
        task: the run.
        examples: with or without answers, or encoded already.
        tokens, max_batches, by: as for `record_run`.
        split: what the record calls the examples.
    """
    model = task.model
    encoded = (
        examples if isinstance(examples, EncodedExamples) else task.encoding.encode(examples, targets=False)
    )
    names, groups = groups_of(task.config, encoded.examples, by)
    size = task.config.train.batch_size
    n_batches = max(1, min(-(-len(encoded) // size), max_batches or len(encoded)))
    recorder = Recorder(layers_of(model), names, most=tokens, per_batch=-(-tokens // n_batches))
    device = next(model.parameters()).device
    model.eval()
    for batch in task_batches(encoded, size, max_batches):
        batch = batch.to(device)
        out = model(batch.inputs)
        add_task(recorder, batch.inputs, out, batch.rows, groups, task.step)
    return recorder.record(run=task.folder.name, step=task.step, split=split)
