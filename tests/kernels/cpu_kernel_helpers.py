"""What the tests of the CPU kernels share."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moekit.kernels.registry import available


def needs(op: str, dtype: torch.dtype = torch.bfloat16) -> pytest.MarkDecorator:
    """Skips a test where the kernel of `op` cannot run, and says why."""
    _, can_run, why = available(op, "cpu", dtype)[0]
    return pytest.mark.skipif(not can_run, reason=f"{op} cannot run here: {why}")


def close(ours: Tensor, exact: Tensor, what: str, tolerance: float = 0.008) -> None:
    """A few roundings to bfloat16, each of relative size 2**-9 at most."""
    assert ours.shape == exact.shape, what
    assert ours.isfinite().all(), what
    error = (ours.double() - exact.double()).norm()
    assert error <= tolerance * exact.double().norm() + 1e-9, f"{what}: {error / exact.double().norm()}"
