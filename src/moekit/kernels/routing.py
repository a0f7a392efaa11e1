"""The steps of routing that sort: the K best experts of each token, and the rows of each expert."""

from __future__ import annotations

import torch
from torch import Tensor

from moekit.kernels.registry import Kernel, find


def top_k(values: Tensor, k: int) -> Tensor:
    """`[T, K]` places of the K largest of each row of `values` `[T, E]`, the largest first.

    >>> top_k(torch.tensor([[0.1, 0.7, 0.2]]), 2).tolist()
    [[1, 2]]
    """
    kernel = _kernel("top_k", values)
    if kernel is None or not 0 < k <= values.shape[-1]:
        return values.topk(k, dim=-1).indices
    index: Tensor = kernel.function(values, k)
    return index


def sort_by_expert(experts: Tensor, n_experts: int) -> tuple[Tensor, Tensor]:
    """`[R]` rows in the order of their experts, those of one expert as they come, and the counts `[n_experts]`.

    >>> [part.tolist() for part in sort_by_expert(torch.tensor([2, 0, 2]), 3)]
    [[1, 0, 2], [1, 0, 2]]
    """
    kernel = _kernel("sort_by_expert", experts)
    if kernel is None:
        return torch.argsort(experts, stable=True), count_per_expert(experts, n_experts)
    sorted_rows: tuple[Tensor, Tensor] = kernel.function(experts, n_experts)
    return sorted_rows


def count_per_expert(expert_index: Tensor, n_experts: int) -> Tensor:
    """`[n_experts]` how often each expert occurs; deterministic on every device."""
    counts = torch.zeros(n_experts, dtype=torch.long, device=expert_index.device)
    return counts.scatter_add_(0, expert_index, torch.ones_like(expert_index))


def _kernel(op: str, x: Tensor) -> Kernel | None:
    return None if torch.compiler.is_compiling() else find(op, x.device.type, x.dtype)
