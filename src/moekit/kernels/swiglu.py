"""The gated activation of a dense feed-forward block: silu(gate) * linear."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from moekit.kernels.registry import find


def swiglu_reference(hidden: Tensor) -> Tensor:
    """The truth: see `swiglu`."""
    gate, linear = hidden.chunk(2, dim=-1)
    return F.silu(gate) * linear


def swiglu(hidden: Tensor) -> Tensor:
    """`[..., 2F]`, gates first, to `[..., F]` in the same type (Shazeer 2020, arXiv 2002.05202).

    >>> swiglu(torch.tensor([0.0, 100.0, 3.0, 2.0])).tolist()
    [0.0, 200.0]
    """
    kernel = None if torch.compiler.is_compiling() else find("swiglu", hidden.device.type, hidden.dtype)
    if kernel is None or kernel.fits(hidden.shape[-1] // 2):
        return swiglu_reference(hidden)
    fused: Tensor = kernel.function(hidden)
    return fused
