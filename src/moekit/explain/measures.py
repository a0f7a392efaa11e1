"""Measures of a layer's routing, as the literature defines them.

Each takes arrays of a routing record (see `moekit.observe.record`) and gives numbers between bounds that are named.

Shape legend: G groups (domains), E experts, N tokens with a row of their own, K choices, V vocabulary.

Sources: OLMoE (Muennighoff and others 2024, https://arxiv.org/abs/2409.02060, section 5) for specialisation, saturation
and co-activation; Wang and others 2024 (https://arxiv.org/abs/2408.15664) for max violation; Xue and others 2024,
OpenMoE (https://arxiv.org/abs/2402.01739) for routes that belong to token ids whatever their context.
"""

from __future__ import annotations

import math

import numpy as np

NONE = -1


def group_shares(counts: np.ndarray) -> np.ndarray:
    """`[G, E]` share of each group's choices that each expert answered; rows sum to 1, or are 0 without tokens.

    >>> group_shares(np.array([[3, 1], [0, 0]])).tolist()
    [[0.75, 0.25], [0.0, 0.0]]
    """
    return np.asarray(counts / np.maximum(counts.sum(axis=1, keepdims=True), 1))


def group_specialisation(counts: np.ndarray) -> float:
    """How much the expert says of the group: mutual information over the entropy of the groups, 0 to 1.

    0 where every group uses the experts alike, 1 where the expert gives the group away. Counts `[G, E]`.

    >>> group_specialisation(np.array([[5, 0], [0, 5]])), group_specialisation(np.array([[4, 2], [2, 1]]))
    (1.0, 0.0)
    """
    total = counts.sum()
    if total == 0:
        return 0.0
    joint = counts / total
    of_group, of_expert = joint.sum(axis=1, keepdims=True), joint.sum(axis=0, keepdims=True)
    inside = joint > 0
    information = float((joint[inside] * np.log(joint[inside] / (of_group @ of_expert)[inside])).sum())
    entropy = -float((of_group[of_group > 0] * np.log(of_group[of_group > 0])).sum())
    return max(information, 0.0) / entropy if entropy > 0 else 0.0


def vocabulary_specialisation(
    experts: np.ndarray, ids: np.ndarray, n_experts: int, least: int = 8
) -> np.ndarray:
    """`[E]` how much each expert is asked by ids that belong to it (OLMoE, equation 10), 0 to 1; NaN unasked.

    The share of an id's tokens that chose the expert, averaged over the tokens that chose it. With ids of the input, of
    the target or of what was predicted.

    Args:
        experts: `[N, K]` choices, -1 for none.
        ids: `[N]`, below 0 where unknown.
        n_experts: E.
        least: ids with fewer tokens are left out: a rare one belongs to its experts by chance.

    >>> vocabulary_specialisation(np.array([[0], [0], [1], [1]]), np.array([5, 5, 5, 6]), 2, least=1).round(3).tolist()
    [0.667, 0.667]
    """
    kept = ids >= 0
    ids, experts = ids[kept], experts[kept]
    known, place, occurs = np.unique(ids, return_inverse=True, return_counts=True)
    chosen = chosen_by(experts, n_experts)  # [N, E]
    table = counts_by(place, len(known), chosen)
    often = occurs >= least
    share = table[often] / occurs[often, None]
    asked = table[often].sum(axis=0)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray((share * table[often]).sum(axis=0) / asked)


def saturation(earlier: np.ndarray, final: np.ndarray) -> float:
    """Mean share of the final choices that were chosen already (OLMoE, equation 8): `[N, K]` of the same tokens.

    >>> saturation(np.array([[0, 1], [2, 3]]), np.array([[1, 0], [3, 4]]))
    0.75
    """
    if len(final) == 0:
        return float("nan")
    same = (final[:, :, None] == earlier[:, None, :]) & (final != NONE)[:, :, None]
    return float((same.any(axis=2).sum(axis=1) / np.maximum((final != NONE).sum(axis=1), 1)).mean())


def co_activation(pairs: np.ndarray) -> np.ndarray:
    """`[E, E]` share of the tokens of the row's expert that also chose the column's (OLMoE, equation 9).

    >>> co_activation(np.array([[4, 1], [1, 2]])).tolist()
    [[1.0, 0.25], [0.5, 1.0]]
    """
    return np.asarray(pairs / np.maximum(np.diag(pairs)[:, None], 1))


def load(requested: np.ndarray) -> np.ndarray:
    """`[E]` share of the choices; sums to 1."""
    return np.asarray(requested / max(requested.sum(), 1))


