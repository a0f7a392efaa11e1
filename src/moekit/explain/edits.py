"""Edits of what routers decide: an expert switched off, forced, or exchanged for another one; then all as before.

An edit is a function of the plan, and works with every router and every way of computing, for they all read the plan.

Shape legend: T tokens, E choices of a layer, R rows of the plan.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from moekit.config.errors import ConfigError, require
from moekit.kernels.routing import count_per_expert
from moekit.layers.plan import RoutingPlan

Instead = Literal["next", "share", "nothing"]


@dataclass(frozen=True)
class Off:
    """Experts that no token visits.

    Attributes:
        experts: choices that are closed.
        instead: "next": the token's best expert that it did not choose, by the router's probabilities, takes the row
            over with its weight; "share": the token's other choices have its weight among them; "nothing": the answer
            lacks what the expert would have said.
        tokens: `[T]` bool, the tokens that it concerns; None for all.
    """

    experts: Sequence[int]
    instead: Instead = "next"
    tokens: Tensor | None = None

    def __call__(self, plan: RoutingPlan) -> RoutingPlan:
        _require_rows(plan)
        for expert in self.experts:
            _require_expert("experts", expert, plan)
        device = plan.token_index.device
        closed = torch.zeros(plan.n_tokens, plan.n_experts, dtype=torch.bool, device=device)
        closed[:, list(self.experts)] = True
        if self.tokens is not None:
            closed &= self.tokens.to(device)[:, None]
        return Closed(closed, self.instead)(plan)


@dataclass(frozen=True)
class Closed:
    """Experts that single tokens do not visit: other ones for each token.

    Attributes: closed: `[T, E]` bool; instead: as of `Off`.

    >>> from moekit.layers.plan import RoutingContext
    >>> plan = RoutingPlan.from_choices(
    ...     torch.tensor([[0, 2], [1, 2]]), torch.tensor([[0.9, 0.1], [0.6, 0.4]]), 3, RoutingContext((1, 2))
    ... )
    >>> closed = torch.tensor([[True, False, False], [False, False, True]])
    >>> Closed(closed, "share")(plan).tokens_per_expert.tolist(), Closed(closed, "share")(plan).row_weight.tolist()
    ([0, 1, 1], [1.0, 1.0])
    """

    closed: Tensor
    instead: Instead = "next"

    def __call__(self, plan: RoutingPlan) -> RoutingPlan:
        _require_rows(plan)
        require(tuple(self.closed.shape) == (plan.n_tokens, plan.n_experts), "closed", tuple(self.closed.shape),
                f"must be {(plan.n_tokens, plan.n_experts)}: tokens and experts of the layer")  # fmt: skip
        expert_of_row = plan.expert_of_row()
        closed = self.closed.to(expert_of_row.device)
        hit = closed[plan.token_index, expert_of_row]
        if self.instead == "next":
            return _taken_over(plan, expert_of_row, hit, closed)
        kept = replace(plan.keep_rows(~hit), requested_per_expert=None)
        if self.instead == "nothing":
            return kept
        before = _weight_per_token(plan)
        after = _weight_per_token(kept)
        scale = torch.where(after > 0, before / after.clamp(min=1e-30), torch.zeros_like(after))
        return replace(kept, row_weight=kept.row_weight * scale[kept.token_index])


@dataclass(frozen=True)
class Force:
    """Every token visits one expert, with the weight that its choices have together.

    Attributes: expert; tokens: `[T]` bool, the tokens that it concerns, None for all.
    """

    expert: int
    tokens: Tensor | None = None

    def __call__(self, plan: RoutingPlan) -> RoutingPlan:
        _require_rows(plan)
        _require_expert("expert", self.expert, plan)
        weight = _weight_per_token(plan)
        routed = torch.zeros(plan.n_tokens, dtype=torch.bool, device=weight.device)
        routed[plan.token_index] = True
        forced = routed if self.tokens is None else routed & self.tokens.to(routed.device)
        others = plan.keep_rows(~forced[plan.token_index])
        mine = forced.nonzero()[:, 0]
        expert = torch.cat([others.expert_of_row(), torch.full_like(mine, self.expert)])
        return _sorted(
            plan, torch.cat([others.token_index, mine]), torch.cat([others.row_weight, weight[mine]]), expert
        )


@dataclass(frozen=True)
class Swap:
    """Two experts exchange their tokens."""

    one: int
    other: int

    def __call__(self, plan: RoutingPlan) -> RoutingPlan:
        _require_rows(plan)
        for name, expert in (("one", self.one), ("other", self.other)):
            _require_expert(name, expert, plan)
        places = torch.arange(plan.n_experts, device=plan.token_index.device)
        places[[self.one, self.other]] = places[[self.other, self.one]]
        return _sorted(plan, plan.token_index, plan.row_weight, places[plan.expert_of_row()])


Edit = Callable[[RoutingPlan], RoutingPlan]


@contextmanager
def edited(model: nn.Module, edits: Mapping[int, Edit]) -> Iterator[None]:
    """The model with its routers' plans edited, by number of the sparse layer, until the block is left.

    Errors: `ConfigError` for a layer that the model does not have.

    >>> from moekit.layers.moe import MoE
    >>> layer = MoE(8, d_expert=8, n_experts=4, top_k=2)
    >>> layer.moe_layers = [layer]
    >>> with edited(layer, {0: Off([1])}):
    ...     counts = layer(torch.randn(5, 8)).routing.tokens_per_expert
    >>> int(counts[1]), int(counts.sum())
    (0, 10)
    """
    layers: Sequence[Any] = getattr(model, "moe_layers", [])
    with ExitStack() as stack:
        for number, edit in edits.items():
            require(
                0 <= number < len(layers),
                "layer",
                number,
                f"must be 0..{len(layers) - 1}: sparse layers of the model",
            )

            def hook(module: nn.Module, args: Any, plan: RoutingPlan, edit: Edit = edit) -> RoutingPlan:
                return edit(plan)

            stack.callback(layers[number].router.register_forward_hook(hook).remove)
        yield


def _taken_over(plan: RoutingPlan, expert_of_row: Tensor, hit: Tensor, closed: Tensor) -> RoutingPlan:
    if plan.router_probs is None:
        raise ConfigError(
            "instead must be 'share' or 'nothing' with a router that has no probabilities; got 'next'"
        )
    probs = plan.router_probs.detach().clone()
    probs[closed] = -1.0
    probs[plan.token_index, expert_of_row] = -1.0  # what a token has already it cannot choose again
    expert, token = expert_of_row.clone(), plan.token_index
    rows = hit.nonzero()[:, 0]
    # a token with several closed choices takes its next best for the first, the one after that for the second
    rank = torch.zeros_like(rows)
    order = torch.argsort(token[rows], stable=True)
    first = torch.ones_like(order, dtype=torch.bool)
    first[1:] = token[rows][order][1:] != token[rows][order][:-1]
    place = torch.arange(len(order), device=order.device)
    rank[order] = place - torch.cummax(torch.where(first, place, 0), dim=0).values
    best = probs.topk(min(int(rank.max()) + 1 if len(rank) else 1, probs.shape[1]), dim=1)
    values = best.values[token[rows], rank.clamp(max=best.values.shape[1] - 1)]
    expert[rows] = best.indices[token[rows], rank.clamp(max=best.indices.shape[1] - 1)]
    keep = torch.ones(len(expert), dtype=torch.bool, device=expert.device)
    keep[rows] = values >= 0  # no expert is left to take it over
    return _sorted(plan, token[keep], plan.row_weight[keep], expert[keep])


def _weight_per_token(plan: RoutingPlan) -> Tensor:
    total = torch.zeros(plan.n_tokens, dtype=plan.row_weight.dtype, device=plan.row_weight.device)
    return total.index_add(0, plan.token_index, plan.row_weight)


def _sorted(plan: RoutingPlan, token: Tensor, weight: Tensor, expert: Tensor) -> RoutingPlan:
    order = torch.argsort(expert * plan.n_tokens + token, stable=True)
    return replace(
        plan, token_index=token[order], row_weight=weight[order],
        tokens_per_expert=count_per_expert(expert, plan.n_experts), requested_per_expert=None,
    )  # fmt: skip


def _require_rows(plan: RoutingPlan) -> None:
    if plan.slots is not None:
        raise ConfigError(
            "plans of router 'soft' have no choices to edit: every slot is a blend of all tokens"
        )


def _require_expert(name: str, expert: int, plan: RoutingPlan) -> None:
    require(0 <= expert < plan.n_experts, name, expert, f"must be 0..{plan.n_experts - 1}")
