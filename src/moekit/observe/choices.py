"""The choices of single tokens, read off a routing plan.

Shape legend: T tokens of the call, N tokens that are asked for, K most choices of any of them, E experts, R rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moekit.layers.plan import RoutingPlan

NONE = -1


@dataclass(frozen=True)
class Choices:
    """What each of N tokens chose, the heaviest first.

    Attributes:
        experts: `[N, K]` int16, -1 behind the last choice. weights: `[N, K]` float32 combine weights, 0 behind it.
        entropy: `[N]` float32, of the router's probabilities in nats, NaN where the router has none.
        margin: `[N]` float32, largest probability less the second largest; NaN where there are none, or one expert.
    """

    experts: Tensor
    weights: Tensor
    entropy: Tensor
    margin: Tensor


@torch.no_grad()
def choices_of(plan: RoutingPlan, tokens: Tensor | None = None) -> Choices:
    """The choices of `tokens` `[N]` (places in the flattened batch), or of all T.

    Rows of Soft MoE are slots, which no single token chose: its tokens have their weights over the experts' slots.

    >>> from moekit.layers.plan import RoutingContext
    >>> plan = RoutingPlan.from_choices(
    ...     torch.tensor([[0, 2], [1, 2]]), torch.tensor([[0.1, 0.9], [0.6, 0.4]]), 3, RoutingContext((1, 2))
    ... )
    >>> choices_of(plan).experts.tolist(), choices_of(plan, torch.tensor([1])).experts.tolist()
    ([[2, 0], [1, 2]], [[1, 2]])
    """
    device = plan.token_index.device
    places = torch.arange(plan.n_tokens, device=device) if tokens is None else tokens.to(device)
    if plan.slots is not None:
        experts, weights = _of_slots(plan, places)
    else:
        experts, weights = _of_rows(plan, places)
    probs = None if plan.router_probs is None else plan.router_probs.detach()[places].float()
    unknown = torch.full((len(places),), torch.nan, device=device)
    entropy = unknown if probs is None else torch.special.entr(probs).sum(dim=1)
    margin = unknown
    if probs is not None and probs.shape[1] > 1:
        top = probs.topk(2, dim=1).values
        margin = top[:, 0] - top[:, 1]
    return Choices(experts, weights, entropy, margin)


def last_tokens(plan: RoutingPlan, n: int) -> RoutingPlan:
    """The plan of the last `n` tokens of each text, where a model read its beginning once more. Not for Soft MoE.

    >>> from moekit.layers.plan import RoutingContext
    >>> plan = RoutingPlan.from_choices(torch.tensor([[0], [1], [1], [2]]), torch.ones(4, 1), 3, RoutingContext((2, 2)))
    >>> last = last_tokens(plan, 1)
    >>> last.token_index.tolist(), last.tokens_per_expert.tolist(), last.batch_shape
    ([0, 1], [0, 1, 1], (2, 1))
    """
    batch, length = plan.batch_shape
    if n >= length:
        return plan
    text, place = plan.token_index // length, plan.token_index % length
    kept = place >= length - n
    index = (text * n + place - (length - n))[kept]

    def cut(array: Tensor | None) -> Tensor | None:
        return None if array is None else array.unflatten(0, (batch, length))[:, -n:].flatten(0, 1)

    return RoutingPlan(
        token_index=index,
        row_weight=plan.row_weight[kept],
        tokens_per_expert=torch.bincount(plan.expert_of_row()[kept], minlength=plan.n_experts),
        n_tokens=batch * n,
        batch_shape=(batch, n),
        router_logits=cut(plan.router_logits),
        router_probs=cut(plan.router_probs),
        token_mask=cut(plan.token_mask),
    )


def _of_rows(plan: RoutingPlan, places: Tensor) -> tuple[Tensor, Tensor]:
    device, n = plan.token_index.device, len(places)
    # where each token of the batch stands among those asked for
    slot = torch.full((plan.n_tokens,), NONE, dtype=torch.long, device=device)
    slot[places] = torch.arange(n, device=device)
    row_slot = slot[plan.token_index]
    kept = row_slot != NONE
    row_slot, expert = row_slot[kept], plan.expert_of_row()[kept]
    weight = plan.row_weight.detach().float()[kept]
    by_weight = torch.argsort(weight, descending=True, stable=True)
    order = by_weight[torch.argsort(row_slot[by_weight], stable=True)]
    row_slot = row_slot[order]
    counts = torch.bincount(row_slot, minlength=n)
    k = int(counts.max()) if n else 0
    rank = torch.arange(len(row_slot), device=device) - (counts.cumsum(0) - counts)[row_slot]
    experts = torch.full((n, k), NONE, dtype=torch.int16, device=device)
    weights = torch.zeros(n, k, device=device)
    experts[row_slot, rank] = expert[order].to(torch.int16)
    weights[row_slot, rank] = weight[order]
    return experts, weights


def _of_slots(plan: RoutingPlan, places: Tensor) -> tuple[Tensor, Tensor]:
    """Soft MoE: the weights of each expert's slots in a token's answer, added up."""
    assert plan.slots is not None
    combine = plan.slots.combine.detach().float().flatten(0, 1)[places]  # [N, E*P]
    per_expert = combine.unflatten(1, (plan.n_experts, -1)).sum(dim=2)
    weights, experts = per_expert.sort(dim=1, descending=True, stable=True)
    return experts.to(torch.int16), weights
