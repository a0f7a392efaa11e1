"""Attention of a decoder's tokens to what an encoder made of its input.

Shape legend: B batch, S tokens of the decoder, M tokens of the memory, D width, H query heads, G key/value heads, N
head width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from moekit.kernels.attention import attention
from moekit.layers.rotary import rotate

Rotary = tuple[Tensor, Tensor]


@dataclass
class Memory:
    """What a decoder looks at beside its own tokens.

    Attributes: x `[B, M, D]`; mask `[B, M]` False at padding, or None; held: keys and values of each layer, kept from
        the first token that is generated to the last one; None where they are computed anew (training); rotary: cosines
        and sines `[M, N]` of the places, or None.
    """

    x: Tensor
    mask: Tensor | None = None
    held: dict[int, tuple[Tensor, Tensor]] | None = None
    rotary: Rotary | None = None

    def keep_rows(self, rows: Tensor) -> None:
        """Go on with these rows of the batch, in that order; a row may be taken more than once."""
        self.x = self.x[rows]
        self.mask = None if self.mask is None else self.mask[rows]
        if self.held is not None:
            self.held = {layer: (keys[rows], values[rows]) for layer, (keys, values) in self.held.items()}


class CrossAttention(nn.Module):
    """Queries from the decoder, keys and values from the memory (Vaswani et al. 2017, arXiv 1706.03762, section 3.2.3).

    Both sides are rotated by their places where these are given: what stands at about the same place in both is then
    easy to find, as most of a translation does. A row of the memory that is all padding is looked at as a whole, so
    that no answer is NaN.

    >>> layer = CrossAttention(8, n_heads=2, n_kv_heads=2, d_head=4)
    >>> mask = torch.tensor([[True, True, False]])
    >>> layer(torch.randn(1, 5, 8), Memory(torch.randn(1, 3, 8), mask)).shape
    torch.Size([1, 5, 8])
    """

    def __init__(
        self,
        d_model: int,
        n_heads: int,
        n_kv_heads: int,
        d_head: int,
        *,
        bias: bool = False,
        out_bias: bool = False,
    ) -> None:
        super().__init__()
        self.n_heads, self.n_kv_heads, self.d_head = n_heads, n_kv_heads, d_head
        self.q = nn.Linear(d_model, n_heads * d_head, bias=bias)
        self.kv = nn.Linear(d_model, 2 * n_kv_heads * d_head, bias=bias)
        self.out = nn.Linear(n_heads * d_head, d_model, bias=out_bias)

    def forward(self, x: Tensor, memory: Memory, rotary: Rotary | None = None, layer: int = 0) -> Tensor:
        """Attend.

        Args:
            x: `[B, S, D]`.
            memory: what is looked at.
            rotary: cosines and sines `[S, N]` of the tokens' places; the memory brings its own.
            layer: number under which the memory holds keys and values.
        """
        q = _rotated(self.q(x).unflatten(-1, (-1, self.d_head)).transpose(1, 2), rotary)
        if memory.held is None:
            keys, values = self._keys_and_values(memory)
        else:
            if layer not in memory.held:
                memory.held[layer] = self._keys_and_values(memory)
            keys, values = memory.held[layer]
        mixed = attention(q, keys.to(q.dtype), values.to(q.dtype), _seen(memory))
        return self.out(mixed.transpose(1, 2).flatten(2))

    def _keys_and_values(self, memory: Memory) -> tuple[Tensor, Tensor]:
        """`[B, H, M, N]` each."""
        both = self.kv(memory.x).unflatten(-1, (-1, self.d_head)).transpose(1, 2).chunk(2, dim=1)
        group = self.n_heads // self.n_kv_heads
        keys, values = (part if group == 1 else part.repeat_interleave(group, dim=1) for part in both)
        return _rotated(keys, memory.rotary), values


def _rotated(x: Tensor, rotary: Rotary | None) -> Tensor:
    return x if rotary is None else rotate(x, rotary[0].to(x.dtype), rotary[1].to(x.dtype))


def _seen(memory: Memory) -> Tensor:
    """`[B, 1, 1, M]` bool, or `[1, 1, 1, M]`: attention without a mask would be causal."""
    if memory.mask is None:
        return torch.ones(1, 1, 1, memory.x.shape[1], dtype=torch.bool, device=memory.x.device)
    return (memory.mask | ~memory.mask.any(dim=1, keepdim=True))[:, None, None, :]
