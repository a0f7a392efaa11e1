"""Folders that look like runs, written by hand, for the tests of the dashboard."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import numpy as np

from moekit.observe.record import LayerInfo, RoutingRecord

CONFIG = "name: a\nmodel:\n  moe: {n_experts: 4}\ntrain:\n  steps: 100\n  optimizer: {lr: 3e-3}\n"


def make_run(folder: Path, config: str = CONFIG) -> Path:
    """A run that has begun."""
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(config)
    about = {"total_parameters": 1000, "active_parameters": 500, "bytes_per_token": 2.0}
    (folder / "run.json").write_text(json.dumps(about))
    return folder


def line(step: int, kind: str = "train", **values: Any) -> str:
    """A line of metrics; a step takes a tenth of a second."""
    common = {
        "step": step,
        "time": 1_000.0 + step / 10,
        "kind": kind,
        "tokens": 64 * step,
        "seconds": step / 10,
    }
    if kind == "train":
        layers = {"load_entropy": [0.9, 0.8], "max_violation": [0.6, 0.7], "dead_experts": [0, 1]}
        common |= {"loss": 5.0 - step / 100, "tokens_per_second": 640.0}
        common |= {"load": [0.1, 0.2, 0.3, 0.4], "by_layer": layers}
    return json.dumps({**common, **values}) + "\n"


def write(run: Path, *lines: str) -> None:
    with open(run / "metrics.jsonl", "a") as file:
        file.write("".join(lines))


def age(run: Path, seconds: float) -> None:
    """Let the run have written last so long ago."""
    then = time.time() - seconds
    for name in ("metrics.jsonl", "config.yaml"):
        if (run / name).exists():
            os.utime(run / name, (then, then))


def forming_record() -> RoutingRecord:
    """Two groups that a router learns to tell apart: at step 10 it draws, at step 20 each group has its expert."""
    rng = np.random.Generator(np.random.PCG64(0))
    n = 200
    group = np.tile(np.arange(2), n // 2).astype(np.int16)
    arrays = {
        "tokens": np.array([n // 2, n // 2]), "history/step": np.arange(1, 301),
        "token/id": np.tile(rng.integers(0, 20, n, dtype=np.int32), 2),
        "token/group": np.tile(group, 2), "token/text": np.tile(np.arange(n, dtype=np.int32) // 2 * 2 + group, 2),
        "token/position": np.tile(np.zeros(n, dtype=np.int32), 2),
        "token/step": np.repeat(np.array([10, 20], dtype=np.int32), n),
        "0/counts": np.full((2, 3), 10), "0/weights": np.full((2, 3), 1.0), "0/requested": np.array([40, 20, 0]),
        "0/history": np.concatenate([np.tile([5, 5, 5], (150, 1)), np.tile([10, 5, 0], (150, 1))]),
        "0/history_entropy": np.linspace(1, 0, 300),
        "0/token/experts": np.concatenate([rng.integers(0, 2, (n, 1)), group[:, None]]).astype(np.int16),
        "0/token/weights": np.ones((2 * n, 1), dtype=np.float16),
        "0/token/entropy": np.zeros(2 * n, dtype=np.float16), "0/token/margin": np.zeros(2 * n, dtype=np.float16),
    }  # fmt: skip
    return RoutingRecord((LayerInfo("one", 3, "softmax"),), ("a", "b"), "training", arrays, {"step": 300})
