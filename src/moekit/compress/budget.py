"""How many experts stay, and which."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from moekit.config.errors import ConfigError, require

PER_LAYER = ("uniform", "global")


def how_many(n_experts: int, floor: int, keep: float | None, kept: int | None) -> int:
    """Experts of a layer that stay.

    Args:
        n_experts: of the layer.
        floor: the fewest that may stay.
        keep: share of them, or
        kept: their number.

    Errors: `ConfigError` unless exactly one of the two is given, and for values that break a rule.

    >>> how_many(32, 2, keep=0.75, kept=None), how_many(10, 2, keep=0.25, kept=None), how_many(8, 2, None, 3)
    (24, 3, 3)
    """
    require_budget(keep, kept)
    if keep is not None:
        return min(n_experts, max(floor, int(n_experts * keep + 0.5)))
    assert kept is not None
    require(floor <= kept <= n_experts, "n_experts", kept, f"must be in {floor}..{n_experts}",
            "A layer keeps at least top_k experts and cannot get more than it has")  # fmt: skip
    return kept


def require_budget(keep: float | None, kept: int | None) -> None:
    """Raise `ConfigError` unless exactly one of share and number is given, and the share is one."""
    if (keep is None) == (kept is None):
        raise ConfigError(
            "give either --keep, a share of the experts, or --n-experts, their number in each layer"
        )
    if keep is not None:
        require(0 < keep <= 1, "keep", keep, "must be above 0 and at most 1")


def kept_experts(
    scores: Mapping[int, Tensor],
    floors: Mapping[int, int],
    *,
    keep: float | None = None,
    n_experts: int | None = None,
    per_layer: str = "uniform",
    families: Mapping[int, Sequence[int]] | None = None,
) -> dict[int, list[int]]:
    """The experts that stay in each layer, ascending.

    Args:
        scores: `[E]` of each layer, the larger the more worth keeping; the lower number wins a tie.
        floors: the fewest that stay in each layer.
        keep, n_experts: share of the experts, or their number in each layer; see `how_many`.
        per_layer: "uniform" keeps that many in every layer. "global" keeps as many altogether, the best of all layers,
            but at least the floor of each; scores of different layers are compared as shares of their layer's sum.
        families: the family of each expert in layers that have any: as many families as the floor stay.

    >>> scores = {0: torch.tensor([0.4, 0.3, 0.2, 0.1]), 1: torch.tensor([0.97, 0.01, 0.01, 0.01])}
    >>> kept_experts(scores, {0: 1, 1: 1}, keep=0.5)
    {0: [0, 1], 1: [0, 1]}
    >>> kept_experts(scores, {0: 1, 1: 1}, keep=0.5, per_layer="global")
    {0: [0, 1, 2], 1: [0]}
    """
    require(per_layer in PER_LAYER, "per_layer", per_layer, f"must be one of {', '.join(PER_LAYER)}")
    counts = {
        layer: how_many(len(values), floors[layer], keep, n_experts) for layer, values in scores.items()
    }
    ranked = {
        layer: torch.argsort(values, descending=True, stable=True).tolist()
        for layer, values in scores.items()
    }
    for layer, own in (families or {}).items():
        ranked[layer] = families_first(ranked[layer], own, floors[layer])
    if per_layer == "uniform":
        return {layer: sorted(order[: counts[layer]]) for layer, order in ranked.items()}
    kept = {layer: order[: floors[layer]] for layer, order in ranked.items()}
    rest = [
        (float(_shares(scores[layer])[expert]), -layer, -expert)
        for layer, order in ranked.items()
        for expert in order[floors[layer] :]
    ]
    room = sum(counts.values()) - sum(map(len, kept.values()))
    for _, layer, expert in sorted(rest, reverse=True)[:room]:
        kept[-layer].append(-expert)
    return {layer: sorted(experts) for layer, experts in kept.items()}


def families_first(order: Sequence[int], families: Sequence[int], n: int) -> list[int]:
    """`order` with the first expert of each of its first `n` families in front: a token takes one of each.

    >>> families_first([0, 4, 1, 5], [0, 1, 2, 3, 0, 1], 2)
    [0, 1, 4, 5]
    """
    leaders: dict[int, int] = {}
    for expert in order:
        leaders.setdefault(families[expert], expert)
    front = list(leaders.values())[:n]
    return [*front, *(expert for expert in order if expert not in front)]


def _shares(values: Tensor) -> Tensor:
    total = values.sum()
    return values / total if float(total) > 0 else torch.full_like(values, 1 / len(values))
