"""Experts merged: the members of a group become one, and whoever chose any of them gets its answer.

The router of a merged layer stays as it was (`moe.merged_into` says which expert computes for each of its choices), as
HC-SMoE and M-SMoE publish it: the K best of the old experts are chosen, each choice keeps its weight, and a token that
chose two members of a group gets the group's answer by the sum of both weights. Two equal experts therefore merge
without any change. No architecture of transformers has such a map; with `router="averaged"` each group has one row of
the router, the mean of its members' rows by how often they are chosen, which any format can hold and which routes
otherwise than before.

Shape legend: E experts, G groups, F width of an expert.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moekit.compress.budget import how_many, kept_experts, require_budget
from moekit.compress.calibration import Calibration, moe_at, observe, stacked_experts
from moekit.compress.reshaping import (
    expert_names,
    rebuilt,
    require_rows,
    router_names,
    sparse_layers,
    with_layers,
)
from moekit.compress.scores import ExpertUse
from moekit.compress.similarity import (
    LogitProducts,
    MeanAnswers,
    around_dominant,
    best_permutation,
    clusters,
    in_order,
)
from moekit.config.errors import ConfigError, require
from moekit.config.moe import MoEConfig
from moekit.kernels.expert_weights import ExpertWeights
from moekit.models.language_model import LanguageModel

METHODS = ("hc-smoe", "m-smoe")
ROUTERS = ("kept", "averaged")


@dataclass(frozen=True)
class Groups:
    """How the experts of one layer are merged.

    Attributes:
        labels: the group of each expert.
        weights: `[E]` by which members are averaged; a group whose weights are all 0 is averaged evenly.
        centres: the expert of each group that the neurons of the others are aligned with.
    """

    labels: list[int]
    weights: Tensor
    centres: list[int]

    @property
    def shares(self) -> Tensor:
        """`[G, E]` float64, each row the parts of a group's members, summing to 1."""
        one_hot = torch.nn.functional.one_hot(torch.tensor(self.labels)).double().t()
        weighted = one_hot * self.weights.double()
        empty = weighted.sum(1, keepdim=True) == 0
        weighted = torch.where(empty, one_hot, weighted)
        return weighted / weighted.sum(1, keepdim=True)


