"""Routing records made by hand and by numbers, for the tests of reports and pages."""

from __future__ import annotations

import numpy as np

from moekit.observe.record import LayerInfo, RoutingRecord

HOSTILE = "<script>alert('&')</script>"


def small_record() -> RoutingRecord:
    """Two layers of three experts, one choice each; 8 tokens in 2 texts of 2 groups; for figures by hand.

    Layer 0 gives every token of the first group to expert 0, of the second to expert 1; layer 1 gives all to expert 2.
    """
    first = np.array([0, 0, 0, 0, 1, 1, 1, 1], dtype=np.int16)
    then = np.full(8, 2, dtype=np.int16)
    arrays: dict[str, np.ndarray] = {
        "tokens": np.array([4, 4]),
        "token/id": np.array([5, 5, 6, 6, 7, 7, 7, 8], dtype=np.int32),
        "token/target": np.full(8, -1, dtype=np.int32), "token/predicted": np.full(8, -1, dtype=np.int32),
        "token/group": np.array([0, 0, 0, 0, 1, 1, 1, 1], dtype=np.int16),
        "token/text": np.array([0, 0, 0, 0, 1, 1, 1, 1], dtype=np.int32),
        "token/position": np.array([0, 1, 2, 3, 0, 1, 3, 4], dtype=np.int32),
        "token/step": np.zeros(8, dtype=np.int32),
    }  # fmt: skip
    for layer, choice in enumerate((first, then)):
        counts = np.zeros((2, 3), dtype=np.int64)
        np.add.at(counts, (arrays["token/group"], choice), 1)
        arrays |= {
            f"{layer}/counts": counts, f"{layer}/weights": counts.astype(float),
            f"{layer}/requested": counts.sum(axis=0), f"{layer}/dropped": np.array([layer]),
            f"{layer}/violation": np.array([3.0, 2.0]), f"{layer}/pairs": np.diag(counts.sum(axis=0)),
            f"{layer}/entropy": np.array([2.0, 4.0]), f"{layer}/margin": np.array([1.0, 1.0]),
            f"{layer}/token/experts": choice[:, None],
            f"{layer}/token/weights": np.ones((8, 1), dtype=np.float16),
            f"{layer}/token/entropy": np.full(8, 0.75, dtype=np.float16),
            f"{layer}/token/margin": np.full(8, 0.25, dtype=np.float16),
        }  # fmt: skip
    arrays["0/flow"] = np.array([[0, 0, 4], [0, 0, 4], [0, 0, 0]])
    layers = (LayerInfo("first", 3, "softmax"), LayerInfo("second", 3, "hash"))
    return RoutingRecord(layers, ("中文", HOSTILE), "evaluation", arrays, {"run": "by-hand"})


def large_record(
    n: int, *, n_layers: int = 4, n_experts: int = 32, top_k: int = 2, n_groups: int = 3, seed: int = 0
) -> RoutingRecord:
    """N rows of tokens of a router that draws, in texts of 500 tokens, with a history of 1,000 moments."""
    rng = np.random.Generator(np.random.PCG64(seed))
    text = np.arange(n) // 500
    group = (text % n_groups).astype(np.int16)
    arrays: dict[str, np.ndarray] = {
        "tokens": np.bincount(group, minlength=n_groups), "history/step": np.arange(1000) * 10,
        "token/id": rng.integers(0, 5000, n, dtype=np.int32), "token/target": rng.integers(0, 5000, n, dtype=np.int32),
        "token/predicted": rng.integers(0, 5000, n, dtype=np.int32), "token/group": group,
        "token/text": text.astype(np.int32), "token/position": (np.arange(n) % 500).astype(np.int32),
        "token/step": np.zeros(n, dtype=np.int32),
    }  # fmt: skip
    for layer in range(n_layers):
        first = rng.integers(0, n_experts, n)
        chosen = (
            (first[:, None] + np.arange(top_k) * (1 + rng.integers(0, 3, n))[:, None]) % n_experts
        ).astype(np.int16)
        cell = (group[:, None] * n_experts + chosen).ravel()
        counts = np.bincount(cell, minlength=n_groups * n_experts).reshape(n_groups, n_experts)
        entropy = rng.random(n).astype(np.float16)
        arrays |= {
            f"{layer}/counts": counts, f"{layer}/weights": counts / top_k,
            f"{layer}/requested": counts.sum(axis=0), f"{layer}/dropped": np.array([0]),
            f"{layer}/entropy": np.full(n_groups, 1.0), f"{layer}/margin": np.full(n_groups, 1.0),
            f"{layer}/pairs": rng.integers(0, n, (n_experts, n_experts)),
            f"{layer}/history": rng.integers(1, 1000, (1000, n_experts)),
            f"{layer}/history_entropy": rng.random(1000),
            f"{layer}/token/experts": chosen, f"{layer}/token/weights": np.full((n, top_k), 0.5, dtype=np.float16),
            f"{layer}/token/entropy": entropy, f"{layer}/token/margin": entropy,
        }  # fmt: skip
        if layer + 1 < n_layers:
            arrays[f"{layer}/flow"] = rng.integers(0, n, (n_experts, n_experts))
    layers = tuple(LayerInfo(f"layer {number}", n_experts, "softmax") for number in range(n_layers))
    groups = tuple(f"group {number}" for number in range(n_groups))
    return RoutingRecord(layers, groups, "evaluation", arrays)
