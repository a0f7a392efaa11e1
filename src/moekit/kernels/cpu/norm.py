"""Root-mean-square norm of bfloat16 rows in one pass: the CPU kernel of `norm.cpp`, for inference.

Registered as the operation "rms_norm". Shape legend: D width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moekit.config.errors import require
from moekit.kernels.cpu.library import FLOAT, POINTER, SIZE, Library
from moekit.kernels.registry import register

_LIBRARY = Library(
    "norm", {"moekit_rms_norm": [POINTER] * 2 + [SIZE] + [POINTER] + [SIZE] * 2 + [FLOAT] * 2 + [SIZE]}
)


def fits(x: Tensor, weight: Tensor) -> str:
    """Why the kernel cannot compute this norm, or "" where it can.

    >>> fits(torch.empty(2, 24, dtype=torch.bfloat16), torch.ones(24))
    'the width must be a multiple of 16; got 24'
    """
    if x.dtype is not torch.bfloat16 or not x.is_cpu:
        return f"x must be bfloat16 on the CPU; got {x.dtype} on {x.device}"
    width = x.shape[-1] if x.ndim else 0
    if width % 16 or not width:
        return f"the width must be a multiple of 16; got {width}"
    if weight.dtype not in (torch.bfloat16, torch.float32) or not weight.is_cpu:
        return f"the weight must be bfloat16 or float32 on the CPU; got {weight.dtype} on {weight.device}"
    if weight.shape != (width,) or not weight.is_contiguous():
        return f"the weight must be contiguous [{width}]; got {list(weight.shape)}"
    return ""


@register(
    "rms_norm",
    "one_pass_cpu",
    priority=20,
    usable=_LIBRARY.usable("norms of inference in one pass", torch.bfloat16),
    fits=fits,
)
def rms_norm_cpu(x: Tensor, weight: Tensor, eps: float, offset: float = 0.0, early: bool = False) -> Tensor:
    """x (mean(x^2) + eps)^-1/2 (offset + weight), computed in float32.

    Args:
        x: `[..., D]` bfloat16.
        weight: `[D]` bfloat16 or float32.
        eps: added to the mean square.
        offset: 1 where the weight is kept as its distance from 1 (Gemma).
        early: round to bfloat16 before the weight as well as after it (Llama in transformers).

    Returns:
        `[..., D]` bfloat16.

    Errors: `ConfigError` for what `fits` refuses.

    >>> rms_norm_cpu(torch.full((1, 16), 3.0).bfloat16(), torch.ones(16), 0.0)[0, 0]
    tensor(1., dtype=torch.bfloat16)
    """
    reason = fits(x, weight)
    require(not reason, "rms_norm", reason, "must fit the kernel", "Use torch.nn.functional.rms_norm")
    x = x.contiguous()
    y, width = torch.empty_like(x), x.shape[-1]
    _LIBRARY.moekit_rms_norm(
        x.data_ptr(), weight.data_ptr(), weight.dtype is torch.float32, y.data_ptr(), x.numel() // width, width,
        eps, offset, early,
    )  # fmt: skip
    return y
