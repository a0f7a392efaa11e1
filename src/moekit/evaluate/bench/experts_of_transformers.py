"""The expert layer of transformers on weights that are already there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from moekit.evaluate.machine import memory
from moekit.kernels.expert_weights import ExpertWeights

IMPLEMENTATIONS = ("grouped_mm", "batched_mm", "eager")

_LARGEST_COPY = (
    2 << 30
)  # beyond, it takes hundreds of times as long as the others: 3.6 s against 0.011 s, seen

ExpertFunction = Callable[[Tensor, Tensor, Tensor], Tensor]


def experts_function(weights: ExpertWeights, implementation: str, top_k: int) -> ExpertFunction:
    """(tokens `[T, D]`, expert_indices `[T, K]`, expert_weights `[T, K]`) -> `[T, D]`, by one implementation.

    The module is the one of OLMoE, which holds its weights as moekit does; nothing is copied.
    """
    from transformers import OlmoeConfig
    from transformers.models.olmoe.modeling_olmoe import OlmoeExperts

    d_model, d_expert, _ = weights.sizes
    config: Any = OlmoeConfig(
        hidden_size=d_model,
        intermediate_size=d_expert,
        num_experts=weights.n_experts,
        num_experts_per_tok=top_k,
    )
    config._experts_implementation = implementation
    with torch.device("meta"):
        module: Any = OlmoeExperts(config)
    module.gate_up_proj, module.down_proj = map(_parameter, weights.tensors())
    return lambda tokens, indices, chosen: module(tokens, indices, chosen)


def gathered_bytes(weights: ExpertWeights, rows: int) -> int:
    """What `batched_mm` copies for `rows` choices: the matrices of each of them, at their largest moment."""
    w_in, _ = weights.tensors()
    return rows * w_in[0].numel() * w_in.element_size()


def too_large(needed: int) -> str:
    """Why a copy of `needed` bytes is not made: over 2 GiB, or an eighth of the free memory; "" where it is made."""
    free = memory().available
    if needed <= min(_LARGEST_COPY, free / 8):
        return ""
    sizes = f"{needed / 2**30:.1f} GiB here; {free / 2**30:.1f} GiB are free"
    return f"copies the matrices of every choice, {sizes}"


def _parameter(weight: Tensor) -> nn.Parameter:
    if isinstance(weight, nn.Parameter):
        return weight
    return nn.Parameter(weight, requires_grad=False)
