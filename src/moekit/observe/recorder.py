"""Filling a routing record, batch by batch.

Counts alone cost next to nothing: the plan has them. What needs the choices of single tokens (pairs, flows, rows of
tokens) is worked out for a sample of the tokens.

Shape legend: B texts, S tokens of each, T = B*S, G groups, E choices of a layer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from moekit.config.errors import require
from moekit.layers.plan import RoutingPlan
from moekit.observe.choices import NONE, Choices, choices_of
from moekit.observe.record import LayerInfo, RoutingRecord, joined

ALL = "all"


def layers_of(model: nn.Module) -> tuple[LayerInfo, ...]:
    """The sparse layers of one of moekit's models, in the order of `output.routing`."""
    found = []
    names = {id(module): name for name, module in model.named_modules()}
    for number, layer in enumerate(getattr(model, "moe_layers", [])):
        router: Any = layer.router
        labels = getattr(layer, "expert_names", None) or getattr(router, "expert_names", None) or ()
        config = layer.config
        nulls = getattr(getattr(config, "null_experts", None), "total", 0)
        name = names.get(id(layer), f"layer {number}")
        found.append(LayerInfo(name, config.n_choices, router.name, tuple(labels), nulls))
    return tuple(found)


class Recorder:
    """Collects plans.

    Args:
        layers: of the model, see `layers_of`.
        groups: names of groups of tokens, such as domains.
        tokens: share of the tokens that get a row of their own; 0 for sums alone, 1 for all.
        per_batch: instead of a share, draw so many tokens of each batch: the same ones of the same batches.
        most: rows of tokens at most; what comes later counts in the sums alone.
        source: of the record.
        seed: of the sample.

    >>> from moekit.layers.moe import MoE
    >>> layer = MoE(8, d_expert=8, n_experts=4, top_k=2)
    >>> recorder = Recorder([LayerInfo("moe", 4, "softmax")], tokens=1.0)
    >>> recorder.add([layer(torch.randn(2, 3, 8)).routing], token_ids=torch.arange(6).view(2, 3))
    >>> record = recorder.record()
    >>> record.n_tokens, int(record.counts(0).sum()), record.of(0, "token/experts").shape
    (6, 12, (6, 2))
    """

    def __init__(
        self, layers: Sequence[LayerInfo], groups: Sequence[str] = (ALL,), *, tokens: float = 0.0, most: int = 200_000,
        source: str = "evaluation", seed: int = 0, per_batch: int | None = None,
    ) -> None:  # fmt: skip
        require(0 <= tokens <= 1, "tokens", tokens, "must be 0 to 1, a share of the tokens")
        require(len(groups) > 0, "groups", groups, "must name one group at least")
        self.layers, self.groups, self.source = tuple(layers), tuple(groups), source
        self.share, self.most, self.per_batch = tokens, most, per_batch
        self._rng = torch.Generator().manual_seed(seed)
        self._sums: dict[str, np.ndarray] = {"tokens": np.zeros(len(groups), dtype=np.int64)}
        self._rows: dict[str, list[np.ndarray]] = {}
        self._n_rows, self._n_texts = 0, 0

    @torch.no_grad()
    def add(
        self, plans: Sequence[RoutingPlan], *, token_ids: Tensor | None = None, groups: Tensor | None = None,
        targets: Tensor | None = None, predicted: Tensor | None = None, texts: Tensor | None = None,
        positions: Tensor | None = None, step: int = 0,
    ) -> None:  # fmt: skip
        """One forward pass.

        The first plan says what the tokens are. A later one may route whole texts (a task's mixtures): their choices
        are those of each of their tokens. One that routes something else (a decoder's tokens) counts in sums alone.

        Args:
            plans: of every layer, in order.
            token_ids, targets, predicted: `[B, S]` vocabulary ids; None where unknown.
            groups: `[B]` or `[B, S]` number of each text's or token's group; None where there is one.
            texts: `[B]` or `[B, S]` number of the document; None where each row is one of its own.
            positions: `[B, S]` places in the document; those in the row where None.
            step: of training or generation.

        Errors: `ConfigError` where plans and layers differ.
        """
        require(
            len(plans) == len(self.layers),
            "plans",
            len(plans),
            f"must be one for each of {len(self.layers)} layers",
        )
        if not plans:
            return
        batch, length = plans[0].batch_shape
        mask = plans[0].token_mask
        real = torch.ones(batch * length, dtype=torch.bool) if mask is None else mask.cpu()
        group = torch.zeros(batch, length, dtype=torch.long)
        if groups is not None:
            group = (groups if groups.dim() == 2 else groups[:, None]).cpu().long().expand(batch, length)
        group = group.reshape(-1).clamp(min=0)  # padding counts nowhere
        self._sums["tokens"] += np.bincount(group[real].numpy(), minlength=len(self.groups))
        for number, plan in enumerate(plans):
            require(plan.n_experts == self.layers[number].n_experts, f"plans[{number}]", plan.n_experts,
                    f"must have {self.layers[number].n_experts} experts")  # fmt: skip
            self._add_sums(number, plan, _group_of(plan, group, (batch, length)))
        if self.share > 0 or self.per_batch:
            places = self._sample(real)
            chosen = [_chosen(plan, places, (batch, length)) for plan in plans]
            self._add_pairs(chosen)
            rows = torch.arange(batch) + self._n_texts if texts is None else texts.cpu()
            if rows.dim() == 1:
                rows = rows[:, None].expand(batch, length)
            if positions is None:
                positions = torch.arange(length).expand(batch, length)
            ids = {
                "id": token_ids,
                "target": targets,
                "predicted": predicted,
                "text": rows,
                "position": positions,
            }
            self._add_rows(chosen, places, group, ids, step)
        self._n_texts += batch

    def _add_sums(self, number: int, plan: RoutingPlan, group: Tensor) -> None:
        """Of all tokens."""
        n_groups, n_experts = len(self.groups), plan.n_experts
        counts = plan.tokens_per_expert.cpu()
        rows = torch.stack(
            [plan.row_weight.detach().double().cpu(), torch.ones(len(plan.token_index), dtype=torch.float64)]
        )
        cell = plan.expert_of_row().cpu()
        if n_groups > 1 and plan.slots is None:
            cell = group[plan.token_index.cpu()] * n_experts + cell
        cells = torch.zeros(2, n_groups * n_experts, dtype=torch.float64).index_add_(1, cell, rows)
        weights, answered = cells.view(2, n_groups, n_experts).numpy()
        if n_groups == 1:
            answered = counts.view(1, -1).numpy()
        self._plus(number, "counts", answered.astype(np.int64))
        self._plus(number, "weights", weights)
        self._plus(number, "requested", plan.requested.cpu().numpy().astype(np.int64))
        load = plan.requested.double().cpu()
        violation = float(load.max() / load.mean() - 1) if load.sum() > 0 else 0.0
        self._plus(number, "violation", np.array([violation, 1.0]))
        self._plus(number, "dropped", plan.n_dropped.cpu().numpy().reshape(1).astype(np.int64))
        if plan.router_probs is None:
            return
        probs = plan.router_probs.detach().float().cpu()
        if plan.token_mask is not None:
            probs = probs * plan.token_mask.cpu()[:, None]
        top = probs.topk(min(2, n_experts), dim=1).values
        each = torch.cat([
            probs, torch.special.entr(probs).sum(dim=1, keepdim=True),
            (top[:, :1] - top[:, 1:]) if n_experts > 1 else torch.zeros(len(probs), 1),
        ], dim=1).double()  # fmt: skip
        total = torch.zeros(n_groups, each.shape[1], dtype=torch.float64).index_add_(0, group, each).numpy()
        self._plus(number, "probs", total[:, :n_experts])
        self._plus(number, "entropy", total[:, n_experts])
        self._plus(number, "margin", total[:, n_experts + 1])

    def _plus(self, number: int, name: str, more: np.ndarray) -> None:
        key = f"{number}/{name}"
        self._sums[key] = more.copy() if key not in self._sums else self._sums[key] + more

    def _sample(self, real: Tensor) -> Tensor:
        places = real.nonzero()[:, 0]
        if self.per_batch is not None:
            drawn = torch.randperm(len(places), generator=self._rng)[: self.per_batch]
            places = places[drawn.sort().values]
        elif self.share < 1:
            places = places[torch.rand(len(places), generator=self._rng) < self.share]
        return places[: max(self.most - self._n_rows, 0)]

    def _add_pairs(self, chosen: Sequence[Choices]) -> None:
        for number, one in enumerate(chosen):
            n_experts = self.layers[number].n_experts
            hot = torch.zeros(len(one.experts), n_experts + 1)
            hot.scatter_(
                1, one.experts.long().cpu() % (n_experts + 1), 1.0
            )  # -1 falls behind the last expert
            hot = hot[:, :n_experts]
            self._plus(number, "pairs", (hot.T @ hot).round().long().numpy())
            if number + 1 < len(chosen) and one.experts.shape[1] and chosen[number + 1].experts.shape[1]:
                first, then = one.experts[:, 0].long().cpu(), chosen[number + 1].experts[:, 0].long().cpu()
                both = (first != NONE) & (then != NONE)
                n_then = self.layers[number + 1].n_experts
                flow = torch.bincount(first[both] * n_then + then[both], minlength=n_experts * n_then)
                self._plus(number, "flow", flow.view(n_experts, n_then).numpy())

    def _add_rows(
        self,
        chosen: Sequence[Choices],
        places: Tensor,
        group: Tensor,
        ids: Mapping[str, Tensor | None],
        step: int,
    ) -> None:
        def picked(array: Tensor | None) -> np.ndarray:
            if array is None:
                return np.full(len(places), NONE, dtype=np.int32)
            return array.reshape(-1).cpu()[places].clamp(min=NONE).to(torch.int32).numpy()

        row = {
            **{f"token/{name}": picked(array) for name, array in ids.items()},
            "token/group": group[places].to(torch.int16).numpy(),
            "token/step": np.full(len(places), step, dtype=np.int32),
        }  # fmt: skip
        for number, one in enumerate(chosen):
            row |= {
                f"{number}/token/experts": one.experts.cpu().numpy(),
                f"{number}/token/weights": one.weights.cpu().half().numpy(),
                f"{number}/token/entropy": one.entropy.cpu().half().numpy(),
                f"{number}/token/margin": one.margin.cpu().half().numpy(),
            }
        for name, array in row.items():
            self._rows.setdefault(name, []).append(array)
        self._n_rows += len(places)

    def record(self, **info: Any) -> RoutingRecord:
        """What was collected so far; `info` goes into the record."""
        arrays = dict(self._sums)
        n_groups = len(self.groups)
        for number, layer in enumerate(self.layers):  # before the first pass
            arrays.setdefault(f"{number}/counts", np.zeros((n_groups, layer.n_experts), dtype=np.int64))
            arrays.setdefault(f"{number}/weights", np.zeros((n_groups, layer.n_experts)))
            arrays.setdefault(f"{number}/requested", np.zeros(layer.n_experts, dtype=np.int64))
        for name, parts in self._rows.items():
            arrays[name] = joined(*parts)
        share = self.share
        if self.per_batch is not None:
            share = self._n_rows / max(int(self._sums["tokens"].sum()), 1)
        said = {"share_of_tokens": share, **info}
        return RoutingRecord(self.layers, self.groups, self.source, arrays, said)


