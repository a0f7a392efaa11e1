"""Cross-entropy over a vocabulary: the CPU kernel of `cross_entropy.cpp` as a differentiable function.

Registered as the operation "linear_cross_entropy"; shapes as in `moekit.kernels.cross_entropy`. Both gradients are
formed in the forward pass; that of float32 weights is never rounded to bfloat16.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moekit.kernels.cpu.library import FLOAT, POINTER, SIZE, Library, at
from moekit.kernels.registry import register

_LIBRARY = Library(
    "cross_entropy",
    {"moekit_cross_entropy": [SIZE] * 3 + [POINTER] * 3 + [FLOAT] + [POINTER] * 2 + [SIZE, POINTER]},
)


def fits(d_model: int) -> str:
    """Why the kernel cannot compute this width, or "" where it can."""
    return f"d_model must be a multiple of 32; got {d_model}" if d_model % 32 else ""


@register(
    "linear_cross_entropy",
    "fused_cpu",
    priority=20,
    usable=_LIBRARY.usable("logits, softmax and both gradients in cache-sized blocks", torch.bfloat16),
    fits=fits,
)
def linear_cross_entropy_cpu(
    hidden: Tensor, weight: Tensor, targets: Tensor, ignored: int
) -> tuple[Tensor, Tensor]:
    """Mean over the targets that count, and the losses `[N]` of all; only the mean carries a gradient."""
    mean, each = _LinearCrossEntropy.apply(hidden, weight, targets, ignored, torch.is_grad_enabled())
    return mean, each


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, ignored: int, with_gradient: bool
    ) -> tuple[Tensor, Tensor]:
        x, w = hidden.to(torch.bfloat16).contiguous(), weight.to(torch.bfloat16).contiguous()
        labels = targets.contiguous()
        outside = (labels != ignored) & ((labels < 0) | (labels >= w.shape[0]))
        if outside.any():
            raise IndexError(f"target {int(labels[outside][0])} is out of bounds for {w.shape[0]} entries")
        n_counted = max(int((labels != ignored).sum()), 1)
        losses = torch.empty(labels.shape, dtype=torch.float32)
        # needs_input_grad is True for a parameter under no_grad as well
        wants_hidden, wants_weight = (with_gradient and wanted for wanted in ctx.needs_input_grad[:2])
        kind = torch.bfloat16 if hidden.dtype == torch.bfloat16 else torch.float32
        d_hidden = torch.empty(x.shape, dtype=kind) if wants_hidden else None
        d_weight = torch.empty(w.shape, dtype=torch.float32) if wants_weight else None
        _LIBRARY.moekit_cross_entropy(
            *x.shape, w.shape[0], at(x), at(w), at(labels), 1 / n_counted,
            at(losses), at(d_hidden), int(kind == torch.float32), at(d_weight),
        )  # fmt: skip
        ctx.save_for_backward(d_hidden, d_weight)
        ctx.types = hidden.dtype, weight.dtype
        ctx.mark_non_differentiable(losses)
        return losses.sum() / n_counted, losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        factor = float(scale)
        gradients = (
            None if part is None else (part if factor == 1.0 else part * factor).to(kind)
            for part, kind in zip(ctx.saved_tensors, ctx.types, strict=True)
        )
        return *gradients, None, None, None
