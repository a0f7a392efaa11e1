"""Kernels for CPUs, written in C++, compiled on the machine that runs them and kept in the cache."""

from __future__ import annotations

import torch


def has_bf16_products() -> bool:
    """Whether this CPU has matrix instructions for bfloat16 (AVX-512 bf16 or AMX)."""
    checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, name, lambda: False)() for name in checks)
