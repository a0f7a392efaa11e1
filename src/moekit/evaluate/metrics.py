"""Measurements of a trained language model: bits per byte, generalisation gap, speed, balance, experts by domain."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from moekit.data.loader import Batch, evaluation_batches
from moekit.data.packing import TokenizedSplit
from moekit.data.tokenizer import Tokenizer
from moekit.layers.statistics import RoutingStats, add_stats
from moekit.train.device import autocast
from moekit.train.validation import loss_over


@dataclass(frozen=True)
class Setting:
    """How a model is evaluated: device, autocast type and batch shape."""

    device: torch.device
    dtype: torch.dtype
    batch_size: int
    seq_len: int
    max_batches: int | None = None


@dataclass
class DomainResult:
    """One domain: bits per byte of its text, nats per token, tokens, and the routing of every sparse layer."""

    bits_per_byte: float
    loss: float
    n_tokens: int
    stats: list[RoutingStats]


def evaluate_split(
    model: nn.Module, split: TokenizedSplit, tokenizer: Tokenizer, setting: Setting
) -> dict[str, DomainResult]:
    """Evaluate each domain of a split by itself.

    Bits per byte: the sum of -log2 p over all predicted tokens, over the UTF-8 bytes that these tokens stand for. It
    compares models with different tokenizers; the end marker of a document costs bits and stands for no byte.
    """
    byte_lengths = tokenizer.byte_lengths()
    results = {}
    for domain in split.domains:
        n_bytes: list[int] = []
        batches = evaluation_batches(
            split, setting.batch_size, setting.seq_len, domain=domain, max_batches=setting.max_batches
        )
        total = loss_over(model, _counted(batches, byte_lengths, n_bytes), setting.device, setting.dtype)
        if total.n_targets == 0:
            continue
        bits = total.nats / math.log(2) / sum(n_bytes) if sum(n_bytes) else float("nan")
        results[domain] = DomainResult(bits, total.mean, total.n_targets, total.stats)
    return results


def mean_bits_per_byte(results: dict[str, DomainResult]) -> float:
    """The plain mean over domains, so that a large domain weighs no more than a small one."""
    return statistics.fmean(result.bits_per_byte for result in results.values()) if results else float("nan")


def _counted(batches: Iterable[Batch], byte_lengths: np.ndarray, n_bytes: list[int]) -> Iterator[Batch]:
    """The batches one by one, noting the bytes that their targets stand for."""
    for batch in batches:
        targets = batch.targets.numpy()
        n_bytes.append(int(byte_lengths[targets[targets >= 0]].sum()))
        yield batch


def balance_summary(results: dict[str, DomainResult]) -> dict[str, Any]:
    """Load balance over all domains together, per layer and in the worst layer; empty for a dense model."""
    total: list[RoutingStats] | None = None
    for result in results.values():
        if result.stats:
            total = add_stats(total, result.stats)
    if not total:
        return {}
    layers = [
        {"layer": index, "load": layer.load().tolist(), "max_violation": layer.max_violation()}
        for index, layer in enumerate(total)
    ]
    return {
        "max_violation": max(layer.max_violation() for layer in total),
        "load_entropy": statistics.fmean(layer.load_entropy() for layer in total),
        "route_entropy": statistics.fmean(layer.route_entropy() for layer in total),
        "mean_active_experts": statistics.fmean(layer.mean_active_experts() for layer in total),
        "dead_experts": sum(layer.dead_experts() for layer in total),
        "dropped_share": statistics.fmean(layer.dropped_share() for layer in total),
        "layers": layers,
    }


def experts_by_domain(results: dict[str, DomainResult]) -> dict[str, Any]:
    """Which experts each domain uses: per layer a row of shares (summing to 1) per domain; empty for a dense model."""
    domains = [domain for domain, result in results.items() if result.stats]
    if not domains:
        return {}
    n_layers = len(results[domains[0]].stats)
    return {
        "domains": domains,
        "layers": [
            {"layer": index, "share": [results[domain].stats[index].load().tolist() for domain in domains]}
            for index in range(n_layers)
        ],
    }


def inference_speeds(
    models: dict[str, nn.Module], batches: Iterable[Batch], device: torch.device, dtype: torch.dtype
) -> dict[str, float]:
    """Median tokens per second of a forward pass with logits; the models take turns on every batch.

    The first batch warms up and does not count. Turns make the ratios hold on a machine whose speed drifts. A recurrent
    model carries its memory from batch to batch, as it does where its quality is measured.
    """
    times: dict[str, list[float]] = {name: [] for name in models}
    memories: dict[str, Any] = dict.fromkeys(models)
    for batch in batches:
        batch = batch.to(device)
        for name, model in models.items():
            model.eval()
            with torch.inference_mode(), autocast(device, dtype):
                _wait(device)
                began = time.perf_counter()
                out = model(batch.token_ids, segment_ids=batch.segment_ids, memory=memories[name])
                _wait(device)
            times[name].append(batch.token_ids.numel() / (time.perf_counter() - began))
            memories[name] = out.memory
    return {name: statistics.median(each[1:] or each) for name, each in times.items() if each}


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
