"""A linear map of few rows on a CPU (decoding): the weight is read once, at memory speed. For inference.

Registered as the operation "linear_decode". Shape legend: T rows, D width in, O width out.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moekit.config.errors import require
from moekit.kernels.cpu.library import POINTER, SIZE, Library
from moekit.kernels.registry import register

# rows up to which reading the weight is what takes time; beyond it torch's products do as well
FEW_ROWS = 8

_LIBRARY = Library(
    "linear",
    {"moekit_linear": [POINTER] * 4 + [SIZE] * 3},
    features=("avx512_f", "avx512_bw", "avx512_dq", "avx512_vl", "avx512_bf16"),
)


def fits(weight: Tensor, bias: Tensor | None) -> str:
    """Why the kernel cannot compute this map, or "" where it can.

    >>> fits(torch.empty(5, 48, dtype=torch.bfloat16), None)
    'the width in must be a multiple of 32; got 48'
    """
    if weight.ndim != 2 or weight.shape[1] % 32 or not weight.numel():
        return f"the width in must be a multiple of 32; got {weight.shape[-1]}"
    for name, part in (("weight", weight), ("bias", bias)):
        if part is not None and (
            part.dtype is not torch.bfloat16 or not part.is_cpu or not part.is_contiguous()
        ):
            return f"the {name} must be contiguous bfloat16 on the CPU; got {part.dtype} on {part.device}"
    if bias is not None and bias.shape != weight.shape[:1]:
        return f"the bias must be [{weight.shape[0]}]; got {list(bias.shape)}"
    return ""


@register(
    "linear_decode",
    "streaming_cpu",
    priority=20,
    usable=_LIBRARY.usable("the weight of a linear map read once, at memory speed", torch.bfloat16),
    fits=fits,
)
def linear_decode(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x weight^T + bias with float32 sums.

    Args:
        x: `[..., D]` bfloat16, few rows.
        weight: `[O, D]` bfloat16.
        bias: `[O]` bfloat16 or None.

    Returns:
        `[..., O]` bfloat16; the same bits for any number of threads.

    Errors: `ConfigError` for what `fits` refuses, and for an x of another type or width.

    >>> linear_decode(torch.ones(1, 32).bfloat16(), torch.ones(3, 32).bfloat16())
    tensor([[32., 32., 32.]], dtype=torch.bfloat16)
    """
    reason = fits(weight, bias)
    require(not reason, "linear_decode", reason, "must fit the kernel", "Use torch.nn.functional.linear")
    n_out, n_in = weight.shape
    if x.dtype is not torch.bfloat16 or not x.is_cpu or x.shape[-1] != n_in:
        require(
            False,
            "x",
            f"{x.dtype} {list(x.shape)} on {x.device}",
            f"must be bfloat16 [..., {n_in}] on the CPU",
        )
    x = x.contiguous()
    y = x.new_empty(*x.shape[:-1], n_out)
    _LIBRARY.moekit_linear(
        x.data_ptr(), weight.data_ptr(), None if bias is None else bias.data_ptr(), y.data_ptr(),
        x.numel() // n_in, n_in, n_out,
    )  # fmt: skip
    return y
