"""A sparse layer with other experts in its place: copies, fewer, or more, and the router's rows with them.

    sources [E']: which of the old experts each new one is ─► weights and router rows by that list
    families [E']: which experts came from one another    ─► a token takes one of a family alone
    signs [E']: +1, -1 or 0                               ─► router row + sign * perturbation

**When a copy leaves the model's answers as they were.** The two copies of a split expert share a family, so a token
that chose the expert chooses one of them, with all others as before: the same experts answer. Their rows are r + d and
r - d, so the logit of the chosen copy is l + |d.x|, and the weights move by that much alone: the task's loss is equal
as d goes to 0, for every k and each normalisation, and its change is of the order of |d|. Without families (plain
top-k) that would hold in two cases: k = 1 with weights normalised after the choice, or all experts doubled together
with k; otherwise both copies are chosen and push another expert out.

The load-balance loss counts copies as experts of their own: it is equal as far as each has half the use.

Dropping or overwriting an expert leaves the answers as they were exactly for tokens that did not choose it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moekit.config.errors import require
from moekit.layers.experts import StackedMLP
from moekit.layers.moe import MoE
from moekit.layers.routing import LearnedRouter
from moekit.models.language_model import LanguageModel

# what routers and stacked experts have for each expert, the first axis counting them
_ROWS = ("router.weight", "router.logit_bias", "router.expert_bias", "experts.w_in", "experts.w_out",
         "experts.b_in", "experts.b_out")  # fmt: skip


@dataclass(frozen=True)
class Reshape:
    """New experts of one layer, by the old ones; see the module.

    >>> Reshape.split([0, 1], [0, 1], [1])
    Reshape(sources=(0, 1, 1), families=(0, 1, 1), signs=(0, 1, -1))
    """

    sources: tuple[int, ...]
    families: tuple[int, ...]
    signs: tuple[int, ...]

    @classmethod
    def split(cls, experts: Sequence[int], families: Sequence[int], chosen: Sequence[int]) -> Reshape:
        """A copy of each of `chosen` behind all others."""
        signs = [1 if expert in chosen else 0 for expert in experts]
        return cls(
            (*experts, *chosen),
            _numbered([*families, *(families[expert] for expert in chosen)]),
            (*signs, *(-1 for _ in chosen)),
        )

    @classmethod
    def revive(cls, families: Sequence[int], dead: int, source: int) -> Reshape:
        """Expert `dead` becomes a copy of `source`."""
        n = len(families)
        sources, kin, signs = list(range(n)), list(families), [0] * n
        sources[dead], kin[dead], signs[dead], signs[source] = source, families[source], -1, 1
        return cls(tuple(sources), _numbered(kin), tuple(signs))

    @classmethod
    def keep(cls, families: Sequence[int], kept: Sequence[int]) -> Reshape:
        """Only these experts."""
        return cls(tuple(kept), _numbered([families[expert] for expert in kept]), (0,) * len(kept))


def _numbered(families: Sequence[int]) -> tuple[int, ...]:
    """The same families with numbers from 0, in the order in which they appear."""
    names: dict[int, int] = {}
    return tuple(names.setdefault(family, len(names)) for family in families)


def reshape_layer(
    model: LanguageModel, layer: int, reshape: Reshape, perturbation: float = 0.0, seed: Sequence[int] = (0,)
) -> dict[str, Callable[[Tensor], Tensor]]:
    """Put other experts into a sparse layer of `model`, in place.

    Args:
        model: a decoder; its configuration changes with it.
        layer: number of the layer, from 0.
        reshape: which experts.
        perturbation: length of d over that of the router row that it is added to and taken from.
        seed: numbers from which the direction of d is drawn, another one for each copy: the copies of a copy would
            else meet on one row. It stands at right angles to the row: tokens choose the expert because they lie along
            its row, and a part along it would send all of them to one copy.

    Returns by the full name of each changed parameter what makes the optimizer's moments of the new one from the old
    one's. The parameters themselves are new, so an optimizer must be built anew.

    Errors: `ConfigError` where the layer cannot be reshaped, or would have fewer families than `top_k`.
    """
    block: Any = model.backbone.layers[layer]
    old: MoE = block.feed_forward
    require(isinstance(old, MoE) and old.config.families, "model.moe.families", False,
            "must be true for experts that change in training", "Set model.moe.families: true")  # fmt: skip
    require(isinstance(old.router, LearnedRouter) and isinstance(old.experts, StackedMLP), f"router of layer {layer}",
            old.router.name, "must be softmax or sigmoid with stacked experts for experts that change")  # fmt: skip
    n_families = len(set(reshape.families))
    require(old.config.top_k <= n_families, "top_k", old.config.top_k,
            f"must be at most the families that stay ({n_families})")  # fmt: skip
    changes = {**model.config.moe_by_layer.get(layer, {}), "n_experts": len(reshape.sources)}
    model.config = model.config.replace(moe_by_layer={**model.config.moe_by_layer, layer: changes})
    config = model.config.moe_of(layer)
    assert config is not None
    with torch.random.fork_rng(devices=[]):  # the weights that are drawn here are overwritten
        new = MoE(old.d_model, config)
    weight: Any = old.router.weight
    new.to(weight.device).train(old.training)
    pick = torch.tensor(reshape.sources, device=weight.device)
    before, after = old.state_dict(keep_vars=True), new.state_dict(keep_vars=True)
    prefix = f"backbone.layers.{layer}.feed_forward."
    moments: dict[str, Callable[[Tensor], Tensor]] = {}
    with torch.no_grad():
        for name, tensor in after.items():
            if name == "router.family":
                tensor.copy_(torch.tensor(reshape.families))
            elif name in _ROWS:
                tensor.copy_(before[name][pick])
                moments[prefix + name] = lambda values: values[pick.to(values.device)]
            else:
                tensor.copy_(before[name])
        rows: Any = new.router.weight
        _part(rows, reshape, perturbation, seed)
    block.feed_forward = new
    model.backbone.config = model.config
    return moments


def _part(rows: Tensor, reshape: Reshape, perturbation: float, seed: Sequence[int]) -> None:
    """Add to and take from the rows of copies a random vector at right angles to them; one for each source."""
    for source in sorted({s for s, sign in zip(reshape.sources, reshape.signs, strict=True) if sign}):
        row = rows[reshape.sources.index(source)].clone()
        copied_to = next(n for n, s in enumerate(reshape.sources) if s == source and reshape.signs[n] < 0)
        drawn = torch.from_numpy(np.random.default_rng([*seed, copied_to]).standard_normal(len(row))).to(row)
        drawn -= row * (drawn @ row) / row.square().sum().clamp(min=1e-20)
        drawn *= perturbation * row.norm() / drawn.norm().clamp(min=1e-20)
        for place, (other, sign) in enumerate(zip(reshape.sources, reshape.signs, strict=True)):
            if other == source:
                rows[place] += sign * drawn


def shaped_like(model: LanguageModel, n_experts: Mapping[int, int]) -> None:
    """Give layers of `model` so many experts, in place, for weights that are loaded afterwards."""
    for layer, n in n_experts.items():
        moe = model.config.moe_of(layer)
        if moe is not None and moe.n_experts != n:
            sources = tuple(min(expert, moe.n_experts - 1) for expert in range(n))
            reshape_layer(model, layer, Reshape(sources, tuple(range(n)), (0,) * n))
