"""Causal self-attention with rotary positions and grouped keys and values.

Shape legend: B batch, S new tokens, L keys (held ones and new ones), H query heads, G key/value heads, N head
width.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor, nn

from moekit.kernels.attention import attention, rotary_attention_kernel
from moekit.layers.norm import RMSNorm
from moekit.layers.rotary import rotate


class KeyValueCache(Protocol):
    """What attention needs of a cache: the tokens it holds, and a place for more."""

    length: int

    def update(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Append keys and values `[B, G, S, N]` of a layer; all that is held so far `[B, G, L, N]`."""
        ...

    def advance(self, n_tokens: int) -> None:
        """Count tokens as held, once all layers have appended theirs."""
        ...


class Attention(nn.Module):
    """Multi-head attention on `[B, S, D]`.

    Args:
        qk_norm: RMSNorm of queries and keys: "none", by "head", or over all ("full").
        bias, out_bias: biases on the maps in, and on the map out.
        sinks: whether each head has a learned score for attending to nothing (GPT-OSS).
        window: tokens looked back, itself counted; None for all.
    """

    def __init__(
        self,
        d_model: int,
        n_heads: int,
        n_kv_heads: int,
        d_head: int,
        *,
        qk_norm: str = "none",
        bias: bool = False,
        out_bias: bool = False,
        sinks: bool = False,
        window: int | None = None,
        eps: float = 1e-6,
    ) -> None:
        super().__init__()
        self.n_heads, self.n_kv_heads, self.d_head = n_heads, n_kv_heads, d_head
        self.window = window
        self.qkv = nn.Linear(d_model, (n_heads + 2 * n_kv_heads) * d_head, bias=bias)
        self.out = nn.Linear(n_heads * d_head, d_model, bias=out_bias)
        self.sinks = nn.Parameter(torch.zeros(n_heads)) if sinks else None
        self.qk_norm = qk_norm
        if qk_norm != "none":
            per_head = qk_norm == "head"
            self.q_norm = RMSNorm(d_head if per_head else n_heads * d_head, eps)
            self.k_norm = RMSNorm(d_head if per_head else n_kv_heads * d_head, eps)

    def forward(
        self,
        x: Tensor,
        rotary: tuple[Tensor, Tensor],
        mask: Tensor | AttentionMask | None = None,
        cache: KeyValueCache | None = None,
        layer: int = 0,
    ) -> Tensor:
        """Attend.

        Args:
            x: `[B, S, D]`.
            rotary: cosines and sines `[S, N]`, or narrower where only a part of each head is rotated.
            mask: an `AttentionMask`, or `[B, 1, S, L]` bool, True where attention is allowed; None for plain
                causal attention.
            cache: held keys and values, to which the new ones are appended.
            layer: number of the layer in the cache.
        """
        widths = [self.n_heads * self.d_head, self.n_kv_heads * self.d_head, self.n_kv_heads * self.d_head]
        qkv = self.qkv(x)
        fused = self._fused(qkv, rotary, mask) if cache is None else None
        if fused is not None:
            return self.out(fused)
        q, k, v = qkv.split(widths, dim=-1)
        if self.qk_norm == "full":
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (part.unflatten(-1, (-1, self.d_head)).transpose(1, 2) for part in (q, k, v))
        if self.qk_norm == "head":
            q, k = self.q_norm(q), self.k_norm(k)
        cos, sin = rotary
        q, k = rotate(q, cos.to(q.dtype), sin.to(q.dtype)), rotate(k, cos.to(k.dtype), sin.to(k.dtype))
        if cache is not None:
            k, v = cache.update(layer, k, v)
        if self.n_kv_heads != self.n_heads:
            k, v = (part.repeat_interleave(self.n_heads // self.n_kv_heads, dim=1) for part in (k, v))
        allowed = dense_mask(mask, x.shape[1], k.shape[2], x.device, self.window)
        mixed = attention(q, k.to(q.dtype), v.to(q.dtype), allowed, sinks=self.sinks)
        return self.out(mixed.transpose(1, 2).flatten(2))

    def _fused(
        self, qkv: Tensor, rotary: tuple[Tensor, Tensor], mask: Tensor | AttentionMask | None
    ) -> Tensor | None:
        """Rotation and attention in one kernel, `[B, S, H N]`; None where there is none for this."""
        if self.qk_norm != "none" or self.sinks is not None or rotary[0].shape[-1] != self.d_head:
            return None
        if self.window is not None and self.window < qkv.shape[1]:
            return None
        kernel = rotary_attention_kernel(qkv, self.d_head)
        if kernel is None or isinstance(mask, Tensor) or (mask is not None and not mask.by_document):
            return None
        segment_ids = None if mask is None else mask.segment_ids
        mixed: Tensor = kernel.function(qkv, *rotary, self.n_heads, self.n_kv_heads, segment_ids)
        return mixed


@dataclass
class AttentionMask:
    """What `attention_mask` is made from, and the mask itself once a layer asks for it.

    A kernel that reads documents never needs the `[B, 1, S, L]` numbers. Arguments as in `attention_mask`; without
    `causal` a token sees the later ones too, there is no cache and no window.
    """

    batch: int
    new: int
    held: int
    device: torch.device
    segment_ids: Tensor | None = None
    token_mask: Tensor | None = None
    causal: bool = True
    _made: dict[int | None, Tensor | None] = field(default_factory=dict, repr=False)

    @property
    def by_document(self) -> bool:
        """Whether the rule is just this: each token sees itself and the earlier ones of its document."""
        return self.causal and self.held == 0 and self.token_mask is None

    def dense(self, window: int | None = None) -> Tensor | None:
        """`[B, 1, S, L]` bool, made once for each window, or None where causal says all."""
        if window not in self._made and not self.causal:
            self._made[window] = self._both_ways()
        if window not in self._made:
            self._made[window] = attention_mask(
                self.batch, self.new, self.held, self.device, self.segment_ids, self.token_mask, window
            )
        return self._made[window]

    def _both_ways(self) -> Tensor:
        """Every token of a document sees all of it; padding is seen by itself alone, so that no row is empty."""
        itself = torch.eye(self.new, dtype=torch.bool, device=self.device)
        allowed = torch.ones_like(itself)[None]
        if self.segment_ids is not None:
            allowed = allowed & (self.segment_ids[:, :, None] == self.segment_ids[:, None, :])
        if self.token_mask is not None:
            allowed = allowed & self.token_mask.bool()[:, None, :]
        return (allowed | itself)[:, None]


def attention_mask(
    batch: int,
    new: int,
    held: int,
    device: torch.device,
    segment_ids: Tensor | None = None,
    token_mask: Tensor | None = None,
    window: int | None = None,
) -> Tensor | None:
    """`[B, 1, S, L]` bool: causal, inside one document, never at padding; None where causal says all.

    `segment_ids` and `token_mask` `[B, L]` cover held and new tokens. With `window`, a query sees that many of the
    latest tokens, itself counted. Every query may attend to itself, padding too, so that no row is empty.
    """
    narrow = window is not None and window < held + new
    if segment_ids is None and token_mask is None and not narrow and (held == 0 or new == 1):
        return None
    position = torch.arange(held + new, device=device)
    allowed = position[None, :] <= position[held:, None]
    if narrow and window is not None:
        allowed = allowed & (position[None, :] > position[held:, None] - window)
    allowed = allowed[None].expand(batch, -1, -1)
    if segment_ids is not None:
        allowed = allowed & (segment_ids[:, held:, None] == segment_ids[:, None, :])
    if token_mask is not None:
        allowed = allowed & token_mask.bool()[:, None, :]
    itself = position[None, :] == position[held:, None]
    return (allowed | itself)[:, None]


def dense_mask(
    mask: Tensor | AttentionMask | None,
    new: int,
    n_keys: int,
    device: torch.device,
    window: int | None = None,
) -> Tensor | None:
    """`mask` as numbers `[B, 1, S, L]` bool, with a window where there is one; None where causal says all."""
    if isinstance(mask, AttentionMask):
        return mask.dense(window)
    if window is None or window >= n_keys:
        return mask
    near = attention_mask(1, new, n_keys - new, device, window=window)
    return near if mask is None or near is None else mask & near
