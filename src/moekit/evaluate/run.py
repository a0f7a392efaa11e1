"""`moekit evaluate`: everything measured about one trained run."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from moekit.data.loader import evaluation_batches
from moekit.data.prepare import PreparedData, prepare
from moekit.evaluate.elastic import evaluate_settings
from moekit.evaluate.metrics import (
    Setting,
    balance_summary,
    evaluate_split,
    experts_by_domain,
    inference_speeds,
    mean_bits_per_byte,
)
from moekit.layers.elastic import Elastic
from moekit.models.accounting import active_parameters, flops_per_token, total_parameters
from moekit.train.device import resolve_device, resolve_dtype
from moekit.train.memory import PeakMemory
from moekit.train.run import LoadedRun, load_run, require_same_data

# of the training split, for the gap between training and validation: as many tokens as validation needs
GAP_BATCHES = 12
SPEED_BATCHES = 8


def evaluate_run(
    folder: Path | str, *, max_batches: int | None = None, settings: Sequence[Elastic] = ()
) -> dict[str, Any]:
    """Bits per byte per domain, generalisation gap, speed, memory, parameters and balance of a run, JSON-ready.

    Args:
        folder: the run.
        max_batches: at most this many batches of each domain.
        settings: of the routing, to be compared in a table `by_setting`.

    Errors: `CheckpointError` where the folder is no run, holds no good checkpoint, or its data has changed since.
    """
    run = load_run(folder)
    data = prepare(run.config.data)
    require_same_data(run.folder, data)
    return evaluate_loaded(run, data, max_batches, settings)


def evaluate_loaded(
    run: LoadedRun, data: PreparedData, max_batches: int | None = None, settings: Sequence[Elastic] = ()
) -> dict[str, Any]:
    """As `evaluate_run`, of a model that is loaded already, on any data in its tokens."""
    setting = setting_of(run, max_batches)
    # first, because it refuses what the model cannot do
    by_setting = evaluate_settings(run.model, run.config.model, data, setting, settings) if settings else []
    report = evaluate_model(run, data, setting)
    batches = islice(evaluation_batches(data.validation, setting.batch_size, setting.seq_len), SPEED_BATCHES)
    with PeakMemory(setting.device) as memory:
        speed = inference_speeds({"model": run.model}, batches, setting.device, setting.dtype)
    report["inference_tokens_per_second"] = speed["model"]
    report["peak_memory_bytes"] = memory.bytes
    return {**report, **({"by_setting": by_setting} if by_setting else {})}


def setting_of(run: LoadedRun, max_batches: int | None = None) -> Setting:
    """Evaluation as the run was trained: its device, precision and batch shape."""
    train = run.config.train
    device = resolve_device(train.device)
    run.model.to(device)
    return Setting(
        device, resolve_dtype(train.precision, device), train.batch_size, run.config.data.seq_len, max_batches
    )


def evaluate_model(run: LoadedRun, data: PreparedData, setting: Setting) -> dict[str, Any]:
    """What does not depend on the clock: quality, gap, parameters, balance and experts by domain."""
    model, tokenizer = run.model, data.tokenizer
    validation = evaluate_split(model, data.validation, tokenizer, setting)
    gap_setting = Setting(
        setting.device,
        setting.dtype,
        setting.batch_size,
        setting.seq_len,
        min(setting.max_batches or GAP_BATCHES, GAP_BATCHES),
    )
    train = evaluate_split(model, data.train, tokenizer, gap_setting)
    held_out = evaluate_split(model, data.held_out, tokenizer, setting)
    config = run.config.model
    balance, by_domain = balance_summary(validation), experts_by_domain(validation)
    for table in (balance, by_domain):
        for row, layer in zip(table.get("layers", ()), getattr(model, "moe_layers", ()), strict=True):
            row["router"] = layer.router.name
    mean = mean_bits_per_byte(validation)
    return {
        "run": str(run.folder),
        "step": run.step,
        "bits_per_byte": {
            "mean": mean,
            **{domain: result.bits_per_byte for domain, result in validation.items()},
        },
        "gap": {
            "train": mean_bits_per_byte(train),
            "validation": mean,
            "held_out": mean_bits_per_byte(held_out) if held_out else None,
        },
        "active_parameters": active_parameters(config),
        "total_parameters": total_parameters(config),
        "flops_per_token": flops_per_token(config),
        "balance": balance,
        "experts_by_domain": by_domain,
    }
