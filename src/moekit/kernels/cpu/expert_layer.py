"""Dispatch, expert MLPs and combine in one: the CPU kernel of `expert_layer.cpp` as a differentiable function.

Registered as the operation "expert_layer": tokens `[T, D]`, rows sorted by expert as `token_index [R]`,
`row_weight [R]` and `tokens_per_expert [E]`, the experts as `ExpertWeights`, result `[T, O]` in bfloat16 or float32.
In bfloat16, master weights may be float32: they are cast here, and their gradients come back in float32 without a
bfloat16 copy in between.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moekit.config.errors import ConfigError
from moekit.kernels.cpu import has_amx
from moekit.kernels.cpu.library import POINTER, SIZE, Library, at
from moekit.kernels.expert_weights import KINDS, Activation, ExpertWeights
from moekit.kernels.registry import register

DTYPES = (torch.bfloat16, torch.float32)
CHUNK_BYTES = 512 * 1024


class _Layer(ctypes.Structure):
    """`LayerArguments` of the C++ file."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("token", "begin", "weight")),
        *((name, ctypes.c_int64) for name in ("n_experts", "d", "f", "o", "chunk")),
        *((name, ctypes.c_int64) for name in ("transposed", "interleaved", "amx", "kind", "is_float")),
        *((name, ctypes.c_double) for name in ("alpha", "limit", "offset")),
        *((name, ctypes.c_void_p) for name in ("x", "w_in", "w_out", "b_in", "b_out", "slot")),
    )


def fits(weights: ExpertWeights) -> str:
    """Why the kernel cannot compute these experts, or "" where it can."""
    if not (isinstance(weights.w_in, Tensor) and isinstance(weights.w_out, Tensor)):
        return "quantised experts only decode"
    d, f, o = weights.sizes
    for name, size, step in (("d_model", d, 32), ("d_expert", f, 16), ("d_out", o, 32)):
        if size % step or size == 0:
            return f"{name} must be a multiple of {step}; got {size}"
    return ""


_LIBRARY = Library(
    "expert_layer",
    {
        "moekit_forward": [POINTER] * 3,
        "moekit_backward": [POINTER] * 5 + [SIZE, POINTER],
        "moekit_sum_rows": [POINTER] + [SIZE] * 4 + [POINTER] * 2,
    },
)


