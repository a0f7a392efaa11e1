"""Experts between pooling and heads, mixed by each task for itself: MMoE, PLE and what they are compared with.

    pooled [B, D] ─► router of each task ─► its RoutingPlan
                     all plans together ─► dispatch ─► experts, each row once ─► combine by each plan ─► [B, D] a task

A level holds E experts and one stream `[B, D]` for each task; with PLE one more stream feeds the experts that all
share. However many tasks ask for the same expert on the same example, it computes once.

Shape legend: B examples, D width, E experts of a level, G streams, V experts that a router sees, R rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moekit.config.moe import BalanceConfig, MoEConfig
from moekit.config.task_experts import TaskExpertsConfig
from moekit.layers.balancing import balance_losses
from moekit.layers.combine import combine
from moekit.layers.dispatch import dispatch
from moekit.layers.experts import MLP, StackedMLP
from moekit.layers.norm import RMSNorm
from moekit.layers.plan import RoutingContext, RoutingPlan
from moekit.layers.routing import build_router

SHARED = "shared"


@dataclass
class TaskVectors:
    """What task experts give.

    Attributes: vectors: `[B, D]` by task. layer_losses, routing: auxiliary losses and plan of each mixture, in the
        order of `TaskExperts.mixtures`.
    """

    vectors: dict[str, Tensor]
    layer_losses: tuple[dict[str, Tensor], ...] = ()
    routing: tuple[RoutingPlan, ...] = ()


@dataclass
class _Level:
    streams: Tensor
    losses: list[dict[str, Tensor]] = field(default_factory=list)
    plans: list[RoutingPlan] = field(default_factory=list)


class Mixture(nn.Module):
    """One stream's router over the experts that it sees; the experts stand in the level.

    Attributes: router; config: of the router's layer, as `MoE.config`. expert_names: of the experts that it sees, in
        the order of its plans.
    """

    seen: Tensor

    def __init__(
        self,
        name: str,
        d_model: int,
        config: TaskExpertsConfig,
        balance: BalanceConfig,
        seen: Sequence[int],
        names: Sequence[str],
    ) -> None:
        super().__init__()
        top_k = min(config.top_k or len(seen), len(seen))
        self.name = name
        self.config = MoEConfig(
            n_experts=len(seen), top_k=top_k, d_expert=config.d_expert, router=config.router, balance=balance,
            activation=config.activation,
        )  # fmt: skip
        self.router = build_router(d_model, self.config)
        self.expert_names = tuple(names)
        self.register_buffer("seen", torch.tensor(list(seen)), persistent=False)  # [V] places in the level


class _ExpertLevel(nn.Module):
    """The experts of one level and the mixtures that read them.

    Args:
        d_model: width.
        config: of the task experts.
        balance: of the routers.
        tasks: names of the streams that tasks read.
        feeds: whether the shared experts' stream goes on to another level.
    """

    stream_of: Tensor

    def __init__(
        self,
        d_model: int,
        config: TaskExpertsConfig,
        balance: BalanceConfig,
        tasks: Sequence[str],
        feeds: bool,
    ) -> None:
        super().__init__()
        n, own = config.n_experts, config.own
        names = [f"{SHARED} {i}" for i in range(n)] + [f"{task} {i}" for task in tasks for i in range(own)]
        self.n_experts = len(names)
        self.norm = RMSNorm(d_model)
        self.experts = StackedMLP(self.n_experts, d_model, config.d_expert, activation=config.activation)
        self.dropout = config.dropout
        # shared experts read the last stream, a task's own ones the task's
        streams = [len(tasks)] * n + [k for k in range(len(tasks)) for _ in range(own)]
        self.register_buffer("stream_of", torch.tensor(streams), persistent=False)
        views = [[*range(n), *range(n + k * own, n + (k + 1) * own)] for k in range(len(tasks))]
        if feeds:
            views.append(list(range(self.n_experts)))
        self.mixtures = nn.ModuleList(
            Mixture(name, d_model, config, balance, seen, [names[i] for i in seen])
            for name, seen in zip([*tasks, SHARED], views, strict=False)
        )

    @property
    def mixed(self) -> list[Mixture]:
        """The mixtures: of the tasks in their order, then the one that feeds the shared experts of the next level."""
        return cast("list[Mixture]", list(self.mixtures))

    def forward(self, streams: Tensor, earlier_counts: Sequence[Tensor | None]) -> _Level:
        """`streams` `[G, B, D]`, the shared one last, to those of the mixtures."""
        size, device = streams.shape[1], streams.device
        normed = self.norm(streams)
        level = _Level(streams)
        asked = torch.zeros(self.n_experts, size, dtype=torch.bool, device=device)
        for number, mixture in enumerate(self.mixed):
            context = RoutingContext((size, 1), earlier_counts=earlier_counts[number])
            plan = mixture.router(normed[number], context)
            level.losses.append(balance_losses(plan, context, mixture.config.balance))
            level.plans.append(plan)
            asked[mixture.seen[plan.expert_of_row()], plan.token_index] = True
        together = self._together(asked, len(streams))
        answers = self.experts(dispatch(normed.flatten(0, 1), together), together.tokens_per_expert)  # [R, D]
        row_of = torch.zeros_like(asked, dtype=torch.long)  # [E, B] where the answer stands
        row_of[asked] = torch.arange(len(answers), device=device)
        found = []
        for number, (mixture, plan) in enumerate(zip(self.mixed, level.plans, strict=True)):
            rows = row_of[mixture.seen[plan.expert_of_row()], plan.token_index]
            mixed = combine(answers.index_select(0, rows), plan)
            found.append(streams[number] + F.dropout(mixed, self.dropout, self.training).to(streams.dtype))
        level.streams = torch.stack(found)
        return level

    def _together(self, asked: Tensor, n_streams: int) -> RoutingPlan:
        """The plan of every row that some mixture asked for, over the tokens `[G * B]` of all streams."""
        expert, example = asked.nonzero(as_tuple=True)
        return RoutingPlan(
            token_index=self.stream_of[expert] * asked.shape[1] + example,
            row_weight=torch.ones(len(expert), device=asked.device),
            tokens_per_expert=asked.sum(dim=1),
            n_tokens=n_streams * asked.shape[1],
            batch_shape=(n_streams, asked.shape[1]),
        )


class TaskExperts(nn.Module):
    """From one pooled vector to a vector for each task, by mixtures of experts.

    mmoe: Ma et al. 2018, "Modeling Task Relationships in Multi-task Learning with Multi-gate Mixture-of-Experts" (KDD).
    ple: Tang et al. 2020, "Progressive Layered Extraction" (RecSys). What the experts say is added to what they read.

    >>> config = TaskExpertsConfig(kind="ple", n_experts=3, n_own=2, d_expert=4)
    >>> experts = TaskExperts(config, 8, ["income", "marriage"])
    >>> out = experts(torch.randn(5, 8))
    >>> {task: tuple(vector.shape) for task, vector in out.vectors.items()}
    {'income': (5, 8), 'marriage': (5, 8)}
    >>> [len(plan.tokens_per_expert) for plan in out.routing], experts.mixtures[1].expert_names[-1]
    ([5, 5], 'marriage 1')
    """

    def __init__(
        self,
        config: TaskExpertsConfig,
        d_model: int,
        tasks: Sequence[str],
        balance: BalanceConfig | None = None,
    ) -> None:
        super().__init__()
        self.config, self.tasks = config, list(tasks)
        balance = balance or config.balance or BalanceConfig()
        # one router for all is one task's mixture, which all of them read
        streams = self.tasks if config.kind in ("mmoe", "ple") else ["all"]
        dense = config.kind == "shared"
        self.bottom = MLP(d_model, config.d_expert, activation=config.activation) if dense else None
        self.norm = RMSNorm(d_model) if dense else None
        self.levels = nn.ModuleList(
            _ExpertLevel(d_model, config, balance, streams, feeds=number + 1 < config.levels)
            for number in range(0 if dense else config.levels)
        )

    @property
    def mixtures(self) -> list[Mixture]:
        """Every router with what it sees: the first level's first, in each level the tasks' in their order."""
        return [mixture for level in self._levels for mixture in level.mixed]

    @property
    def _levels(self) -> list[_ExpertLevel]:
        return cast("list[_ExpertLevel]", list(self.levels))

    @property
    def untouched(self) -> int:
        """Parameters of experts that an example does not visit: all where routers weigh every expert.

        With `top_k`, each task is taken to choose other experts than the others do, as far as there are others.
        """
        count = 0
        for level in self._levels:
            weights = sum(p.numel() for p in level.experts.parameters())
            asked = sum(mixture.config.top_k for mixture in level.mixed)
            count += (level.n_experts - min(level.n_experts, asked)) * weights // level.n_experts
        return count

    def forward(self, pooled: Tensor, earlier_counts: Sequence[Tensor | None] | None = None) -> TaskVectors:
        """`pooled` `[B, D]`; `earlier_counts` for each mixture, see `RoutingContext`."""
        if self.bottom is not None and self.norm is not None:
            mixed = F.dropout(self.bottom(self.norm(pooled)), self.config.dropout, self.training)
            return TaskVectors(dict.fromkeys(self.tasks, pooled + mixed.to(pooled.dtype)))
        counts = list(earlier_counts or [None] * len(self.mixtures))
        n_streams = len(self.tasks) if self.config.kind in ("mmoe", "ple") else 1
        streams = pooled.expand(n_streams + 1, *pooled.shape)
        losses: list[dict[str, Tensor]] = []
        plans: list[RoutingPlan] = []
        for level in self._levels:
            n = len(level.mixed)
            out = level(streams, counts[:n])
            streams, counts = out.streams, counts[n:]
            losses, plans = losses + out.losses, plans + out.plans
        vectors = {task: streams[min(place, n_streams - 1)] for place, task in enumerate(self.tasks)}
        return TaskVectors(vectors, tuple(losses), tuple(plans))
