"""What a run's routing record says while it grows: the load of experts, and how they specialise, over the steps.

Shape legend: L layers, E experts of a layer, S moments, N tokens with a row of their own, K choices, G groups.
"""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError

from moekit.config.atomic import json_ready
from moekit.config.errors import MoekitError
from moekit.explain.measures import dead_experts, load_entropy, max_violation, vocabulary_specialisation
from moekit.explain.nulls import specialisation_claim
from moekit.explain.summary_tokens import saturation_by_step
from moekit.observe.record import JSON_FILE, RoutingRecord
from moekit.serve.dashboard.run import stamp
from moekit.serve.dashboard.series import rounded

# moments that are shown; recorded steps whose rows are measured; draws of a null; tokens that a measure needs
MOMENTS, STEPS, ROUNDS, LEAST = 100, 40, 40, 50


class RoutingFigures:
    """The figures of routing records, worked out once for each state of their files."""

    def __init__(self) -> None:
        self._known: dict[Path, tuple[Any, dict[str, Any]]] = {}
        self._lock = threading.Lock()

    def of(self, folder: Path) -> dict[str, Any] | None:
        """Those of the record in `folder`; None where there is none, or files do not fit together just now."""
        with self._lock:
            version = stamp(folder / JSON_FILE)
            known = self._known.get(folder)
            if known is not None and known[0] == version:
                return known[1]
            try:
                found = figures(RoutingRecord.load(folder))
            # the two files of a record are replaced one after the other
            except (MoekitError, OSError, SafetensorError, KeyError, ValueError, IndexError):
                return None if known is None else known[1]
            self._known[folder] = (version, found)
            return found


def figures(record: RoutingRecord) -> dict[str, Any]:
    """JSON-ready: `layers`, each with `history` (by moments) and `measures` (by recorded steps), or null for either."""
    layers = []
    for number, info in enumerate(record.layers):
        layers.append({
            "name": info.name, "router": info.router, "n_experts": info.n_experts,
            "labels": [info.label(expert) for expert in range(info.n_experts)],
            "history": _history(record, number), "measures": _measures(record, number),
        })  # fmt: skip
    step = int(record.info.get("step", 0))
    return dict(rounded(json_ready({"groups": list(record.groups), "step": step, "layers": layers})))


def _history(record: RoutingRecord, number: int) -> dict[str, Any] | None:
    """Loads `[S, E]` as multiples of the mean, and their balance; neighbouring moments are added up."""
    if not record.has(number, "history") or "history/step" not in record.arrays:
        return None
    steps, counts = record.arrays["history/step"], record.of(number, "history")
    if len(steps) == 0:
        return None
    first = _starts(len(steps), MOMENTS)
    ends = np.append(first[1:], len(steps)) - 1
    sums = np.add.reduceat(counts, first, axis=0)
    info = record.layers[number]
    asked = sums[
        :, : info.n_experts - info.n_null_experts
    ]  # null experts are not meant to have the load of others
    found: dict[str, Any] = {
        "step": steps[ends].tolist(),
        "load": (sums / np.maximum(sums.sum(axis=1, keepdims=True), 1) * info.n_experts).round(3).tolist(),
        "load_entropy": [load_entropy(row) for row in asked],
        "max_violation": [max_violation(row) for row in asked],
        "dead_experts": [len(dead_experts(row)) if row.sum() else 0 for row in asked],
    }
    if record.has(number, "history_entropy"):
        found["entropy"] = record.of(number, "history_entropy")[ends].tolist()
    return found


def _starts(n: int, most: int) -> np.ndarray:
    """Where each of at most `most` equal stretches of `n` begins.

    >>> _starts(5, 2).tolist()
    [0, 2]
    """
    return np.unique(np.linspace(0, n, min(n, most), endpoint=False).astype(np.int64))


def _measures(record: RoutingRecord, number: int) -> dict[str, Any] | None:
    """Specialisation of the rows of each recorded step, with what chance alone would give; None without rows."""
    if not record.has(number, "token/experts") or "token/step" not in record.arrays:
        return None
    steps = record.arrays["token/step"]
    known, counts = np.unique(steps, return_counts=True)
    known = known[counts >= LEAST]
    if len(known) == 0:
        return None
    shown = known[np.unique(np.linspace(0, len(known) - 1, min(len(known), STEPS)).round().astype(np.int64))]
    found: dict[str, Any] = {"step": [], "group": [], "chance": [], "vocabulary": []}
    for step in shown:
        rows = np.flatnonzero(steps == step)
        found["step"].append(int(step))
        group, chance = _by_group(record, number, rows)
        found["group"].append(group)
        found["chance"].append(chance)
        of_experts = vocabulary_specialisation(
            record.of(number, "token/experts")[rows], record.arrays["token/id"][rows], record.layers[number].n_experts
        )  # fmt: skip
        found["vocabulary"].append(float(np.nanmean(of_experts)) if np.isfinite(of_experts).any() else None)
    found["saturation"] = saturation_by_step(record, number)
    return found


def _by_group(record: RoutingRecord, number: int, rows: np.ndarray) -> tuple[float | None, float | None]:
    """How much the expert says of the group, and the 95% quantile of what chance would have it say."""
    groups = record.arrays["token/group"][rows].astype(np.int64)
    if len(np.unique(groups)) < 2:
        return None, None
    claim = specialisation_claim(
        record.of(number, "token/experts")[rows], groups, record.arrays["token/text"][rows],
        record.layers[number].n_experts, len(record.groups), rounds=ROUNDS,
    )  # fmt: skip
    return claim.value, max(claim.permuted, claim.random)