@register(
    "expert_layer",
    "fused_cpu",
    priority=20,
    usable=_LIBRARY.usable("gather, products, activation and weighting fused", *DTYPES),
    fits=fits,
)
def expert_layer_cpu(
    tokens: Tensor,
    token_index: Tensor,
    row_weight: Tensor,
    tokens_per_expert: Tensor,
    weights: ExpertWeights,
    dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """The weighted sum of each token's experts, `[T, O]` in `dtype`; zeros for a token without a row."""
    if weights.slots is not None:
        rows = tokens.new_empty(len(token_index), weights.sizes[2], dtype=dtype)
        expert_rows(tokens, token_index, row_weight, tokens_per_expert, weights, rows)
        return sum_rows(rows, token_index, len(tokens))
    result: Tensor = _ExpertLayer.apply(
        tokens, row_weight, *weights.tensors(), weights.b_in, weights.b_out,
        token_index, tokens_per_expert, weights, dtype,
    )  # fmt: skip
    return result


def expert_rows(
    tokens: Tensor,
    token_index: Tensor,
    row_weight: Tensor,
    tokens_per_expert: Tensor,
    weights: ExpertWeights,
    rows: Tensor,
) -> None:
    """Fill `rows [R, O]` with the experts' answers times the row weights: the part of the layer before its sums.

    Parts of the experts, one after the other, give the bits that all give together. Inference only; the weights
    must be of the type of `rows`.
    """
    dtype = rows.dtype
    maps = (*weights.tensors(), weights.b_in, weights.b_out)
    if torch.is_grad_enabled() and any(part is not None and part.requires_grad for part in (tokens, *maps)):
        raise ConfigError("experts in slots compute without gradients. Call them under torch.no_grad()")
    for part in maps:
        if part is not None and part.dtype != dtype:
            raise ConfigError(
                f"experts in slots must be of the type that is computed in, {dtype}; got {part.dtype}"
            )
    begin = torch.zeros(len(tokens_per_expert) + 1, dtype=torch.int64)
    torch.cumsum(tokens_per_expert, 0, out=begin[1:])
    saved = [
        token_index.contiguous(),
        begin,
        row_weight.float().contiguous(),
        tokens.to(dtype).contiguous(),
        *maps,
    ]
    form = _Form(
        len(tokens_per_expert), weights.sizes, weights.activation, weights.transposed, weights.interleaved
    )
    layer = _layer(saved, form, dtype)
    slots = None if weights.slots is None else weights.slots.contiguous()
    layer.slot = at(slots)
    _LIBRARY.moekit_forward(ctypes.byref(layer), at(rows), None)


def sum_rows(rows: Tensor, token_index: Tensor, n_tokens: int) -> Tensor:
    """`[T, O]`, the sum of each token's rows `[R, O]`, in the order of the rows."""
    return _sum_rows(rows, token_index.contiguous(), n_tokens)


@dataclass(frozen=True)
class _Form:
    """`ExpertWeights` without its tensors, which autograd keeps."""

    n_experts: int
    sizes: tuple[int, int, int]
    activation: Activation
    transposed: bool
    interleaved: bool


class _ExpertLayer(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        tokens: Tensor,
        row_weight: Tensor,
        w_in: Tensor,
        w_out: Tensor,
        b_in: Tensor | None,
        b_out: Tensor | None,
        token_index: Tensor,
        tokens_per_expert: Tensor,
        weights: ExpertWeights,
        dtype: torch.dtype,
    ) -> Tensor:
        given = (tokens, w_in, w_out, b_in, b_out)
        parts = [None if part is None else part.to(dtype).contiguous() for part in given]
        begin = torch.zeros(len(tokens_per_expert) + 1, dtype=torch.int64)
        torch.cumsum(tokens_per_expert, 0, out=begin[1:])
        token = token_index.contiguous()
        saved = [token, begin, row_weight.float().contiguous(), *parts]
        form = _Form(
            weights.n_experts, weights.sizes, weights.activation, weights.transposed, weights.interleaved
        )
        layer = _layer(saved, form, dtype)
        hidden = None
        if any(ctx.needs_input_grad):
            n_stored = int((tokens_per_expert + 15).div(16, rounding_mode="floor").sum()) * 16
            hidden = torch.empty(n_stored, w_in.shape[2 if weights.transposed else 1], dtype=dtype)
        with _borrowed(len(token), layer.o, dtype) as rows:
            _LIBRARY.moekit_forward(ctypes.byref(layer), at(rows), at(hidden))
            y = _sum_rows(rows, token, len(tokens))
        ctx.save_for_backward(*saved, hidden)
        ctx.form, ctx.dtype = form, dtype
        ctx.types = [row_weight.dtype] + [None if part is None else part.dtype for part in given]
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        *saved, hidden = ctx.saved_tensors
        token, _, weight, x, *maps = saved
        layer = _layer(saved, ctx.form, ctx.dtype)
        dy = gradient.to(ctx.dtype).contiguous()
        kind = torch.float32 if torch.float32 in ctx.types[2:] else ctx.dtype
        d_maps = [None if part is None else torch.empty_like(part, dtype=kind) for part in maps]
        d_weight = torch.empty_like(weight)
        d_tokens = None
        with _borrowed(len(token) if ctx.needs_input_grad[0] else 0, layer.d, ctx.dtype) as dx_rows:
            _LIBRARY.moekit_backward(
                ctypes.byref(layer), at(hidden), at(dy), at(dx_rows) if ctx.needs_input_grad[0] else None,
                (ctypes.c_void_p * 4)(*map(at, d_maps)), int(kind == torch.float32), at(d_weight),
            )  # fmt: skip
            if ctx.needs_input_grad[0]:
                d_tokens = _sum_rows(dx_rows, token, len(x))
        results = [
            None if part is None else part.to(dtype)
            for part, dtype in zip((d_weight, d_tokens, *d_maps), ctx.types, strict=True)
        ]
        return (results[1], results[0], *results[2:], None, None, None, None)


# One buffer for the rows between experts and sum. It is kept from call to call (up to KEPT_BYTES): memory that is fresh
# from the system costs a trap for each page, which took a third of the time of a layer with many experts.
_SPARE: list[Tensor] = []
KEPT_BYTES = 256 * 2**20


@contextmanager
def _borrowed(n_rows: int, width: int, dtype: torch.dtype) -> Iterator[Tensor]:
    """Room for `[n_rows, width]`; a second borrower at the same time gets its own."""
    n_bytes = n_rows * width * dtype.itemsize
    try:
        buffer = _SPARE.pop()
    except IndexError:
        buffer = torch.empty(0, dtype=torch.uint8)
    if buffer.numel() < n_bytes:
        del buffer  # not beside the larger one
        buffer = torch.empty(n_bytes, dtype=torch.uint8)
    try:
        yield buffer[:n_bytes].view(dtype).view(n_rows, width)
    finally:
        if buffer.numel() <= KEPT_BYTES:
            _SPARE[:] = [buffer]


def _layer(saved: Sequence[Tensor | None], form: _Form, dtype: torch.dtype) -> _Layer:
    """What the library is told; `saved` must live as long as it is used."""
    d, f, o = form.sizes
    how = form.activation
    token, begin, weight, *maps = map(at, saved)
    return _Layer(
        token, begin, weight, form.n_experts, d, f, o, _chunk(d, f, dtype),
        form.transposed, form.interleaved, has_amx(), KINDS[how.kind], dtype == torch.float32,
        how.alpha, how.limit, how.offset, *maps,
    )  # fmt: skip


def _chunk(d: int, f: int, dtype: torch.dtype) -> int:
    """Rows that are computed together: a multiple of 64 whose tokens and hidden state fit half of a usual L2 cache."""
    fitting = CHUNK_BYTES // ((d + f) * dtype.itemsize)
    return min(max(fitting // 64 * 64, 64), 256)


def _sum_rows(rows: Tensor, token: Tensor, n_tokens: int) -> Tensor:
    result = torch.empty(n_tokens, rows.shape[1], dtype=rows.dtype)
    is_float = int(rows.dtype == torch.float32)
    _LIBRARY.moekit_sum_rows(at(token), len(token), n_tokens, rows.shape[1], is_float, at(rows), at(result))
    return result
