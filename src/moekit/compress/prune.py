"""Experts taken away: their weights, and their rows of the router."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moekit.compress.budget import PER_LAYER, families_first, how_many, kept_experts, require_budget
from moekit.compress.calibration import Calibration, moe_at
from moekit.compress.reshaping import (
    expert_names,
    rebuilt,
    require_rows,
    router_names,
    sparse_layers,
    with_layers,
)
from moekit.compress.scores import METHODS, expert_use, scores_of
from moekit.config.errors import require
from moekit.config.moe import MoEConfig
from moekit.models.language_model import LanguageModel


@dataclass(frozen=True)
class Prune:
    """Keep the experts that are worth most on calibration text.

    Attributes:
        method: "frequency" (share of the routed rows), "reap" (router-weighted activation norm) or "random".
        keep, n_experts: share of the experts that stays, or their number in each layer.
        per_layer: "uniform" or "global", see `moekit.compress.budget.kept_experts`.
        layers: the sparse layers to prune, from 0; all where None.
        seed: of random scores.
    """

    method: str = "reap"
    keep: float | None = None
    n_experts: int | None = None
    per_layer: str = "uniform"
    layers: tuple[int, ...] | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        require(self.method in METHODS, "method", self.method, f"must be one of {', '.join(METHODS)}")
        require(
            self.per_layer in PER_LAYER, "per_layer", self.per_layer, f"must be one of {', '.join(PER_LAYER)}"
        )
        require_budget(self.keep, self.n_experts)

    def apply(self, model: LanguageModel, calibration: Calibration) -> tuple[LanguageModel, dict[str, Any]]:
        """The smaller model, and what was done, JSON-ready."""
        layers = sparse_layers(model, self.layers)
        for layer in layers:
            require_rows(model, layer)
        configs = {layer: moe_at(model, layer).config for layer in layers}
        floors = {layer: min(moe.top_k, moe.n_experts) for layer, moe in configs.items()}
        for layer, moe in configs.items():  # before the text is read
            how_many(moe.n_experts, floors[layer], self.keep, self.n_experts)
        uses = expert_use(model, layers, calibration)
        scores = scores_of(uses, self.method, self.seed)
        families = {layer: _families(model, layer) for layer in layers if configs[layer].families}
        kept = kept_experts(
            scores, floors, keep=self.keep, n_experts=self.n_experts, per_layer=self.per_layer,
            families=families,
        )  # fmt: skip
        details = [
            {
                "layer": layer,
                "router": moe_at(model, layer).router.name,
                "experts_before": len(scores[layer]),
                "experts": len(kept[layer]),
                "kept": kept[layer],
                "share_of_rows_kept": float(uses[layer].frequency()[kept[layer]].sum()),
                "scores": scores[layer].tolist(),
            }
            for layer in layers
        ]
        return pruned(model, kept), {"layers": details}

    def control(
        self, model: LanguageModel, calibration: Calibration, details: Mapping[str, Any]
    ) -> tuple[str, LanguageModel]:
        """As many experts of each layer, drawn at random."""
        generator = torch.Generator().manual_seed(self.seed + 1)
        kept = {}
        for entry in details["layers"]:
            layer, order = (
                entry["layer"],
                torch.randperm(entry["experts_before"], generator=generator).tolist(),
            )
            config = moe_at(model, layer).config
            if config.families:
                order = families_first(order, _families(model, layer), config.top_k)
            kept[layer] = sorted(order[: entry["experts"]])
        return "random experts", pruned(model, kept)


def pruned(model: LanguageModel, kept: Mapping[int, Sequence[int]]) -> LanguageModel:
    """The model with only these experts in some layers, ascending; `model` stays as it is.

    A hash router hashes by the numbers that its experts had, so that a token id which chose none of the lost ones keeps
    its experts, and the others go to the next of their ranking.
    """
    configs, changed = {}, {}
    for layer, experts in kept.items():
        config = moe_at(model, layer).config
        choices = _choices(config, experts)
        configs[layer] = _config(config, experts, choices)
        nulls = range(config.n_choices - config.null_experts.total, config.n_choices)
        for name in expert_names(model, layer):
            changed[name] = _picker(experts)
        for name in router_names(model, layer):
            changed[name] = _picker([*choices, *nulls])
        if config.families:
            name = f"backbone.layers.{layer}.feed_forward.router.family"
            changed[name] = _renumbered(choices)
    return rebuilt(model, with_layers(model.config, configs), changed)


def _families(model: LanguageModel, layer: int) -> list[int]:
    family = moe_at(model, layer).router.family
    assert family is not None
    return [int(number) for number in family.tolist()]


def _renumbered(choices: Sequence[int]) -> Callable[[Tensor], Tensor]:
    """The families of these experts, with numbers below that of the experts as a router needs them."""
    return lambda family: family[torch.tensor(choices)].unique(return_inverse=True)[1]


def _choices(config: MoEConfig, experts: Sequence[int]) -> list[int]:
    """What the router may still choose, in the numbers of before."""
    if config.merged_into is None:
        return list(experts)
    return [choice for choice, expert in enumerate(config.merged_into) if expert in experts]


def _config(config: MoEConfig, experts: Sequence[int], choices: Sequence[int]) -> MoEConfig:
    changes: dict[str, Any] = {"n_experts": len(experts)}
    if config.merged_into is not None:
        changes["merged_into"] = tuple(experts.index(config.merged_into[choice]) for choice in choices)
    if config.router.name == "hash":
        before = config.router.options.get("experts") or range(config.n_choices)
        numbers = [before[choice] for choice in choices]
        if config.null_experts.total:
            numbers += list(before)[-config.null_experts.total :]
        changes["router"] = {"name": "hash", "options": {**config.router.options, "experts": numbers}}
    return config.replace(**changes)


def _picker(rows: Sequence[int]) -> Any:
    def pick(tensor: Tensor) -> Tensor:
        return tensor.index_select(0, torch.tensor(list(rows), device=tensor.device))

    return pick
