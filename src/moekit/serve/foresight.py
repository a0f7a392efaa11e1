"""Foreseeing experts: the next sparse layer's router reads the hidden state that this layer's experts get.

    tokens of layer l, normed ─► as the norm of layer l + 1 would give them ─► router of l + 1 ─► its probable experts

Between the two stand this layer's experts and the next layer's attention, which change the residual stream little, so
that most choices come out the same (Eliseev and Mazur 2023, arXiv 2312.17238). The first sparse layer is foreseen from
the stream before the layers, which for the next token is known as soon as the token is. Routers that read token ids
alone are foreseen exactly. What is foreseen only moves reads: answers do not depend on it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from moekit.layers.moe import MoE
from moekit.layers.norm import RMSNorm
from moekit.models.backbone import Backbone, BackboneLayer
from moekit.serve.expert_store import ExpertKey, ExpertStore, LayerPlaces

_READ = ("token_ids", "token_mask", "segment_ids", "elastic")  # what a router may know beside the vectors
_SMALL = 1e-6  # a norm's weight below this says nothing of what it scaled


class Foresight:
    """Tells the places of each sparse layer what the next one will probably need.

    Args:
        backbone: with `StoredMLP`s.
        places: of each sparse layer, the first one first; None for one whose experts are all in memory.
        store: told of the first layer.

    `close` takes the hooks off the model again.
    """

    def __init__(self, backbone: Backbone, places: Sequence[LayerPlaces | None], store: ExpertStore) -> None:
        self._store = store
        layers: list[Any] = [layer for layer in backbone.layers if isinstance(layer.feed_forward, MoE)]
        self._hooks = []
        for here, there, own, next_places in zip(layers, layers[1:], places, places[1:], strict=False):
            if own is not None and next_places is not None:
                hook = _NextLayer(here, there, own, next_places)
                self._hooks.append(here.feed_forward.register_forward_pre_hook(hook, with_kwargs=True))
        if places and places[0] is not None:
            first = _FirstLayer(layers[0], places[0], store)
            self._hooks.append(backbone.register_forward_pre_hook(first, with_kwargs=True))

    def close(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()


class _NextLayer:
    """Hook of a sparse layer: its tokens through the next one's norm and router."""

    def __init__(
        self, here: BackboneLayer, there: BackboneLayer, own: LayerPlaces, places: LayerPlaces
    ) -> None:
        assert isinstance(there.feed_forward, MoE)
        self._router, self._own, self._places = there.feed_forward, own, places
        self._scale = _scale_between(here.feed_forward_norm, there.feed_forward_norm)

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if torch.is_grad_enabled():
            return  # the experts will say that they give no gradient
        if not self._own.store.reads_ahead:
            self._own.expected = ()
            return
        tokens = args[0] if args else kwargs["hidden_states"]
        tokens = tokens if self._scale is None else tokens * self._scale.to(tokens.dtype)
        self._own.expected = _probable(self._router, tokens, kwargs, self._places)


class _FirstLayer:
    """Hook of the backbone: the stream before the layers through the first sparse layer's norm and router."""

    def __init__(self, first: BackboneLayer, places: LayerPlaces, store: ExpertStore) -> None:
        assert isinstance(first.feed_forward, MoE)
        self._norm, self._router = first.feed_forward_norm, first.feed_forward
        self._places, self._store = places, store

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if torch.is_grad_enabled() or not self._store.reads_ahead:
            return
        x = args[0] if args else kwargs["x"]
        self._store.foresee(_probable(self._router, self._norm(x), kwargs, self._places))


def _probable(layer: MoE, tokens: Tensor, kwargs: dict[str, Any], places: LayerPlaces) -> list[ExpertKey]:
    """The experts that a layer would choose for these tokens, the most chosen first."""
    counts = layer.computing(tokens, **{name: kwargs.get(name) for name in _READ})[: places.n_experts]
    order = counts.argsort(descending=True, stable=True).tolist()
    chosen = order[: int(counts.count_nonzero())]
    if len(chosen) > places.shelf.at_once:  # more than fit come in parts, the lowest first
        chosen = sorted(chosen)[: places.shelf.at_once]
    return [(places.layer, expert) for expert in chosen]


def _scale_between(here: RMSNorm, there: RMSNorm) -> Tensor | None:
    """What makes of one norm's answer the other's, up to their eps; None where they are equal."""
    ours, theirs = here.weight.detach(), there.weight.detach()
    if torch.equal(ours, theirs):
        return None
    return torch.where(ours.abs() < _SMALL, 0.0, theirs / ours)
