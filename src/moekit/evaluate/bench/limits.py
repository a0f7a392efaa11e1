"""What this machine can do at best, measured beside the contestants: matrix products and reading memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

# wide enough for the library's best speed (bf16 on two cores: 780 GFLOP/s, 660 at 2048, 440 at 1024)
MATRIX = 3072
BUFFER = 512 << 20  # bytes, beyond every cache


@dataclass(frozen=True)
class Gauge:
    """What measures the machine: `run` does `amount` FLOPs, or reads `amount` bytes."""

    run: Callable[[], object]
    amount: float


def matrix_gauge(dtype: torch.dtype) -> Gauge:
    """A square matrix product in `dtype` by torch, all threads."""
    left, right = (torch.ones(MATRIX, MATRIX, dtype=dtype) for _ in range(2))
    out = torch.empty(MATRIX, MATRIX, dtype=dtype)
    return Gauge(lambda: torch.mm(left, right, out=out), 2.0 * MATRIX**3)


def read_gauge() -> Gauge:
    """A float32 sum over a buffer larger than the caches, all threads: the fastest of torch's plain readers."""
    buffer = torch.ones(BUFFER // 4)
    return Gauge(lambda: buffer.sum(), float(BUFFER))