@dataclass(frozen=True)
class Merge:
    """Merge experts that do alike on calibration text, averaged by how often each is chosen.

    Attributes:
        method: "hc-smoe" (Chen et al. 2024, arXiv 2410.08589): average-linkage clusters of the experts' mean answers to
            all tokens, no alignment. "m-smoe" (Li et al. 2023, arXiv 2310.01334): the experts that are chosen most
            stay, the others join the one with the most similar router logits, neurons aligned by permutation first.
        keep, n_experts: share of the experts that are left, or their number in each layer.
        per_layer: "uniform", or with m-smoe "global", see `moekit.compress.budget.kept_experts`.
        layers: the sparse layers to merge, from 0; all where None. m-smoe leaves those without router logits.
        align: whether neurons are aligned first; as the method has it where None.
        router: "kept" or "averaged".
        seed: of the control's random groups.
    """

    method: str = "hc-smoe"
    keep: float | None = None
    n_experts: int | None = None
    per_layer: str = "uniform"
    layers: tuple[int, ...] | None = None
    align: bool | None = None
    router: str = "kept"
    seed: int = 0

    def __post_init__(self) -> None:
        require(self.method in METHODS, "method", self.method, f"must be one of {', '.join(METHODS)}")
        require(self.router in ROUTERS, "router", self.router, f"must be one of {', '.join(ROUTERS)}")
        require(self.per_layer == "uniform" or self.method == "m-smoe", "per_layer", self.per_layer,
                "must be uniform with hc-smoe: distances of different layers do not compare",
                "Use --method m-smoe")  # fmt: skip
        require_budget(self.keep, self.n_experts)

    @property
    def aligns(self) -> bool:
        return self.align if self.align is not None else self.method == "m-smoe"

    def apply(self, model: LanguageModel, calibration: Calibration) -> tuple[LanguageModel, dict[str, Any]]:
        """The smaller model, and what was done, JSON-ready."""
        layers = sparse_layers(model, self.layers)
        for layer in layers:
            self._check(model, layer)
        by = self._by_answers if self.method == "hc-smoe" else self._by_logits
        groups = by(model, layers, calibration)
        details = [
            {
                "layer": layer,
                "router": moe_at(model, layer).router.name,
                "experts_before": len(group.labels),
                "experts": len(group.centres),
                "merged_into": group.labels,
                "share_of_rows": group.weights.tolist(),
            }
            for layer, group in groups.items()
        ]
        left = [layer for layer in layers if layer not in groups]
        changed = merged(model, groups, align=self.aligns, router=self.router)
        return changed, {"layers": details, "layers_without_logits": left}

    def control(
        self, model: LanguageModel, calibration: Calibration, details: Mapping[str, Any]
    ) -> tuple[str, LanguageModel]:
        """Groups of the same sizes with members drawn at random, averaged in the same way."""
        generator = torch.Generator().manual_seed(self.seed + 1)
        random = {}
        for entry in details["layers"]:
            order = torch.randperm(entry["experts_before"], generator=generator).tolist()
            labels = in_order([entry["merged_into"][expert] for expert in order])
            weights = torch.tensor(entry["share_of_rows"], dtype=torch.float64)
            random[entry["layer"]] = Groups(labels, weights, _most_chosen(labels, weights))
        return "random groups", merged(model, random, align=self.aligns, router=self.router)

    def _check(self, model: LanguageModel, layer: int) -> None:
        moe = moe_at(model, layer)
        require(not moe.config.families, f"families of layer {layer}", True,
                "must be false to merge: a token takes one expert of each family, and groups would cut across them",
                "Make the model smaller with: moekit compress prune")  # fmt: skip
        how_many(moe.config.n_experts, 1, self.keep, self.n_experts)  # before the text is read
        require(not stacked_experts(moe).quantized, f"quantization of layer {layer}", moe.config.quantization,
                "must be null to merge: codes cannot be averaged", "Merge first, then quantise")  # fmt: skip
        require(
            moe.router.name != "soft", f"router of layer {layer}", "soft", "must be one that chooses experts"
        )
        if self.router == "averaged":
            require_rows(model, layer)
            require(router_names(model, layer), f"router of layer {layer}", moe.router.name,
                    "must have a row for each expert to average", "Use --router kept")  # fmt: skip

    def _by_answers(
        self, model: LanguageModel, layers: Sequence[int], calibration: Calibration
    ) -> dict[int, Groups]:
        seen = {}
        for layer in layers:
            moe = moe_at(model, layer)
            use = ExpertUse(moe.config.n_experts)
            with torch.no_grad():
                seen[layer] = MeanAnswers(stacked_experts(moe).tensors(torch.float32), use)
        observe(model, calibration.batches(), seen)
        groups = {}
        for layer, answers in seen.items():
            n = how_many(answers.use.n_experts, 1, self.keep, self.n_experts)
            labels, weights = clusters(answers.means(), n), answers.use.frequency()
            groups[layer] = Groups(labels, weights, _most_chosen(labels, weights))
        return groups

    def _by_logits(
        self, model: LanguageModel, layers: Sequence[int], calibration: Calibration
    ) -> dict[int, Groups]:
        seen = {}
        for layer in layers:
            config = moe_at(model, layer).config
            require(config.merged_into is None, f"merged_into of layer {layer}", "a map",
                    "must be null for m-smoe, which compares the logits of experts",
                    "Use --method hc-smoe")  # fmt: skip
            seen[layer] = LogitProducts(ExpertUse(config.n_experts))
        observe(model, calibration.batches(), seen)
        with_logits = {layer: of for layer, of in seen.items() if of.products is not None}
        if not with_logits:
            raise ConfigError("m-smoe groups experts by their router logits, and no layer's router has any")
        frequencies = {layer: of.use.frequency() for layer, of in with_logits.items()}
        dominant = kept_experts(
            frequencies,
            dict.fromkeys(frequencies, 1),
            keep=self.keep,
            n_experts=self.n_experts,
            per_layer=self.per_layer,
        )
        return {
            layer: Groups(around_dominant(of.cosines(), dominant[layer]), frequencies[layer], dominant[layer])
            for layer, of in with_logits.items()
        }


