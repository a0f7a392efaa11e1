"""Routers balanced by construction, expert choice and balanced assignment: they look at the batch."""

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
            default="sequence",
            description="an expert chooses among the tokens of each sequence, or of the batch",
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
        values, index = selection.view(batch, length, self.n_experts).topk(capacity, dim=1)
        taken = values >= 0
        if context.token_mask is not None:
            # an expert's share is one of the tokens that count: padding must not enlarge it
            share = -(-self.top_k * context.token_mask.view(batch, length).sum(dim=1) // self.n_experts)
            taken = (
                taken & (torch.arange(capacity, device=tokens.device)[None, :] < share[:, None])[..., None]
            )
        chosen = torch.zeros(batch, length, self.n_experts, dtype=torch.bool, device=tokens.device)
        chosen = chosen.scatter_(1, index, taken).flatten(0, 1)
        return RoutingPlan.from_mask(
            chosen, probs * chosen, context, router_logits=logits, router_probs=probs
        )


@register_router("base")
class BaseRouter(LearnedRouter):
    """Balanced assignment in training, the best experts in evaluation (BASE, Lewis et al. 2021).

    Papers: arXiv 2103.16716 and, for "sinkhorn", Clark et al. 2022, arXiv 2202.01169.

    "sinkhorn" scales the affinities until all experts have equal mass and takes the best; "auction"
    solves the assignment, each token to one expert and T/E tokens per expert, for `top_k` rounds. In training
    a choice depends on the whole batch, so a decoder must allow it expressly.
    """

    causal = False

    class Options(StrictConfig):
        method: Literal["sinkhorn", "auction"] = Field(
            default="sinkhorn", description="how the balance is reached"
        )
        iterations: int = Field(default=8, ge=1, description="rounds of Sinkhorn scaling")

    options: Options

    def forward(self, tokens: Tensor, context: RoutingContext) -> RoutingPlan:
        logits = self.logits(tokens)
        affinity = logits.detach()
        index = affinity.topk(self.top_k, dim=-1).indices
        if self.training:
            # padding takes no part in the assignment
            rows = slice(None) if context.token_mask is None else context.token_mask
            index[rows] = self._assign(affinity[rows])
        # a sigmoid of the logit as weight, as in the paper: no other expert's logit enters
        weight = logits.sigmoid().gather(1, index)
        return RoutingPlan.from_choices(
            index, weight, self.n_experts, context, router_logits=logits, router_probs=logits.softmax(dim=-1)
        )

    def _assign(self, affinity: Tensor) -> Tensor:
        """`[n, K]` experts of the tokens that count, from their affinities `[n, E]`."""
        if self.options.method == "sinkhorn" or affinity.shape[0] == 0:
            return sinkhorn(affinity, self.options.iterations).topk(self.top_k, dim=-1).indices
        spread = max(float(affinity.max() - affinity.min()), 1e-6)
        visited = torch.zeros_like(affinity, dtype=torch.bool)
        for _ in range(self.top_k):
            # so low that a token meets an expert again only where the balance leaves no other way; it then
            # goes to its best new one
            choice = auction(
                affinity.masked_fill(visited, float(affinity.min()) - 4.0 * spread), spread / 200
            )[:, None]
            best_new = affinity.masked_fill(visited, -torch.inf).argmax(dim=-1, keepdim=True)
            visited.scatter_(1, torch.where(visited.gather(1, choice), best_new, choice), True)
        return visited.nonzero()[:, 1].view(-1, self.top_k)


def sinkhorn(affinity: Tensor, iterations: int) -> Tensor:
    """Affinities `[T, E]` scaled until experts have equal mass and tokens mass 1; log domain, float32.

    The tokens' scaling comes last: each row of the result's exponential sums to 1, the columns nearly to T /
    E.
    """
    log_plan = affinity.float()
    log_mass = math.log(max(affinity.shape[0], 1) / affinity.shape[1])
    for _ in range(iterations):
        log_plan = log_plan - log_plan.logsumexp(dim=0, keepdim=True) + log_mass
        log_plan = log_plan - log_plan.logsumexp(dim=1, keepdim=True)
    return log_plan


def auction(affinity: Tensor, epsilon: float | None = None, max_rounds: int = 2000) -> Tensor:
    """Expert `[T]` of each token: floor or ceil of T/E tokens each, near-maximal total affinity `[T, E]`.

    Bertsekas' auction for the transportation problem: an unassigned token bids for its best expert the margin
    over its second best; a full expert keeps its highest bidders and its price is the lowest bid it holds.
    The result is within T * epsilon of the best total. Ends after `max_rounds` by filling up greedily.

    Both prefer expert 0; the second token gives way at less cost:

    >>> import torch
    >>> auction(torch.tensor([[3.0, 0.0], [2.0, 1.0]])).tolist()
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
