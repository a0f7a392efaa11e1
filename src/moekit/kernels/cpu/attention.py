"""Rotary causal self-attention of whole sequences: the CPU kernel of `attention.cpp` as a differentiable function.

Registered as the operation "rotary_attention". Shapes: B batch, S tokens, H query heads, G key/value heads, N head
width; qkv `[B, S, (H + 2G) N]` as one projection gives it, cosines and sines `[S, N]` (both halves alike),
segment_ids `[B, S]` or None, result `[B, S, H N]` bfloat16.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moekit.kernels.cpu.library import POINTER, SIZE, Library, at
from moekit.kernels.registry import register

_LIBRARY = Library(
    "attention",
    {
        "moekit_attention_forward": [SIZE] * 5 + [POINTER] * 6,
        "moekit_attention_backward": [SIZE] * 5 + [POINTER] * 8,
    },
)


def fits(d_head: int) -> str:
    """Why the kernel cannot compute heads of this width, or "" where it can."""
    return f"d_head must be a multiple of 32; got {d_head}" if d_head % 32 else ""


@register(
    "rotary_attention",
    "fused_cpu",
    priority=20,
    usable=_LIBRARY.usable("rotation, scores, softmax and values in cache-sized blocks", torch.bfloat16),
    fits=fits,
)
def rotary_attention_cpu(
    qkv: Tensor, cos: Tensor, sin: Tensor, n_heads: int, n_kv_heads: int, segment_ids: Tensor | None
) -> Tensor:
    """Each token attends to itself and to the earlier tokens of its document."""
    if segment_ids is not None:
        segment_ids = segment_ids.to(torch.int32).contiguous()
    half = cos.shape[-1] // 2
    tables = [table[:, :half].float().contiguous() for table in (cos, sin)]
    result: Tensor = _RotaryAttention.apply(qkv, *tables, n_heads, n_kv_heads, segment_ids)
    return result


class _RotaryAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        qkv: Tensor,
        cos: Tensor,
        sin: Tensor,
        n_heads: int,
        n_kv_heads: int,
        segment_ids: Tensor | None,
    ) -> Tensor:
        x = qkv.to(torch.bfloat16).contiguous()
        batch, length, width = x.shape
        d_head = width // (n_heads + 2 * n_kv_heads)
        ctx.sizes, ctx.dtype = (batch, length, n_heads, n_kv_heads, d_head), qkv.dtype
        out = torch.empty(batch, length, n_heads * d_head, dtype=torch.bfloat16)
        level = torch.empty(batch, n_heads, length) if ctx.needs_input_grad[0] else None
        _LIBRARY.moekit_attention_forward(*ctx.sizes, *map(at, (x, cos, sin, segment_ids, out, level)))
        ctx.save_for_backward(x, cos, sin, segment_ids, out, level)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors  # once: recomputed activations are handed out no second time
        d_out, d_qkv = gradient.to(torch.bfloat16).contiguous(), torch.empty_like(saved[0])
        _LIBRARY.moekit_attention_backward(*ctx.sizes, *map(at, (*saved, d_out, d_qkv)))
        return d_qkv.to(ctx.dtype), None, None, None, None, None
