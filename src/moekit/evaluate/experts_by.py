"""Which experts serve which examples: shares by the values of a column, against what chance gives.

Shape legend: N examples, L layers, E experts, V values.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

SHUFFLES = 20
OTHERS = "others"


def experts_by(
    shares: Sequence[np.ndarray], values: Sequence[str], *, most: int = 20, seed: int = 0
) -> dict[str, Any]:
    """How the experts' shares differ between groups of examples, layer by layer.

    `difference` of a layer is the mean over the examples of half the sum of |share of the example's group - share of
    all|: 0 where every group uses the same experts, 1 at most. `chance` is the largest of 20 such figures with the
    values shuffled among the examples: what is not above it says nothing about the values.

    Args:
        shares: for each example `[L, E]`, as `moekit.evaluate.task.predict` gives.
        values: of each example.
        most: values with a row of their own, the most frequent; the rest are "others".
        seed: of the shuffles.

    Returns: `values`, their `examples`, and for each layer `shares` `[V][E]`, `difference` and `chance`.

    >>> found = experts_by([np.array([[1.0, 0.0]]), np.array([[0.0, 1.0]])] * 20, ["a", "b"] * 20)
    >>> found["values"], found["layers"][0]["shares"], found["layers"][0]["difference"]
    (['a', 'b'], [[1.0, 0.0], [0.0, 1.0]], 0.5)
    """
    counts = Counter(values)
    kept = [value for value, _ in sorted(counts.items(), key=lambda item: (-item[1], item[0]))]
    if len(kept) > most:
        kept = [*kept[: most - 1], OTHERS]
    places = {value: place for place, value in enumerate(kept)}
    groups = np.asarray([places.get(value, len(kept) - 1) for value in values])
    table = np.stack(list(shares))  # [N, L, E]
    rng = np.random.Generator(np.random.PCG64(seed))
    shuffled = [_differences(table, rng.permutation(groups), len(kept)) for _ in range(SHUFFLES)]
    means, differences = _means(table, groups, len(kept)), _differences(table, groups, len(kept))
    layers = [
        {"shares": means[:, layer].tolist(), "difference": float(differences[layer]),
         "chance": float(max(one[layer] for one in shuffled))}
        for layer in range(table.shape[1])
    ]  # fmt: skip
    return {"values": kept, "examples": np.bincount(groups, minlength=len(kept)).tolist(), "layers": layers}


def _means(table: np.ndarray, groups: np.ndarray, n: int) -> np.ndarray:
    """`[V, L, E]`."""
    total = np.zeros((n, *table.shape[1:]))
    np.add.at(total, groups, table)
    return total / np.maximum(np.bincount(groups, minlength=n), 1)[:, None, None]


def _differences(table: np.ndarray, groups: np.ndarray, n: int) -> np.ndarray:
    """`[L]`."""
    weight = np.bincount(groups, minlength=n) / len(groups)
    away = np.abs(_means(table, groups, n) - table.mean(axis=0)).sum(axis=2) / 2  # [V, L]
    return weight @ away
