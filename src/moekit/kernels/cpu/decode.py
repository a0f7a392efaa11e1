"""Experts for few tokens on a CPU (decoding): every chosen expert's weights are read once, at memory speed.

Inference only. Up to about 16 tokens the time is that of reading the weights; with more the plain paths catch up.
Weights are bfloat16 (`[out, in]` or transposed), float32 (`[out, in]`), or quantised (`moekit.kernels.quantized`), and
the two matrices may differ. Sums are float32. By bfloat16 weights, float32 tokens are rounded to bfloat16; quantised
weights are multiplied by tokens of 16 bits with a scale for each group, an error of at most 2**-16 of a group's largest
value, and a group with a NaN or an infinity makes NaN.

Shape legend: T tokens, K experts of each, E experts, D width in, F width of an expert, O width out.
"""

from __future__ import annotations

import ctypes
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moekit.config.errors import require
from moekit.kernels.cpu.library import POINTER, SIZE, Library
from moekit.kernels.expert_weights import KINDS, ExpertWeights
from moekit.kernels.quantized import QuantizedMatrix
from moekit.kernels.registry import register

FORMATS = {"bfloat16": 0, "float32": 1, "int8": 2, "int4": 3, "bfloat16 transposed": 4}


class _Matrix(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int64) for name in ("format", "data", "scales", "group", "n_out", "n_in")]


class _Layer(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("n_experts", "d", "f", "o", "interleaved", "float_bias")),
        *((name, ctypes.c_int64) for name in ("b_in", "b_out")),
        ("w_in", _Matrix),
        ("w_out", _Matrix),
        ("kind", ctypes.c_int64),
        *((name, ctypes.c_float) for name in ("alpha", "limit", "offset")),
    ]


LIBRARY = Library(
    "decode",
    {
        "moekit_decode": [ctypes.POINTER(_Layer), POINTER, SIZE]
        + [POINTER] * 2
        + [SIZE] * 2
        + [POINTER] * 2
        + [SIZE],
        "moekit_quantized_linear": [ctypes.POINTER(_Matrix), POINTER, SIZE, SIZE, POINTER, POINTER, SIZE],
    },
    features=("avx512_f", "avx512_bw", "avx512_dq", "avx512_vl", "avx512_bf16", "avx512_vnni"),
    result=ctypes.c_int,
)
DTYPES = (torch.bfloat16, torch.float32)


def decode_fits(weights: ExpertWeights) -> str:
    """Why `expert_decode` cannot compute these experts, or "" where it can. Looks at types and shapes only.

    >>> decode_fits(ExpertWeights(torch.empty(4, 48, 32).bfloat16(), torch.empty(4, 32, 24).bfloat16()))
    'd_expert must be a multiple of 32; got 24'
    """
    d, f, o = weights.sizes
    for name, size in (("d_model", d), ("d_expert", f), ("d_out", o)):
        if size % 32 or size == 0:
            return f"{name} must be a multiple of 32; got {size}"
    gates = 2 if weights.activation.gated else 1
    inner = weights.w_in.shape[2 if weights.transposed else 1]
    if inner != gates * f:
        return f"w_in must have {gates * f} hidden values for d_expert={f} and {weights.activation.kind}; got {inner}"
    n_stacked = weights.n_stacked
    if weights.w_out.shape[0] != n_stacked:
        return f"w_out must have as many experts as w_in ({n_stacked}); got {weights.w_out.shape[0]}"
    if weights.interleaved and gates == 2 and isinstance(weights.w_in, QuantizedMatrix):
        return "w_in cannot be quantised and interleaved; quantize_experts sorts it"
    for name, matrix in (("w_in", weights.w_in), ("w_out", weights.w_out)):
        if reason := _matrix_fits(matrix, weights.transposed):
            return f"{name} {reason}"
    biases = {"b_in": (weights.b_in, inner), "b_out": (weights.b_out, o)}
    types = set()
    for name, (bias, size) in biases.items():
        if bias is None:
            continue
        types.add(bias.dtype)
        if tuple(bias.shape) != (n_stacked, size) or not bias.is_contiguous():
            return f"{name} must be contiguous [{n_stacked}, {size}]; got {list(bias.shape)}"
        if bias.dtype not in (torch.bfloat16, torch.float32) or bias.device.type != "cpu" or len(types) > 1:
            return f"biases must be bfloat16 or float32, both the same, on the CPU; got {bias.dtype} on {bias.device}"
    return ""


