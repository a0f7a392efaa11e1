"""Dispatch, expert MLPs and combine in one: the CPU kernel of `expert_layer.cpp` as a differentiable function.

Registered as the operation "expert_layer": tokens `[T, D]`, rows sorted by expert as `token_index [R]`,
`row_weight [R]` and `tokens_per_expert [E]`, weights as in `moekit.kernels.expert_mlp`, result `[T, O]` in bfloat16.
Master weights may be float32: they are cast here, and their gradients come back in float32 without a bfloat16
copy in between.
"""

from __future__ import annotations

import ctypes
import functools
import os
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moekit.kernels.cpu import has_bf16_products
from moekit.kernels.cpu.build import BuildError, cannot_build, load
from moekit.kernels.registry import Usable, register

SWITCH = "MOEKIT_CPU_KERNELS"
SOURCE = Path(__file__).with_suffix(".cpp")
ACTIVATIONS = {"swiglu": 0, "gelu": 1, "relu": 2, "sigmoid": 3}


def fits(d_model: int, d_expert: int, d_out: int, has_bias: bool) -> str:
    """Why the kernel cannot compute experts of these widths, or "" where it can."""
    if has_bias:
        return "experts with biases are not written yet"
    for name, size, step in (("d_model", d_model, 32), ("d_expert", d_expert, 16), ("d_out", d_out, 32)):
        if size % step:
            return f"{name} must be a multiple of {step}; got {size}"
    return ""


def _usable(device: torch.device, dtype: torch.dtype) -> Usable:
    if device.type != "cpu":
        return False, "for CPUs"
    if dtype != torch.bfloat16:
        return False, f"needs bfloat16, got {dtype}"
    if os.environ.get(SWITCH, "1") == "0":
        return False, f"switched off by {SWITCH}=0"
    if not has_bf16_products():
        return False, "this CPU has no bfloat16 products (AVX-512 bf16 or AMX)"
    if reason := cannot_build():
        return False, reason
    try:
        _library()
    except BuildError as error:
        warnings.warn(
            f"moekit's CPU kernels could not be compiled, plain ones are used: {error}", stacklevel=2
        )
        return False, str(error)
    return True, "gather, products, activation and weighting fused; compiled on this machine"


@functools.cache
def _library() -> ctypes.CDLL:
    library = load(SOURCE)
    size, pointer = ctypes.c_int64, ctypes.c_void_p
    rows: list[Any] = [size, pointer, pointer, size, size, size, size]
    library.moekit_forward.argtypes = [*rows, *[pointer] * 6]
    library.moekit_backward.argtypes = [*rows, *[pointer] * 9, size, pointer]
    library.moekit_sum_rows.argtypes = [pointer, size, size, size, pointer, pointer]
    for function in (library.moekit_forward, library.moekit_backward, library.moekit_sum_rows):
        function.restype = None
    return library


@register("expert_layer", "fused_cpu", priority=20, usable=_usable, fits=fits)
def expert_layer_cpu(
    tokens: Tensor,
    token_index: Tensor,
    row_weight: Tensor,
    tokens_per_expert: Tensor,
    w_in: Tensor,
    w_out: Tensor,
    activation: str,
) -> Tensor:
    """The weighted sum of each token's experts, `[T, O]` bfloat16; zeros for a token without a row."""
    result: Tensor = _ExpertLayer.apply(
        tokens, row_weight, w_in, w_out, token_index, tokens_per_expert, activation
    )
    return result


class _ExpertLayer(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        tokens: Tensor,
        row_weight: Tensor,
        w_in: Tensor,
        w_out: Tensor,
        token_index: Tensor,
        tokens_per_expert: Tensor,
        activation: str,
    ) -> Tensor:
        x, up, down = (part.to(torch.bfloat16).contiguous() for part in (tokens, w_in, w_out))
        weight, token = row_weight.float().contiguous(), token_index.contiguous()
        begin = torch.zeros(len(tokens_per_expert) + 1, dtype=torch.int64)
        torch.cumsum(tokens_per_expert, 0, out=begin[1:])
        n_experts, inner, d = up.shape
        o, f = down.shape[1:]
        hidden = None
        if any(ctx.needs_input_grad):
            n_stored = int((tokens_per_expert + 15).div(16, rounding_mode="floor").sum()) * 16
            hidden = torch.empty(n_stored, inner, dtype=torch.bfloat16)
        rows = torch.empty(len(token), o, dtype=torch.bfloat16)
        ctx.activation, ctx.sizes = ACTIVATIONS[activation], (n_experts, d, f, o)
        _library().moekit_forward(
            ctx.activation, _at(token), _at(begin), *ctx.sizes,
            _at(x), _at(up), _at(down), _at(weight), _at(rows), _at(hidden),
        )  # fmt: skip
        ctx.save_for_backward(x, up, down, weight, token, begin, hidden)
        ctx.types = (tokens.dtype, row_weight.dtype, w_in.dtype, w_out.dtype)
        return _sum_rows(rows, token, len(x))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, up, down, weight, token, begin, hidden = ctx.saved_tensors
        dy = gradient.to(torch.bfloat16).contiguous()
        wants_tokens = ctx.needs_input_grad[0]
        dx_rows = torch.empty(len(token), x.shape[1], dtype=torch.bfloat16) if wants_tokens else None
        kind = torch.float32 if torch.float32 in ctx.types[2:] else torch.bfloat16
        d_up, d_down = torch.empty_like(up, dtype=kind), torch.empty_like(down, dtype=kind)
        d_weight = torch.empty_like(weight)
        _library().moekit_backward(
            ctx.activation, _at(token), _at(begin), *ctx.sizes,
            _at(x), _at(up), _at(down), _at(weight), _at(hidden), _at(dy),
            _at(dx_rows), _at(d_up), _at(d_down), int(kind == torch.float32), _at(d_weight),
        )  # fmt: skip
        d_tokens = _sum_rows(dx_rows, token, len(x)).to(ctx.types[0]) if dx_rows is not None else None
        return (
            d_tokens, d_weight.to(ctx.types[1]), d_up.to(ctx.types[2]), d_down.to(ctx.types[3]), None, None, None,
        )  # fmt: skip


def _sum_rows(rows: Tensor, token: Tensor, n_tokens: int) -> Tensor:
    result = torch.empty(n_tokens, rows.shape[1], dtype=torch.bfloat16)
    _library().moekit_sum_rows(_at(token), len(token), n_tokens, rows.shape[1], _at(rows), _at(result))
    return result


def _at(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