def _group_of(plan: RoutingPlan, group: Tensor, shape: tuple[int, int]) -> Tensor:
    """The group of each token of a plan, from those `[B * S]` of the first plan's tokens."""
    if plan.batch_shape == shape:
        return group
    rows, length = plan.batch_shape
    require(
        rows % shape[0] == 0, "plans", plan.batch_shape, f"must route the {shape[0]} texts of the first plan"
    )
    of_text = group.view(shape)[:, 0].repeat_interleave(rows // shape[0])
    return of_text[:, None].expand(rows, length).reshape(-1)


def _chosen(plan: RoutingPlan, places: Tensor, shape: tuple[int, int]) -> Choices:
    """The choices of the first plan's tokens in a plan, which may route their texts or something else."""
    if plan.batch_shape == shape:
        return choices_of(plan, places)
    if plan.batch_shape == (shape[0], 1):
        texts, of = (places // shape[1]).unique(return_inverse=True)
        one = choices_of(plan, texts)
        of = of.to(one.experts.device)
        return Choices(one.experts[of], one.weights[of], one.entropy[of], one.margin[of])
    unknown = torch.full((len(places),), torch.nan)
    experts = torch.empty(len(places), 0, dtype=torch.int16)
    return Choices(experts, torch.empty(len(places), 0), unknown, unknown)
