"""What single experts do to single answers: each switched off by itself, many of them in one pass.

A pass reads one input in several copies, and each copy has an edit of its own in one layer, so that n edits cost one
pass over n copies, and every edit is exact: nothing is estimated from gradients, and no edit sees another one.

Shape legend: N copies, S tokens of the input in a layer, E experts of a layer, K choices of a token, A numbers that are
asked of the answer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from moekit.config.errors import ConfigError, require
from moekit.explain.edits import Closed, Edit, Instead, edited
from moekit.layers.plan import RoutingPlan
from moekit.observe.choices import NONE, choices_of

Scope = Literal["both", "token", "text", "none"]
# tokens that all passes together may read, and that one pass does at most
LIMIT, AT_ONCE = 500_000, 4096


@dataclass(frozen=True)
class Cell:
    """One expert of a layer that is switched off: for one token, or for all where `token` is None."""

    layer: int
    expert: int
    token: int | None = None


@dataclass(frozen=True)
class Reading:
    """What a pass gives.

    Attributes: answers: `[N, A]` of each copy. plans: of each sparse layer.
    """

    answers: Tensor
    plans: tuple[RoutingPlan, ...]


@dataclass
class Ablation:
    """Switches experts off in the reading of one input.

    Args:
        model: with sparse layers, in evaluation mode.
        read: reads the input in so many copies.
        instead: what stands in the place of an expert, see `Off`.
        limit: tokens that may be read in all.
        at_once: tokens that one pass may read.

    Attributes: plain: the reading without an edit. tokens_read: so far.

    Errors: `ConfigError` for a model without experts, and for routers whose choices cannot be edited.
    """

    model: nn.Module
    read: Callable[[int], Reading]
    instead: Instead = "nothing"
    limit: int = LIMIT
    at_once: int = AT_ONCE
    tokens_read: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        layers: Sequence[Any] = getattr(self.model, "moe_layers", [])
        if not layers:
            raise ConfigError("the model is dense: it has no experts to explain")
        # choices that depend on the other rows of a batch, or on the size of it, want a pass by themselves
        self._alone = any(
            not layer.router.causal
            or layer.router.name == "random"
            or layer.config.capacity_factor is not None
            for layer in layers
        )
        self.plain = self._pass(1)

    @property
    def length(self) -> int:
        """S of the first layer."""
        return self.plain.plans[0].n_tokens

    def chosen(self, layer: int) -> list[list[int]]:
        """For each token the experts that it chose in a layer, the heaviest first."""
        rows = choices_of(self.plain.plans[layer]).experts.tolist()
        return [[expert for expert in row if expert != NONE] for row in rows]

    def cells(self, *, tokens: bool = True, text: bool = True) -> list[Cell]:
        """Every expert that was chosen, for each token by itself, and for all tokens together."""
        found = []
        for layer in range(len(self.plain.plans)):
            chosen = self.chosen(layer)
            if tokens:
                found += [Cell(layer, expert, token) for token, row in enumerate(chosen) for expert in row]
            if text:
                found += [
                    Cell(layer, expert) for expert in sorted({expert for row in chosen for expert in row})
                ]
        return found

    def cost(self, n_cells: int) -> int:
        """Tokens that so many edits read."""
        return n_cells * self.length

    def answers(self, cells: Sequence[Cell]) -> Tensor:
        """`[len(cells), A]` the answers without each of the experts.

        Errors: `ConfigError` where it would read more tokens than `limit`.
        """
        require(self.cost(len(cells)) + self.tokens_read <= self.limit, "limit", f"{self.limit:,}",
                f"must be at least {self.cost(len(cells)) + self.tokens_read:,}: the tokens that are read to switch "
                f"{len(cells):,} experts off one by one in an input of {self.length:,}",
                "Shorten the input, ask for the effects on the whole text alone, or raise it")  # fmt: skip
        found = torch.zeros(len(cells), self.plain.answers.shape[1])
        size = 1 if self._alone else max(1, self.at_once // self.length)
        for layer in dict.fromkeys(cell.layer for cell in cells):
            places = [place for place, cell in enumerate(cells) if cell.layer == layer]
            for start in range(0, len(places), size):
                part = places[start : start + size]
                edit = self._closing([cells[place] for place in part])
                found[part] = self.edited(layer, edit, len(part)).answers.cpu()
        return found

    def edited(self, layer: int, edit: Edit, copies: int = 1) -> Reading:
        """The reading with an edit of one layer's plan."""
        with edited(self.model, {layer: edit}):
            return self._pass(copies)

    def _closing(self, cells: Sequence[Cell]) -> Closed:
        plan = self.plain.plans[cells[0].layer]
        closed = torch.zeros(len(cells), plan.n_tokens, plan.n_experts, dtype=torch.bool)
        for copy, cell in enumerate(cells):
            closed[copy, slice(None) if cell.token is None else cell.token, cell.expert] = True
        return Closed(closed.flatten(0, 1), self.instead)

    def _pass(self, copies: int) -> Reading:
        # a router that draws makes the same draws in every pass
        with torch.random.fork_rng([]), torch.inference_mode():
            torch.manual_seed(0)
            reading = self.read(copies)
        self.tokens_read += reading.plans[0].n_tokens if reading.plans else 0
        return reading


def next_best(plan: RoutingPlan) -> tuple[list[int | None], list[float | None]]:
    """For each token the best expert that it did not choose, and its distance in probability to the last that it did.

    None where the router has no probabilities, or no expert is left.

    >>> from moekit.layers.plan import RoutingContext
    >>> probs = torch.tensor([[0.5, 0.25, 0.25, 0.0], [0.125, 0.5, 0.125, 0.25]])
    >>> plan = RoutingPlan.from_choices(
    ...     torch.tensor([[0], [1]]), torch.ones(2, 1), 4, RoutingContext((1, 2)), router_probs=probs
    ... )
    >>> next_best(plan)
    ([1, 3], [0.25, 0.25])
    """
    nothing: list[Any] = [None] * plan.n_tokens
    if plan.router_probs is None or plan.slots is not None:
        return nothing, nothing
    probs = plan.router_probs.detach().float().cpu()
    chosen = torch.zeros(probs.shape, dtype=torch.bool)
    chosen[plan.token_index.cpu(), plan.expert_of_row().cpu()] = True
    left, expert = probs.masked_fill(chosen, -1.0).max(dim=1)
    last = probs.masked_fill(~chosen, torch.inf).min(dim=1).values
    known = [one >= 0 and two < torch.inf for one, two in zip(left.tolist(), last.tolist(), strict=True)]
    return (
        [one if fits else None for one, fits in zip(expert.tolist(), known, strict=True)],
        [one if fits else None for one, fits in zip((last - left).tolist(), known, strict=True)],
    )