@register(
    "expert_decode",
    "streaming_cpu",
    priority=20,
    usable=LIBRARY.usable("each chosen expert's weights read once, at memory speed", *DTYPES),
    fits=decode_fits,
)
def expert_decode(
    tokens: Tensor,
    expert_index: Tensor,
    expert_weight: Tensor,
    weights: ExpertWeights,
    start: Tensor | None = None,
) -> Tensor:
    """The weighted sum of each token's experts.

    Args:
        tokens: `[T, D]`, bfloat16 or float32.
        expert_index: `[T, K]`, int64. Rows outside 0..E-1 (experts of another rank) are skipped.
        expert_weight: `[T, K]`, multiplied by (W_out a + b_out).
        weights: as `decode_fits` allows them; choices of an expert without a slot are skipped.
        start: `[T, O]` float32, the sums of the experts before these in the order of K; they go on from there.

    Returns:
        `[T, O]` in the type of `tokens`, float32 with `start`; zeros for a token without an expert. The sum over a
        token's experts runs in the order of its K, and the result has the same bits for any number of threads.

    Errors: `ConfigError` for other types, for weights that do not fit, and where a gradient is wanted.

    >>> weights = ExpertWeights(torch.randn(4, 128, 32).bfloat16(), torch.randn(4, 32, 64).bfloat16())
    >>> with torch.no_grad():
    ...     y = expert_decode(torch.randn(1, 32), torch.tensor([[2, 0]]), torch.tensor([[0.7, 0.3]]), weights)
    >>> y.shape, y.dtype
    (torch.Size([1, 32]), torch.float32)
    """
    entry = _entry(weights)
    if torch.is_grad_enabled():
        _refuse_gradients(tokens, expert_weight, weights)
    n_tokens, top_k = expert_index.shape
    x_type = tokens.dtype
    if x_type is not torch.bfloat16 and x_type is not torch.float32:
        require(False, "tokens.dtype", x_type, "must be bfloat16 or float32")
    if tokens.shape != (n_tokens, entry.d) or expert_weight.shape != expert_index.shape:
        _refuse_shapes(tokens, expert_index, expert_weight, entry.d)
    # each of these is the tensor itself where nothing has to be done
    tokens, index = tokens.contiguous(), expert_index.to(torch.int64).contiguous()
    if weights.slots is not None:
        here = (index >= 0) & (index < len(weights.slots))
        index = torch.where(here, weights.slots[index * here], -1)
    row_weight = expert_weight.to(torch.float32).contiguous()
    y_type, begin = x_type, 0
    if start is not None:
        if start.shape != (n_tokens, entry.o) or start.dtype is not torch.float32:
            require(
                False, "start", (tuple(start.shape), start.dtype), f"must be {n_tokens, entry.o}, float32"
            )
        start = start.contiguous()
        y_type, begin = torch.float32, start.data_ptr()
    y = tokens.new_empty(n_tokens, entry.o, dtype=y_type)
    failed = entry.call(
        entry.layer, tokens.data_ptr(), x_type is torch.float32, index.data_ptr(), row_weight.data_ptr(),
        n_tokens, top_k, begin, y.data_ptr(), y_type is torch.float32,
    )  # fmt: skip
    if failed:
        raise MemoryError(f"not enough memory to decode {n_tokens} tokens by {top_k} experts each")
    return y


