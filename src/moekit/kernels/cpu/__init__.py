"""Kernels for CPUs, written in C++, compiled on the machine that runs them and kept in the cache."""

from __future__ import annotations

import functools

import torch


def has_bf16_products() -> bool:
    """Whether this CPU has matrix instructions for bfloat16 (AVX-512 bf16 or AMX)."""
    return _has("_is_avx512_bf16_supported") or has_amx()


@functools.cache
def has_amx() -> bool:
    """Whether this CPU has a matrix unit (AMX)."""
    return _has("_is_amx_tile_supported")


def _has(check: str) -> bool:
    return bool(getattr(torch.cpu, check, lambda: False)())