def load_entropy(requested: np.ndarray) -> float:
    """Entropy of the load over log E: 1 at perfect balance, 0 where one expert has all.

    >>> load_entropy(np.array([5, 5])), load_entropy(np.array([9, 0]))
    (1.0, 0.0)
    """
    share = load(requested)
    share = share[share > 0]
    return (
        abs(float(-(share * np.log(share)).sum())) / math.log(len(requested)) if len(requested) > 1 else 1.0
    )


def max_violation(requested: np.ndarray) -> float:
    """(largest load - mean load) / mean load, of all that was counted (MaxVio of Wang and others).

    >>> max_violation(np.array([3, 1]))
    0.5
    """
    return float(requested.max() / requested.mean() - 1) if requested.sum() > 0 else 0.0


def dead_experts(requested: np.ndarray, share: float = 0.01) -> list[int]:
    """Experts with less than `share` of the mean load."""
    return [int(expert) for expert in np.flatnonzero(requested < share * requested.mean())]


def overloaded_experts(requested: np.ndarray, times: float = 2.0) -> list[int]:
    """Experts with more than `times` the mean load."""
    return [int(expert) for expert in np.flatnonzero(requested > times * requested.mean())]


def route_stability(
    experts: np.ndarray, ids: np.ndarray, n_experts: int, *, least: int = 4, seed: int = 0
) -> tuple[float, float]:
    """How alike the routes of one id are in different contexts, and how alike those of any two tokens are.

    Both are mean shares of common choices between two tokens: of the same id, and drawn from all. A router that goes by
    ids alone has 1 first; one that goes by contexts alone has two equal figures.

    Args:
        experts: `[N, K]`. ids: `[N]`. n_experts: E.
        least: ids with fewer tokens are left out.
        seed: of the pairs.
    """
    rng = np.random.Generator(np.random.PCG64(seed))
    known, counts = np.unique(ids[ids >= 0], return_counts=True)
    often = set(known[counts >= least].tolist())
    rows = np.flatnonzero([value in often for value in ids.tolist()])
    if len(rows) < 2:
        return float("nan"), float("nan")
    order = rows[np.lexsort((rng.random(len(rows)), ids[rows]))]
    beside = (
        ids[order[:-1]] == ids[order[1:]]
    )  # neighbours in a shuffled run of one id are a random pair of it
    hot = chosen_by(experts, n_experts)
    of_same = _overlap(hot[order[:-1][beside]], hot[order[1:][beside]])
    other = rng.permutation(rows)
    return of_same, _overlap(hot[rows], hot[other])


def entropy_by_frequency(entropy: np.ndarray, ids: np.ndarray, bins: int = 8) -> list[tuple[int, int, float]]:
    """Mean entropy of tokens by how often their id occurs: (least, most occurrences, mean), bins of doubling width."""
    kept = (ids >= 0) & ~np.isnan(entropy)
    ids, entropy = ids[kept], entropy[kept].astype(np.float64)
    _, place, counts = np.unique(ids, return_inverse=True, return_counts=True)
    occurs = counts[place]
    found, low = [], 1
    for number in range(bins):
        high = 2 * low - 1 if number < bins - 1 else int(occurs.max(initial=1))
        inside = (occurs >= low) & (occurs <= high)
        if inside.any():
            found.append((low, high, float(entropy[inside].mean())))
        low *= 2
    return found


def chosen_by(experts: np.ndarray, n_experts: int) -> np.ndarray:
    """`[N, E]` 1 where the token chose the expert, from choices `[N, K]`."""
    hot = np.zeros((len(experts), n_experts + 1), dtype=np.float32)
    np.put_along_axis(
        hot, experts.astype(np.int64) % (n_experts + 1), 1.0, axis=1
    )  # -1 falls behind the last
    return hot[:, :n_experts]


def counts_by(place: np.ndarray, n_places: int, chosen: np.ndarray) -> np.ndarray:
    """`[P, E]` tokens of each place (an id, a text) that chose each expert, from places `[N]` and `chosen_by` `[N, E]`.

    >>> counts_by(np.array([1, 1, 0]), 2, np.array([[1, 0], [1, 1], [0, 1]])).tolist()
    [[0.0, 1.0], [2.0, 1.0]]
    """
    # few cells of `chosen` are 1: to count those is ten times as fast as to add up rows
    row, expert = np.nonzero(chosen)
    n_experts = chosen.shape[1]
    cells = np.bincount(place[row] * n_experts + expert, minlength=n_places * n_experts)
    return cells.reshape(n_places, n_experts).astype(np.float64)


def _overlap(one: np.ndarray, other: np.ndarray) -> float:
    """Mean share of common choices, of the larger number of choices."""
    if len(one) == 0:
        return float("nan")
    most = np.maximum(np.maximum(one.sum(axis=1), other.sum(axis=1)), 1)
    return float(((one * other).sum(axis=1) / most).mean())