def merged(
    model: LanguageModel, groups: Mapping[int, Groups], *, align: bool = False, router: str = "kept"
) -> LanguageModel:
    """The model with the experts of some layers merged; `model` stays as it is."""
    configs: dict[int, MoEConfig] = {}
    changed: dict[str, Any] = {}
    for layer, group in groups.items():
        moe = moe_at(model, layer)
        for name in expert_names(model, layer):
            changed[name] = _Average(group.shares)
        if align:
            weights = stacked_experts(moe).tensors(torch.float32)
            orders = [
                aligned(weights, group.centres[label], expert) for expert, label in enumerate(group.labels)
            ]
            for name in expert_names(model, layer):
                changed[name] = _Average(
                    group.shares, orders, name.rpartition(".")[2], weights.activation.gated
                )
        before = moe.config.merged_into or range(moe.config.n_experts)
        into: Any = tuple(group.labels[expert] for expert in before)
        if router == "averaged":
            into = None
            _average_router(model, layer, group, changed)
        configs[layer] = moe.config.replace(n_experts=len(group.centres), merged_into=into)
    return rebuilt(model, with_layers(model.config, configs), changed)


@torch.no_grad()
def aligned(weights: ExpertWeights, centre: int, expert: int) -> Tensor:
    """`[F]` the order of an expert's hidden values in which they are most like those of `centre`.

    The order that makes the sum of inner products largest, over all that a hidden value is made by and says: its rows
    of the first map, its bias, its column of the second map (weight matching, Ainsworth et al. 2022, arXiv 2209.04836).
    Errors: `MissingExtraError` without scipy.
    """
    n_hidden = weights.sizes[1]
    if expert == centre:
        return torch.arange(n_hidden)
    w_in, w_out = weights.tensors()
    gains = torch.zeros(n_hidden, n_hidden, dtype=torch.float64)
    for start in range(0, w_in.shape[1], n_hidden):  # gates, then linear parts
        part = slice(start, start + n_hidden)
        gains += w_in[centre, part].double() @ w_in[expert, part].double().t()
        if weights.b_in is not None:
            gains += weights.b_in[centre, part].double()[:, None] * weights.b_in[expert, part].double()
    gains += w_out[centre].double().t() @ w_out[expert].double()
    return best_permutation(gains)


@dataclass(frozen=True)
class _Average:
    """Averages one tensor of a layer's experts by group, the hidden values in given orders first."""

    shares: Tensor
    orders: list[Tensor] | None = None
    part: str = ""
    gated: bool = False

    def __call__(self, tensor: Tensor) -> Tensor:
        experts = tensor
        if self.orders is not None and self.part != "b_out":
            experts = torch.stack(
                [self._ordered(e, order) for e, order in zip(tensor, self.orders, strict=True)]
            )
        mean = torch.tensordot(self.shares, experts.double(), dims=1)
        return mean.to(tensor.dtype)

    def _ordered(self, expert: Tensor, order: Tensor) -> Tensor:
        if self.part == "w_out":
            return expert[:, order]
        rows = torch.cat([order, order + len(order)]) if self.gated else order
        return expert[rows]


def _average_router(model: LanguageModel, layer: int, group: Groups, changed: dict[str, Any]) -> None:
    config = moe_at(model, layer).config
    require(config.merged_into is None, f"merged_into of layer {layer}", "a map",
            "must be null to average rows of the router", "Use --router kept")  # fmt: skip
    require(len(group.centres) >= config.top_k, "n_experts", len(group.centres),
            f"must be at least top_k ({config.top_k}) with --router averaged")  # fmt: skip
    nulls = torch.eye(config.null_experts.total, dtype=torch.float64)
    shares = torch.block_diag(group.shares, nulls)
    for name in router_names(model, layer):
        changed[name] = _Average(shares)


def _most_chosen(labels: Sequence[int], weights: Tensor) -> list[int]:
    """The expert of each group with the largest weight, the lowest number at a tie."""
    return [
        max((e for e, label in enumerate(labels) if label == group), key=lambda e: (float(weights[e]), -e))
        for group in range(max(labels) + 1)
    ]