def _matrix_fits(matrix: Tensor | QuantizedMatrix, transposed: bool) -> str:
    if matrix.device.type != "cpu":
        return f"must be on the CPU; got {matrix.device}"
    if isinstance(matrix, QuantizedMatrix):
        if transposed:
            return "cannot be quantised and transposed; quantize_experts turns it"
        return "" if matrix.codes.is_contiguous() and matrix.scales.is_contiguous() else "must be contiguous"
    if matrix.dtype == torch.float32 and transposed:
        return "must be bfloat16 where it is transposed; got torch.float32"
    if matrix.dtype not in (torch.bfloat16, torch.float32):
        return f"must be bfloat16, float32 or quantised; got {matrix.dtype}"
    return "" if matrix.is_contiguous() else "must be contiguous"


class _Entry(NamedTuple):
    """What the kernel is told of a layer's weights, and the addresses that show whether it is still true."""

    at: tuple[int, int, int, int]
    layer: _Layer
    d: int
    o: int
    call: Any

    def __reduce__(self) -> Any:
        return type(None), ()  # a copy of the weights lies elsewhere and makes its own


_ENTRY = "_decode_entry"


def _entry(weights: ExpertWeights) -> _Entry:
    at = _at(weights.w_in), _at(weights.w_out), _at(weights.b_in), _at(weights.b_out)
    entry: _Entry | None = weights.__dict__.get(_ENTRY)
    if entry is None or entry.at != at:
        reason = decode_fits(weights)
        require(not reason, "weights", reason, "must fit the decoding kernel", "Use another kernel")
        entry = _Entry(at, _described(weights), weights.sizes[0], weights.sizes[2], LIBRARY.moekit_decode)
        weights.__dict__[_ENTRY] = entry
    return entry


def _at(part: Tensor | QuantizedMatrix | None) -> int:
    return 0 if part is None else _data(part).data_ptr()


def _data(matrix: Tensor | QuantizedMatrix) -> Tensor:
    return matrix.codes if isinstance(matrix, QuantizedMatrix) else matrix


def _described(weights: ExpertWeights) -> _Layer:
    (d, f, o), how = weights.sizes, weights.activation
    biases = [bias for bias in (weights.b_in, weights.b_out) if bias is not None]
    return _Layer(
        weights.n_stacked, d, f, o, weights.interleaved, bool(biases) and biases[0].dtype == torch.float32,
        _at(weights.b_in), _at(weights.b_out),
        matrix_entry(weights.w_in, weights.transposed), matrix_entry(weights.w_out, weights.transposed),
        KINDS[how.kind], how.alpha, how.limit, how.offset,
    )  # fmt: skip


def matrix_entry(matrix: Tensor | QuantizedMatrix, transposed: bool = False) -> _Matrix:
    """What the library is told of a matrix, which must live as long as it is used."""
    _, n_out, n_in = matrix.shape
    if isinstance(matrix, QuantizedMatrix):
        code = FORMATS[f"int{matrix.bits}"]
        return _Matrix(
            code, matrix.codes.data_ptr(), matrix.scales.data_ptr(), matrix.group_size, n_out, n_in
        )
    if transposed:
        return _Matrix(FORMATS["bfloat16 transposed"], matrix.data_ptr(), 0, 0, n_in, n_out)
    return _Matrix(FORMATS[str(matrix.dtype).removeprefix("torch.")], matrix.data_ptr(), 0, 0, n_out, n_in)


def _refuse_gradients(tokens: Tensor, expert_weight: Tensor, weights: ExpertWeights) -> None:
    parts = (tokens, expert_weight, _data(weights.w_in), _data(weights.w_out), weights.b_in, weights.b_out)
    wanted = any(part is not None and part.requires_grad for part in parts)
    require(not wanted, "requires_grad", True, "must be False for decoding", "Call it under torch.no_grad()")


def _refuse_shapes(tokens: Tensor, expert_index: Tensor, expert_weight: Tensor, d: int) -> None:
    expected = (expert_index.shape[0], d)
    require(tokens.shape == expected, "tokens.shape", tuple(tokens.shape), f"must be {expected}")
    require(False, "expert_weight.shape", tuple(expert_weight.shape), f"must be {tuple(expert_index.shape)}")
