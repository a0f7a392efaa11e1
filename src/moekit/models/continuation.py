"""A causal backbone run on: tokens behind those that it has read, one after the other.

Shape legend: B examples, S tokens read before, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moekit.layers.cache import KVCache
from moekit.layers.elastic import Elastic
from moekit.models.backbone import Backbone


class Continuation:
    """What a causal backbone gives for tokens behind `x`.

    Examples of different lengths (a mask) cannot share a cache, and routers that read earlier tokens have none: then
    all tokens are read again for each new one.

    Args:
        backbone: causal.
        x: `[B, S, D]`, the vectors that stand before.
        mask: `[B, S]` False at padding, or None.
        room: tokens that will come.
        elastic: the routing of the call.
    """

    def __init__(
        self, backbone: Backbone, x: Tensor, mask: Tensor | None, room: int, elastic: Elastic | None = None
    ) -> None:
        self.backbone, self.x, self.mask, self.elastic = backbone, x, mask, elastic
        history = any(layer.router.reads_history for layer in backbone.moe_layers)
        self.cache: KVCache | None = None
        if mask is None and not history:
            self.cache = KVCache.for_config(
                backbone.config, len(x), x.shape[1] + room, dtype=x.dtype, device=x.device
            )

    def __call__(self, token: Tensor) -> Tensor:
        """`[B, 1, D]` after the last norm, for one further token `[B, 1, D]` of each example."""
        if self.cache is not None:
            new = token if self.cache.length else torch.cat([self.x, token], dim=1)
            return self.backbone(new, cache=self.cache, elastic=self.elastic).hidden_states[:, -1:]
        self.x = torch.cat([self.x, token], dim=1)
        if self.mask is not None:
            self.mask = torch.cat([self.mask, self.mask.new_ones(len(token), 1)], dim=1)
        return self.backbone(self.x, token_mask=self.mask, elastic=self.elastic).hidden_states[:, -1:]
