"""Attention over a key/value cache on a CPU: the kernels of `cached_attention.cpp`, for inference.

Registered as the operation "cached_attention". Up to `FEW_QUERIES` queries the keys and values are read once, at memory
speed; more of them go in blocks of 64 by 64.

Shape legend: B batch, H query heads, G key/value heads, Q queries, K keys, N width of a key, M width of a value.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from moekit.config.errors import require
from moekit.kernels.cpu.library import SIZE, Library
from moekit.kernels.registry import register

FEW_QUERIES = 16


class _Problem(ctypes.Structure):
    _fields_ = [
        *((name, SIZE) for name in ("batch", "heads", "groups", "n_queries", "n_keys", "width", "value_width")),
        ("first", SIZE),
        *((f"{name}_stride", SIZE * n) for name, n in (("query", 3), ("key", 3), ("value", 3), ("mask", 4))),
        *((name, ctypes.c_void_p) for name in ("query", "key", "value", "mask", "out")),
        ("scale", ctypes.c_float),
    ]  # fmt: skip


_LIBRARY = Library(
    "cached_attention",
    {"moekit_cached_attention": [ctypes.POINTER(_Problem), SIZE]},
    features=("avx512_f", "avx512_bw", "avx512_dq", "avx512_vl", "avx512_bf16"),
    result=ctypes.c_int,
)


def fits(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> str:
    """Why the kernel cannot compute these, or "" where it can. Looks at types, shapes and strides only.

    >>> key = torch.empty(1, 2, 9, 48, dtype=torch.bfloat16)
    >>> fits(key, key, key)
    'the widths of keys and values must be multiples of 32; got 48 and 48'
    """
    if query.ndim != 4 or key.ndim != 4 or value.ndim != 4:
        return "queries, keys and values must have four dimensions"
    batch, heads, n_queries, width = query.shape
    _, groups, n_keys, value_width = value.shape
    if key.shape != (batch, groups, n_keys, width) or value.shape[0] != batch:
        got = f"{list(key.shape)} and {list(value.shape)}"
        return f"keys and values must be [{batch}, G, K, {width}] and [{batch}, G, K, M]; got {got}"
    if not query.numel() or not key.numel() or not value.numel():
        return "there must be queries, keys and values"
    if heads % groups:
        return f"the query heads must be a multiple of the key heads ({groups}); got {heads}"
    if width % 32 or value_width % 32:
        return f"the widths of keys and values must be multiples of 32; got {width} and {value_width}"
    for tensor in (query, key, value):
        if tensor.dtype is not torch.bfloat16 or not tensor.is_cpu:
            return (
                f"queries, keys and values must be bfloat16 on the CPU; got {tensor.dtype} on {tensor.device}"
            )
        if tensor.stride(3) != 1:
            return f"the numbers of a row must lie together; got a stride of {tensor.stride(3)}"
    if mask is None:
        return ""
    if n_queries > FEW_QUERIES:
        return f"a mask is taken for at most {FEW_QUERIES} queries; got {n_queries}"
    if mask.dtype is not torch.bool or not mask.is_cpu:
        return f"a mask must be bool on the CPU; got {mask.dtype} on {mask.device}"
    if mask.ndim != 4 or any(n not in (1, want) for n, want in zip(mask.shape, (batch, heads), strict=False)):
        return f"a mask must be [{batch}, {heads}, {n_queries}, {n_keys}] or 1 in the first two; got {list(mask.shape)}"
    if mask.shape[2:] != (n_queries, n_keys):
        return f"a mask must have {n_queries} queries and {n_keys} keys; got {list(mask.shape[2:])}"
    return ""


@register(
    "cached_attention",
    "blocks_cpu",
    priority=20,
    usable=_LIBRARY.usable(
        "keys and values of a cache read once; prompts in cache-sized blocks", torch.bfloat16
    ),
    fits=fits,
)
def cached_attention(
    query: Tensor, key: Tensor, value: Tensor, causal: bool, scale: float, mask: Tensor | None = None
) -> Tensor:
    """softmax(scale * query key^T) value.

    Args:
        query: `[B, H, Q, N]`, bfloat16; this, key and value in any strides but that of the last dimension.
        key: `[B, G, K, N]`; head h of the queries reads head h * G / H of these.
        value: `[B, G, K, M]`.
        causal: query i sees the first i + 1 keys (not the last ones); otherwise it sees all.
        scale: positive.
        mask: `[B, H, Q, K]` bool or 1 in the first two, True where a key is seen; for at most `FEW_QUERIES` queries.

    Returns:
        `[B, Q, H, M]` bfloat16, zeros for a query that sees no key. The same bits for any number of threads.

    Errors: `ConfigError` for what `fits` refuses, a scale that is not positive, and where a gradient is wanted.

    >>> x = torch.randn(1, 2, 5, 32, dtype=torch.bfloat16)
    >>> cached_attention(x, x, x, causal=True, scale=32**-0.5).shape
    torch.Size([1, 5, 2, 32])
    """
    reason = fits(query, key, value, mask)
    require(not reason, "cached_attention", reason, "must fit the kernel", "Use another one")
    require(scale > 0, "scale", scale, "must be positive")
    if torch.is_grad_enabled():
        wanted = query.requires_grad or key.requires_grad or value.requires_grad
        require(not wanted, "requires_grad", True, "must be False", "Call it under torch.no_grad()")
    batch, heads, n_queries, width = query.shape
    _, groups, n_keys, value_width = value.shape
    out = query.new_empty(batch, n_queries, heads, value_width)
    mask_strides = (0,) * 4 if mask is None else mask.expand(batch, heads, -1, -1).stride()
    problem = _Problem(
        batch, heads, groups, n_queries, n_keys, width, value_width, 0 if causal else n_keys,
        query.stride()[:3], key.stride()[:3], value.stride()[:3], mask_strides,
        query.data_ptr(), key.data_ptr(), value.data_ptr(), None if mask is None else mask.data_ptr(),
        out.data_ptr(), scale,
    )  # fmt: skip
    if _LIBRARY.moekit_cached_attention(problem, n_queries <= FEW_QUERIES):
        raise MemoryError(f"not enough memory for the attention of {n_queries} queries to {n_keys} keys")
    return out
