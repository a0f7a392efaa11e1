"""Choice and order of a router's rows: the CPU kernels of `routing.cpp`, registered as "top_k" and "sort_by_expert"."""

from __future__ import annotations

import torch
from torch import Tensor

from moekit.kernels.cpu.library import POINTER, SIZE, Library, at
from moekit.kernels.registry import register

_LIBRARY = Library(
    "routing",
    {
        "moekit_top_k": [SIZE] * 3 + [POINTER] * 2,
        "moekit_sort_by_expert": [SIZE] * 2 + [POINTER] * 3,
    },
)


@register("top_k", "fused_cpu", priority=20, usable=_LIBRARY.usable("one pass over each row", torch.float32))
def top_k_cpu(values: Tensor, k: int) -> Tensor:
    """See `moekit.kernels.routing.top_k`."""
    values = values.detach().contiguous()
    index = torch.empty(len(values), k, dtype=torch.int64)
    _LIBRARY.moekit_top_k(*values.shape, k, at(values), at(index))
    return index


@register("sort_by_expert", "fused_cpu", priority=20, usable=_LIBRARY.usable("a counting sort", torch.int64))
def sort_by_expert_cpu(experts: Tensor, n_experts: int) -> tuple[Tensor, Tensor]:
    """See `moekit.kernels.routing.sort_by_expert`."""
    experts = experts.contiguous()
    if len(experts) and not 0 <= int(experts.min()) <= int(experts.max()) < n_experts:
        raise IndexError(f"an expert is out of bounds: they must be in 0..{n_experts - 1}")
    order, counts = torch.empty_like(experts), torch.empty(n_experts, dtype=torch.int64)
    _LIBRARY.moekit_sort_by_expert(len(experts), n_experts, at(experts), at(order), at(counts))
    return order, counts
