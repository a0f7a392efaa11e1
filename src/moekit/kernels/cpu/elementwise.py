"""Residual sum with norm, and the gated activation: the CPU kernels of `elementwise.cpp` as differentiable functions.

Registered as the operations "add_rms_norm" and "swiglu".
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moekit.kernels.cpu.library import FLOAT, POINTER, SIZE, Library, at
from moekit.kernels.registry import register

_LIBRARY = Library(
    "elementwise",
    {
        "moekit_norm_forward": [SIZE] * 2 + [POINTER] * 3 + [FLOAT] + [POINTER] * 2 + [SIZE, POINTER],
        "moekit_norm_backward": [SIZE] * 2 + [POINTER] * 5 + [SIZE] + [POINTER] * 3,
        "moekit_swiglu_forward": [SIZE] * 2 + [POINTER] * 2,
        "moekit_swiglu_backward": [SIZE] * 2 + [POINTER] * 3,
    },
)


def norm_fits(width: int) -> str:
    """Why the norm cannot be computed over this width, or "" where it can."""
    return f"the width must be a multiple of 16; got {width}" if width % 16 else ""


@register(
    "add_rms_norm",
    "fused_cpu",
    priority=20,
    usable=_LIBRARY.usable("residual sum, norm and cast in one pass", torch.bfloat16),
    fits=norm_fits,
)
def add_rms_norm_cpu(
    x: Tensor, delta: Tensor | None, weight: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """x + delta in float32 (x itself where delta is None), and its norm in `dtype` (float32 or bfloat16)."""
    total, normed = _AddRMSNorm.apply(x, delta, weight, eps, dtype)
    return (x if delta is None else total), normed


class _AddRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, delta: Tensor | None, weight: Tensor, eps: float, dtype: torch.dtype
    ) -> tuple[Tensor | None, Tensor]:
        ctx.set_materialize_grads(False)
        x, scale = x.contiguous(), weight.float().contiguous()
        width = x.shape[-1]
        n_rows = x.numel() // max(width, 1)
        more = None if delta is None else delta.to(torch.bfloat16).contiguous()
        total = None if delta is None else torch.empty_like(x)
        normed, inverse = torch.empty(x.shape, dtype=dtype), torch.empty(n_rows)
        _LIBRARY.moekit_norm_forward(
            n_rows, width, at(x), at(more), at(scale), eps, at(total), at(normed),
            int(dtype == torch.float32), at(inverse),
        )  # fmt: skip
        ctx.save_for_backward(x if total is None else total, scale, inverse)
        ctx.types = None if delta is None else delta.dtype, weight.dtype, dtype
        return total, normed

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, d_total: Tensor | None, d_normed: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None]:
        x, scale, inverse = ctx.saved_tensors
        delta_type, weight_type, dtype = ctx.types
        if d_normed is None:
            return (
                d_total,
                None if delta_type is None or d_total is None else d_total.to(delta_type),
                None,
                None,
                None,
            )
        d_x = torch.empty_like(x)
        d_delta = None if delta_type is None else torch.empty(x.shape, dtype=torch.bfloat16)
        d_weight = torch.empty_like(scale)
        d_total = None if d_total is None else d_total.contiguous()
        d_normed = d_normed.contiguous()
        _LIBRARY.moekit_norm_backward(
            len(inverse), x.shape[-1], at(x), at(scale), at(inverse), at(d_total), at(d_normed),
            int(dtype == torch.float32), at(d_x), at(d_delta), at(d_weight),
        )  # fmt: skip
        return d_x, None if d_delta is None else d_delta.to(delta_type), d_weight.to(weight_type), None, None


def swiglu_fits(width: int) -> str:
    """Why a block of this width cannot be computed, or "" where it can."""
    return f"the width must be at least 16; got {width}" if width < 16 else ""


@register(
    "swiglu",
    "fused_cpu",
    priority=20,
    usable=_LIBRARY.usable("the activation and its gradient in one pass", torch.bfloat16),
    fits=swiglu_fits,
)
def swiglu_cpu(hidden: Tensor) -> Tensor:
    """silu(gate) * linear of `[..., 2F]`, gates first, `[..., F]` in bfloat16."""
    result: Tensor = _SwiGLU.apply(hidden)
    return result


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor) -> Tensor:
        x = hidden.contiguous()
        width = x.shape[-1] // 2
        out = torch.empty(*x.shape[:-1], width, dtype=torch.bfloat16)
        _LIBRARY.moekit_swiglu_forward(out.numel() // max(width, 1), width, at(x), at(out))
        ctx.save_for_backward(x)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        d_out, d_x = gradient.contiguous(), torch.empty_like(x)
        _LIBRARY.moekit_swiglu_backward(
            d_out.numel() // max(d_out.shape[-1], 1), d_out.shape[-1], at(x), at(d_out), at(d_x)
        )
        return d_x
