"""Causal self-attention with rotary positions and grouped keys and values.

Shape legend: B batch, S new tokens, L keys (held ones and new ones), H query heads, G key/value heads, N head
width.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from moekit.kernels.attention import attention, rotary_attention_kernel
from moekit.layers.norm import RMSNorm


class KeyValueCache(Protocol):
    """What attention needs of a cache: the tokens it holds, and a place for more."""

    length: int

    def update(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Append keys and values `[B, G, S, N]` of a layer; all that is held so far `[B, G, L, N]`."""
        ...

    def advance(self, n_tokens: int) -> None:
        """Count tokens as held, once all layers have appended theirs."""
        ...


class RotaryEmbedding(nn.Module):
    """Rotary position embedding (Su et al. 2021, arXiv 2104.09864), halves rotated as in Llama."""

    def __init__(self, d_head: int, max_seq_len: int, theta: float) -> None:
        super().__init__()
        self.d_head, self.theta = d_head, theta
        # no buffers: a model built on the meta device and filled later would hold tables of garbage
        self.cos, self.sin = self._tables(max_seq_len, torch.device("cpu"))

    @torch.inference_mode(False)  # tables made in an evaluation must serve training too
    def _tables(self, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
        # computed on the CPU whatever the default device: other devices have no float64, and meta no values
        steps = torch.arange(0, self.d_head, 2, dtype=torch.float64, device="cpu")
        positions = torch.arange(length, dtype=torch.float64, device="cpu")
        angles = positions[:, None] * self.theta ** (-steps / self.d_head)
        return angles.cos().float().repeat(1, 2).to(device), angles.sin().float().repeat(1, 2).to(device)

    def forward(self, start: int, length: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines `[S, N]` of positions start..start+length-1, in the type of `like`."""
        held = self.cos.shape[0]
        if held < start + length:
            self.cos, self.sin = self._tables(2 * (start + length), like.device)
        elif self.cos.device != like.device:
            self.cos, self.sin = self._tables(held, like.device)
        part = slice(start, start + length)
        return self.cos[part].to(like.dtype), self.sin[part].to(like.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate `[..., S, N]` by position."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


class Attention(nn.Module):
    """Multi-head attention on `[B, S, D]`; `qk_norm` normalises queries and keys, by head or over all."""

    def __init__(
        self,
        d_model: int,
        n_heads: int,
        n_kv_heads: int,
        d_head: int,
        *,
        qk_norm: str = "none",
        bias: bool = False,
        eps: float = 1e-6,
    ) -> None:
        super().__init__()
        self.n_heads, self.n_kv_heads, self.d_head = n_heads, n_kv_heads, d_head
        self.qkv = nn.Linear(d_model, (n_heads + 2 * n_kv_heads) * d_head, bias=bias)
        self.out = nn.Linear(n_heads * d_head, d_model, bias=False)
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
            rotary: cosines and sines `[S, N]`.
            mask: an `AttentionMask`, or `[B, 1, S, L]` bool, True where attention is allowed; None for plain
                causal attention.
            cache: held keys and values, to which the new ones are appended.
            layer: number of the layer in the cache.
        """
        widths = [self.n_heads * self.d_head, self.n_kv_heads * self.d_head, self.n_kv_heads * self.d_head]
        qkv = self.qkv(x)
        fused = self._fused(qkv, rotary, mask) if cache is None and self.qk_norm == "none" else None
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
        allowed = mask.dense if isinstance(mask, AttentionMask) else mask
        mixed = attention(q, k.to(q.dtype), v.to(q.dtype), allowed)
        return self.out(mixed.transpose(1, 2).flatten(2))

    def _fused(
        self, qkv: Tensor, rotary: tuple[Tensor, Tensor], mask: Tensor | AttentionMask | None
    ) -> Tensor | None:
        """Rotation and attention in one kernel, `[B, S, H N]`; None where there is none for this."""
        kernel = rotary_attention_kernel(qkv, self.d_head)
        if kernel is None or isinstance(mask, Tensor) or (mask is not None and not mask.by_document):
            return None
        segment_ids = None if mask is None else mask.segment_ids
        mixed: Tensor = kernel.function(qkv, *rotary, self.n_heads, self.n_kv_heads, segment_ids)
        return mixed


@dataclass
class AttentionMask:
    """What `attention_mask` is made from, and the mask itself once a layer asks for it.

    A kernel that reads documents never needs the `[B, 1, S, L]` numbers. Arguments as in `attention_mask`.
    """

    batch: int
    new: int
    held: int
    device: torch.device
    segment_ids: Tensor | None = None
    token_mask: Tensor | None = None

    @property
    def by_document(self) -> bool:
        """Whether the rule is just this: each token sees itself and the earlier ones of its document."""
        return self.held == 0 and self.token_mask is None

    @functools.cached_property
    def dense(self) -> Tensor | None:
        """`[B, 1, S, L]` bool, or None where causal says all."""
        return attention_mask(self.batch, self.new, self.held, self.device, self.segment_ids, self.token_mask)


def attention_mask(
    batch: int,
    new: int,
    held: int,
    device: torch.device,
    segment_ids: Tensor | None = None,
    token_mask: Tensor | None = None,
) -> Tensor | None:
    """`[B, 1, S, L]` bool: causal, inside one document, never at padding; None where causal says all.

    `segment_ids` and `token_mask` `[B, L]` cover held and new tokens. Every query may attend to itself,
    padding too, so that no row is empty.
    """
    if segment_ids is None and token_mask is None and (held == 0 or new == 1):
        return None
    position = torch.arange(held + new, device=device)
    allowed = position[None, :] <= position[held:, None]
    allowed = allowed[None].expand(batch, -1, -1)
    if segment_ids is not None:
        allowed = allowed & (segment_ids[:, held:, None] == segment_ids[:, None, :])
    if token_mask is not None:
        allowed = allowed & token_mask.bool()[:, None, :]
    itself = position[None, :] == position[held:, None]
    return (allowed | itself)[:, None]
