"""The weighted sum of the experts that each token chose, by the kernel that suits their number.

Few tokens without a gradient wait for the experts' weights, so each chosen expert's are read once ("expert_decode");
many tokens, or a gradient, are a matter of products ("expert_layer").
"""

from __future__ import annotations

import torch
from torch import Tensor

from moekit.kernels.expert_weights import ExpertWeights
from moekit.kernels.registry import find
from moekit.kernels.routing import sort_by_expert

# rows per expert up to which reading the weights is what takes time; beyond it the products do
FEW_ROWS = 4
# tokens of one call with quantised experts: about so many rows per expert, and they are read again for the next
QUANTISED_ROWS = 16


def chosen_experts(
    tokens: Tensor, expert_index: Tensor, expert_weight: Tensor, weights: ExpertWeights, dtype: torch.dtype
) -> Tensor | str:
    """The sum over k of expert_weight[t, k] * expert(expert_index[t, k])(tokens[t]), or why no fused kernel gives it.

    Shapes: tokens `[T, D]`, expert_index and expert_weight `[T, K]`, result `[T, O]` in `dtype`. An index outside
    0..E-1 (an expert of another rank) adds nothing. Products run in `dtype`; float32 weights of
    few tokens are not rounded.
    """
    decoded = decoded_experts(tokens, expert_index, expert_weight, weights, dtype)
    if decoded is not None:
        return decoded
    kernel = find("expert_layer", tokens.device.type, dtype)
    if kernel is None:
        return f"no fused kernel for {dtype} on {tokens.device.type}"
    if misfit := kernel.fits(weights):
        return misfit
    flat, row_weight, top_k = expert_index.reshape(-1), expert_weight.reshape(-1), expert_index.shape[1]
    # experts of other ranks go behind the last one and are cut off
    elsewhere = (flat < 0) | (flat >= weights.n_experts)
    order, counts = sort_by_expert(flat.masked_fill(elsewhere, weights.n_experts), weights.n_experts + 1)
    counts = counts[: weights.n_experts]
    order = order[: int(counts.sum())]
    rows = order.div(top_k, rounding_mode="floor"), row_weight.index_select(0, order)
    result: Tensor = kernel.function(tokens, *rows, counts, weights, dtype)
    return result


def decoded_experts(
    tokens: Tensor,
    expert_index: Tensor,
    expert_weight: Tensor,
    weights: ExpertWeights,
    dtype: torch.dtype,
    start: Tensor | None = None,
) -> Tensor | None:
    """As `chosen_experts` where reading the weights is what takes time, else None.

    `start` `[T, O]` float32: the sums of the experts before these, which go on from there (`expert_decode`).
    """
    quantised = not isinstance(weights.w_in, Tensor) or not isinstance(weights.w_out, Tensor)
    n_rows, n_tokens = expert_index.numel(), len(tokens)
    if not quantised and n_rows > FEW_ROWS * weights.n_experts:
        return None
    parts = (tokens, expert_weight, weights.w_in, weights.w_out, weights.b_in, weights.b_out)
    if torch.is_grad_enabled() and any(isinstance(part, Tensor) and part.requires_grad for part in parts):
        return None
    kernel = find("expert_decode", tokens.device.type, tokens.dtype)
    if kernel is None or kernel.fits(weights):
        return None
    step = max(QUANTISED_ROWS, QUANTISED_ROWS * weights.n_experts // max(expert_index.shape[1], 1))
    if n_tokens <= step:
        answer: Tensor = kernel.function(tokens, expert_index, expert_weight, weights, start)
        return answer.to(dtype)
    starts = [None] * -(-n_tokens // step) if start is None else start.split(step)
    pieces = zip(tokens.split(step), expert_index.split(step), expert_weight.split(step), starts, strict=True)
    return torch.cat([kernel.function(*piece, weights, first) for *piece, first in pieces]).to(dtype)


def decoded_rows(
    tokens: Tensor,
    token_index: Tensor,
    row_weight: Tensor,
    tokens_per_expert: Tensor,
    weights: ExpertWeights,
    dtype: torch.dtype,
) -> Tensor | None:
    """As `decoded_experts` from rows sorted by expert, where each token has the same number of them.

    Shapes: token_index and row_weight `[R]`, tokens_per_expert `[E]`.

    Quantised experts are computed so whatever the number of tokens: making their weights first takes longer, on one
    core by 3.4 times at 4,096 tokens (64 experts of 128 x 192) and by 1.9 (16 of 512 x 512).
    """
    if isinstance(weights.w_in, Tensor) and len(token_index) > FEW_ROWS * weights.n_experts:
        return None
    chosen = choices_of_rows(token_index, row_weight, tokens_per_expert, len(tokens))
    return None if chosen is None else decoded_experts(tokens, *chosen, weights, dtype)


def choices_of_rows(
    token_index: Tensor, row_weight: Tensor, tokens_per_expert: Tensor, n_tokens: int
) -> tuple[Tensor, Tensor] | None:
    """Experts and weights `[T, K]` of rows sorted by expert, each token's in that order; None where K differs."""
    n_rows = len(token_index)
    if n_rows == 0 or n_rows % n_tokens:
        return None
    order = token_index.argsort(stable=True)
    by_token = token_index[order].view(n_tokens, -1)
    if not torch.equal(by_token, torch.arange(n_tokens).unsqueeze(1).expand_as(by_token)):
        return None
    experts = torch.arange(len(tokens_per_expert))
    expert = experts.repeat_interleave(tokens_per_expert)[order].view_as(by_token)
    return expert, row_weight[order].view_as(by_token)
