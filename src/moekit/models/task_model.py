"""The model of a task: stems, one backbone, heads.

Shape legend: B examples, S tokens of all stems, D width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn

# heads and stems that register themselves
import moekit.models.code_head
import moekit.models.ctc_head
import moekit.models.dense_heads
import moekit.models.policy_heads
import moekit.models.rank_head
import moekit.models.sequence_head
import moekit.models.span_head
import moekit.models.video_stem  # noqa: F401
from moekit.config.errors import require
from moekit.config.task import TaskModelConfig
from moekit.layers.elastic import Elastic
from moekit.layers.moe import MoE
from moekit.layers.plan import RoutingPlan
from moekit.models import word_stem  # noqa: F401  (registers itself)
from moekit.models.backbone import Backbone, mean_losses
from moekit.models.continuation import Continuation
from moekit.models.fusion import Fusion
from moekit.models.task_experts import Mixture, TaskExperts, TaskVectors
from moekit.models.task_heads import Head, Hidden, Pooling, build_head
from moekit.models.task_stems import Vectors, build_stem

Arrays = Mapping[str, Mapping[str, Tensor]]


@dataclass
class TaskOutput:
    """Output of a task's model on B examples.

    Attributes:
        hidden_states: `[B, S, D]` after the last norm, the stems' tokens one stem behind the other, and in training
            behind them those that a head added.
        answers: what each head says: logits, numbers in standard deviations, or what it generated.
        loss: the heads' mean losses, summed by their weights; None without targets.
        losses: of each head.
        n_targets: examples that counted.
        aux_losses: unweighted auxiliary losses by name, each the mean over the sparse layers.
        routing: the plan of each sparse layer in the order of `moe_layers`; empty for a dense model.
        places: where each stem's tokens stand in S.
    """

    hidden_states: Tensor
    answers: dict[str, Tensor]
    loss: Tensor | None = None
    losses: dict[str, Tensor] = field(default_factory=dict)
    n_targets: int = 0
    aux_losses: dict[str, Tensor] = field(default_factory=dict)
    routing: tuple[RoutingPlan, ...] = ()
    places: dict[str, slice] = field(default_factory=dict)


class TaskModel(nn.Module):
    """Stems by the name of the input, one backbone, heads by the name of the target.

    Several stems' tokens stand one stem behind the other; each has a learned vector of its own added, so that routers
    and attention know the modality.

    >>> from moekit.config.task import TaskModelConfig
    >>> config = TaskModelConfig.from_dict({
    ...     "d_model": 16, "n_layers": 1, "n_heads": 2, "moe": {"n_experts": 4, "d_expert": 8},
    ...     "stems": {"text": {"kind": "tokens", "vocab_size": 9}},
    ...     "heads": {"topic": {"kind": "classify", "labels": ["a", "b", "c"]}}})
    >>> out = TaskModel(config)({"text": {"ids": torch.tensor([[3, 4, 0]])}}, {"topic": torch.tensor([2])})
    >>> out.answers["topic"].shape, out.loss.shape, out.hidden_states.shape
    (torch.Size([1, 3]), torch.Size([]), torch.Size([1, 3, 16]))
    """

    def __init__(self, config: TaskModelConfig) -> None:
        super().__init__()
        require(config.stems, "model.stems", "{}", "must hold at least one stem")
        require(config.heads, "model.heads", "{}", "must hold at least one head")
        self.config = config
        self.backbone = Backbone(config, causal=config.causal)
        self.backbone.reset_parameters()
        self.stems = nn.ModuleDict(
            {name: build_stem(stem, config.d_model) for name, stem in config.stems.items()}
        )
        self.heads = nn.ModuleDict({name: build_head(head, config) for name, head in config.heads.items()})
        for head in self._heads.values():
            head.share(self.stems)  # type: ignore[arg-type]
        n_parts = len(config.stems) + len(config.products)
        self.modalities = nn.Parameter(torch.randn(n_parts, config.d_model) * 0.02) if n_parts > 1 else None
        self.fusion = Fusion(config.fixed_tokens, config.d_model) if config.fuse else None
        self.pooling = Pooling(config.pooling, config.d_model)
        self.task_experts = None
        if config.task_experts is not None:
            pooled = [name for name, head in self._heads.items() if head.reads_pooled]
            require(pooled, "model.task_experts", config.task_experts.kind,
                    "needs a target that is answered from the pooled vector", "Set it to null")  # fmt: skip
            self.task_experts = TaskExperts(config.task_experts, config.d_model, pooled, config.balance)
        self.embedding_dropout = nn.Dropout(config.embedding_dropout)
        self.head_dropout = nn.Dropout(config.head_dropout)

    @property
    def moe_layers(self) -> list[MoE | Mixture]:
        """The sparse layers: the backbone's first layer first, then the tasks' mixtures, then those of heads."""
        return [
            *self.backbone.moe_layers,
            *([] if self.task_experts is None else self.task_experts.mixtures),
            *(layer for head in self._heads.values() for layer in head.moe_layers),
        ]

    @property
    def _heads(self) -> dict[str, Head]:
        return cast("dict[str, Head]", dict(self.heads.items()))

    def forward(
        self,
        inputs: Arrays,
        targets: Mapping[str, Tensor] | None = None,
        *,
        earlier_counts: list[Tensor] | None = None,
        elastic: Elastic | None = None,
        shifts: Mapping[str, Tensor] | None = None,
    ) -> TaskOutput:
        """Answer.

        Args:
            inputs: the arrays of each stem by name, as its `forward` has them.
            targets: what is wanted of each head that is to be trained.
            earlier_counts: per sparse layer, see `moekit.layers.plan.RoutingContext`.
            elastic: experts per token, and which may be chosen, in this call alone; every sparse layer follows it.
            shifts: `[B, S, D]` by stem, added to the vectors that it gives.
        """
        missing = [name for name in self.stems if name not in inputs]
        for head in self._heads.values():
            missing += [name for name in head.reads if name not in inputs and name not in missing]
        require(
            not missing,
            "inputs",
            sorted(inputs),
            f"must hold {', '.join(missing)} for the stems and wide maps of that name",
        )
        found: dict[str, Vectors] = {name: stem(**inputs[name]) for name, stem in self.stems.items()}
        for name, shift in (shifts or {}).items():
            found[name] = replace(found[name], x=found[name].x + shift)
        for one, other in self.config.products:
            first, second = found[one].x[:, :1], found[other].x[:, :1]
            # two vectors of length 1 have a product of about the root of their width less
            found[f"{one} x {other}"] = Vectors(first * second * first.shape[-1] ** 0.5)
        x, mask, ids, places = self._joined(found)
        if self.fusion is not None:
            x, ids = self.fusion(self.embedding_dropout(x)), None
            places = dict.fromkeys(places, slice(0, 1))
        read = x, mask
        wanted = targets or {}
        for name, head in self._heads.items():
            more = head.added(wanted[name]) if name in wanted else None
            if more is not None:
                x, mask, ids = _behind(x, mask, more)
        x = x if self.fusion is not None else self.embedding_dropout(x)
        out = self.backbone(x, token_ids=ids, token_mask=mask, earlier_counts=earlier_counts, elastic=elastic)
        pooled = self.pooling(out.hidden_states, mask)
        mixed = TaskVectors({})
        if self.task_experts is not None:
            later = None if earlier_counts is None else earlier_counts[len(out.routing) :]
            mixed = self.task_experts(pooled, later)
        pooled = self.head_dropout(pooled)
        vectors = {name: self.head_dropout(vector) for name, vector in mixed.vectors.items()}
        hidden = Hidden(
            self.head_dropout(out.hidden_states), mask, pooled, places, inputs, dict(self.stems),
            partial(Continuation, self.backbone, *read, elastic=elastic) if self.config.causal else None, elastic,
        )  # fmt: skip
        said = {
            name: head.run(replace(hidden, pooled=vectors.get(name, hidden.pooled)), wanted.get(name))
            for name, head in self._heads.items()
        }
        own_losses = (losses for one in said.values() for losses in one.layer_losses)
        layer_losses = [*out.layer_losses, *mixed.layer_losses, *own_losses]
        result = TaskOutput(
            out.hidden_states,
            {name: one.answer for name, one in said.items()},
            aux_losses=mean_losses(layer_losses),
            routing=(*out.routing, *mixed.routing, *(plan for one in said.values() for plan in one.routing)),
            places=places,
        )
        if targets:
            self._add_losses(result, targets)
        return result

    def _joined(
        self, found: Mapping[str, Vectors]
    ) -> tuple[Tensor, Tensor | None, Tensor | None, dict[str, slice]]:
        """All stems' vectors, mask and ids one behind the other, and where each stands."""
        places, start = {}, 0
        for name, one in found.items():
            places[name] = slice(start, start + one.x.shape[1])
            start += one.x.shape[1]
        parts = list(found.values())
        if self.modalities is None:
            (only,) = parts
            mask = None if only.mask is None or bool(only.mask.all()) else only.mask
            return only.x, mask, only.ids, places
        x = torch.cat([one.x + kind for one, kind in zip(parts, self.modalities, strict=True)], dim=1)
        shapes = [one.x.shape[:2] for one in parts]
        masks = [
            torch.ones(shape, dtype=torch.bool, device=x.device) if one.mask is None else one.mask
            for one, shape in zip(parts, shapes, strict=True)
        ]
        mask = torch.cat(masks, dim=1)
        ids = None
        if sum(one.ids is not None for one in parts) == 1:
            # ids of several tables would mean different things under one number; other stems' tokens have none
            absent = [torch.full(shape, -1, device=x.device) for shape in shapes]
            ids = torch.cat(
                [a if one.ids is None else one.ids for one, a in zip(parts, absent, strict=True)], dim=1
            )
        return x, None if bool(mask.all()) else mask, ids, places

    def _add_losses(self, result: TaskOutput, targets: Mapping[str, Tensor]) -> None:
        total = None
        for name, wanted in targets.items():
            head = self.heads[name]
            loss, counted = head.loss(result.answers[name], wanted)  # type: ignore[operator]
            result.losses[name] = loss
            result.n_targets = max(result.n_targets, counted)
            weighted = loss * self.config.heads[name].weight
            total = weighted if total is None else total + weighted
        result.loss = total


def _behind(x: Tensor, mask: Tensor | None, more: Tensor) -> tuple[Tensor, Tensor | None, None]:
    """Vectors and mask with further vectors behind; no ids, which would mean different things under one number."""
    if mask is not None:
        mask = torch.cat([mask, mask.new_ones(more.shape[:2])], dim=1)
    return torch.cat([x, more.to(x.dtype)], dim=1), mask, None
