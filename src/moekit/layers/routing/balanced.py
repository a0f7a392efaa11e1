"""Routers that are balanced by construction: expert choice and balanced assignment. All of them look at the batch."""

from __future__ import annotations

import math
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from moekit.config.base import StrictConfig
from moekit.layers.plan import RoutingContext, RoutingPlan
from moekit.layers.routing.base import LearnedRouter, register_router


@register_router("expert_choice")
class ExpertChoiceRouter(LearnedRouter):
    """Each expert takes its C = K * T / E best tokens (Zhou et al. 2022, arXiv 2202.09368).

    Whether a token is taken depends on all others, later ones too: not for decoders.
    """

    causal = False

    class Options(StrictConfig):
        scope: Literal["sequence", "batch"] = Field(
            default="sequence", description="an expert chooses among the tokens of each sequence, or of the batch"
        )

    options: Options

    def forward(self, tokens: Tensor, context: RoutingContext) -> RoutingPlan:
        logits = self.logits(tokens)
        probs = logits.softmax(dim=-1)
        batch, length = context.batch_shape if self.options.scope == "sequence" else (1, tokens.shape[0])
        selection = probs
        if context.token_mask is not None:
            selection = probs.masked_fill(~context.token_mask[:, None], -1.0)
        capacity = min(length, math.ceil(self.top_k * length / self.n_experts))
        values, index = selection.view(batch, length, -1).topk(capacity, dim=1)
        chosen = torch.zeros(batch, length, self.n_experts, dtype=torch.bool, device=tokens.device)
        chosen = chosen.scatter_(1, index, values >= 0).flatten(0, 1)
        return RoutingPlan.from_mask(chosen, probs * chosen, context, router_logits=logits, router_probs=probs)


@register_router("base")
class BaseRouter(LearnedRouter):
    """Balanced assignment in training, the best experts in evaluation (BASE, Lewis et al. 2021, arXiv 2103.16716).

    "sinkhorn" scales the affinities until all experts have equal mass and takes the best (Clark et al. 2022,
    arXiv 2202.01169); "auction" solves the assignment, each token to one expert and T/E tokens per expert, for
    `top_k` rounds. In training a choice depends on the whole batch, so a decoder must allow it expressly.
    """

    causal = False

    class Options(StrictConfig):
        method: Literal["sinkhorn", "auction"] = Field(default="sinkhorn", description="how the balance is reached")
        iterations: int = Field(default=8, ge=1, description="rounds of Sinkhorn scaling")

    options: Options

    def forward(self, tokens: Tensor, context: RoutingContext) -> RoutingPlan:
        logits = self.logits(tokens)
        affinity = logits.detach()
        if not self.training:
            index = affinity.topk(self.top_k, dim=-1).indices
        elif self.options.method == "sinkhorn":
            index = sinkhorn(affinity, self.options.iterations, context.token_mask).topk(self.top_k, dim=-1).indices
        else:
            index = self._auctions(affinity, context.token_mask)
        # a sigmoid of the logit as weight, as in the paper: no other expert's logit enters
        weight = logits.sigmoid().gather(1, index)
        return RoutingPlan.from_choices(
            index, weight, self.n_experts, context, router_logits=logits, router_probs=logits.softmax(dim=-1)
        )

    def _auctions(self, affinity: Tensor, mask: Tensor | None) -> Tensor:
        rows = torch.arange(affinity.shape[0], device=affinity.device) if mask is None else mask.nonzero()[:, 0]
        index = affinity.topk(self.top_k, dim=-1).indices
        left = affinity[rows]
        for k in range(self.top_k):
            choice = auction(left)
            index[rows, k] = choice
            # no token meets the same expert twice
            left = left.scatter(1, choice[:, None], left.min() - 10.0 * (left.max() - left.min() + 1.0))
        return index


def sinkhorn(affinity: Tensor, iterations: int, mask: Tensor | None = None) -> Tensor:
    """Affinities `[T, E]` scaled alternately so that tokens have mass 1 and experts equal mass; log domain, float32."""
    log_plan = affinity.float()
    if mask is not None:
        log_plan = log_plan.masked_fill(~mask[:, None], -1e9)
    n_tokens = affinity.shape[0] if mask is None else int(mask.sum())
    log_mass = math.log(max(n_tokens, 1) / affinity.shape[1])
    for _ in range(iterations):
        log_plan = log_plan - log_plan.logsumexp(dim=0, keepdim=True) + log_mass
        if mask is not None:
            log_plan = log_plan.masked_fill(~mask[:, None], -1e9)
        log_plan = log_plan - log_plan.logsumexp(dim=1, keepdim=True)
    return log_plan


def auction(affinity: Tensor, epsilon: float | None = None, max_rounds: int = 2000) -> Tensor:
    """Expert `[T]` of each token, every expert with floor or ceil of T/E tokens, near-maximal total affinity `[T, E]`.

    Bertsekas' auction for the transportation problem: an unassigned token bids for its best expert the margin over
    its second best; a full expert keeps its highest bidders and its price is the lowest bid it holds. The result
    is within T * epsilon of the best total. Ends after `max_rounds` by filling up greedily.

    >>> import torch
    >>> auction(torch.tensor([[3.0, 0.0], [2.0, 1.0]])).tolist()    # both prefer 0; the second gives way at less cost
    [0, 1]
    """
    affinity = affinity.double()
    n_tokens, n_experts = affinity.shape
    if n_experts == 1 or n_tokens == 0:
        return torch.zeros(n_tokens, dtype=torch.long, device=affinity.device)
    spread = float(affinity.max() - affinity.min())
    epsilon = epsilon if epsilon is not None else max(spread, 1e-6) / 200
    room = torch.full((n_experts,), n_tokens // n_experts, device=affinity.device)
    # the experts that are liked most take the remainder
    extra = affinity.sum(dim=0).topk(n_tokens % n_experts).indices
    room[extra] += 1
    price = torch.zeros(n_experts, dtype=affinity.dtype, device=affinity.device)
    choice = torch.full((n_tokens,), -1, dtype=torch.long, device=affinity.device)
    bid = torch.full((n_tokens,), -torch.inf, dtype=affinity.dtype, device=affinity.device)
    closed = room == 0
    for _ in range(max_rounds):
        free = (choice < 0).nonzero()[:, 0]
        if len(free) == 0:
            return choice
        value = (affinity[free] - price).masked_fill(closed, -torch.inf)
        top, expert = value.topk(2, dim=-1)
        margin = torch.where(top[:, 1].isfinite(), top[:, 0] - top[:, 1], torch.zeros_like(top[:, 0]))
        choice[free] = expert[:, 0]
        bid[free] = price[expert[:, 0]] + margin + epsilon
        for e in expert[:, 0].unique().tolist():
            holders = (choice == e).nonzero()[:, 0]
            surplus = len(holders) - int(room[e])
            if surplus >= 0:
                ordered = holders[torch.argsort(bid[holders], stable=True)]
                choice[ordered[:surplus]] = -1
                price[e] = bid[ordered[surplus]]
    return _fill(affinity, choice, room)


def _fill(affinity: Tensor, choice: Tensor, room: Tensor) -> Tensor:
    left = room - torch.bincount(choice[choice >= 0], minlength=len(room))
    for token in (choice < 0).nonzero()[:, 0].tolist():
        expert = int(affinity[token].masked_fill(left <= 0, -torch.inf).argmax())
        choice[token] = expert
        left[expert] -= 1
    return choice
