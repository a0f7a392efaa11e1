"""Attention with relative positions (Transformer-XL, Dai et al. 2019, section 3.3), in cache-sized blocks.

Shapes: B batch, H heads, S queries (the segment), K keys (memory then segment, K = M + S), Dh width of a
head. Query i stands at position M + i among the keys, so its distance to key j is M + i - j.

    score[i, j] = (q_i + u) . k_j  +  (q_i + v) . r[M + i - j]        r[d] = W_kR R[d], R a fixed sinusoid

The second term depends on i - j, not on j. It is computed against every distance at once and each row is then
moved left by one place more than the row below it: the relative shift, which costs nothing here (see
`relative_shift`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# Scores held at once. On a CPU a block stays in the second-level cache, and small blocks are taken from the
# heap again and again, while buffers of tens of MiB go back to the operating system and cost a page fault per
# 4 KiB: measured at B 16, H 4, S 256, K 512 this was 115 ms against 150 ms for four layers, forward and
# backward.
_BLOCK_SCORES = {"cpu": 1 << 20}
_BLOCK_SCORES_ELSEWHERE = 1 << 27
# Queries in a block: later keys are hidden from a block as a whole, so short blocks skip masked work.
_BLOCK_QUERIES = {"cpu": 128}
_BLOCK_QUERIES_ELSEWHERE = 512


def sinusoid_table(n_distances: int, d_model: int) -> Tensor:
    """The fixed encoding R of distances `n_distances - 1` down to 0, `[n_distances, d_model]` float32.

    Farthest first, so that the encodings for K keys are the last rows of one table, whatever K is. Columns
    are the sines of all frequencies and then their cosines (Vaswani et al. 2017, with the halves side by
    side).

    >>> sinusoid_table(2, 4).shape, sinusoid_table(5, 4)[-1].tolist()    # the last row is distance 0
    (torch.Size([2, 4]), [0.0, 0.0, 1.0, 1.0])
    """
    n_frequencies = (d_model + 1) // 2
    exponents = torch.arange(n_frequencies, dtype=torch.float64) / n_frequencies
    distances = torch.arange(n_distances - 1, -1, -1, dtype=torch.float64)
    angles = distances[:, None] * torch.exp(-math.log(10000.0) * exponents)
    return torch.cat([angles.sin(), angles.cos()], dim=1)[:, :d_model].float()


def relative_shift(by_distance: Tensor) -> Tensor:
    """Scores by distance to scores by key: `[N, S, K + 1]` -> `[N, S, K]`, a view that shares memory.

    Column c of the input holds distance K - c; one more distance (column 0) than any query can reach makes
    the answer contiguous. Query i finds key j in column S - i + j, that is at i (K + 1) + S - i + j, or
    S + i K + j, of the flat row-major block: dropping the first S numbers and folding the rest into rows of K
    is the whole shift. Keys after the query (j > M + i) receive numbers of the next row; the mask must hide
    them.

    >>> import torch
    >>> relative_shift(torch.tensor([[[9, 2, 1, 0], [9, 2, 1, 0]]])).tolist()    # S 2, K 3: the distances
    [[[1, 0, 9], [2, 1, 0]]]
    """
    n, queries, columns = by_distance.shape
    return by_distance.view(n, queries * columns)[:, queries:].view(n, queries, columns - 1)


def undo_relative_shift(by_key: Tensor) -> Tensor:
    """The adjoint of `relative_shift`, `[N, S, K]` -> `[N, S, K + 1]`, for gradients 0 at masked keys."""
    n, queries, keys = by_key.shape
    flat = by_key.new_empty(n, queries * (keys + 1))
    flat[:, :queries] = 0
    flat[:, queries:] = by_key.reshape(n, queries * keys)
    return flat.view(n, queries, keys + 1)


def relative_attention(
    content_query: Tensor, position_query: Tensor, key_value: Tensor, relative_key: Tensor, mask: Tensor
) -> Tensor:
    """Causal attention over memory and segment with relative positions; returns `[B, S, H, Dh]`.

    Args:
        content_query: `[B, S, H, Dh]`, (q + u) / sqrt(Dh).
        position_query: `[B, S, H, Dh]`, (q + v) / sqrt(Dh).
        key_value: `[B, K, 2, H, Dh]`, keys and values of memory and segment, oldest first.
        relative_key: `[K + 1, H, Dh]`, r for the distances K down to 0 (K itself is never reached; it makes
            the relative shift a view).
        mask: `[B, S, K]` added to the scores: 0 where query i may see key j, -inf elsewhere. It must be -inf
            for every later key (j > K - S + i), and each query must see a key (itself).

    All in one floating type. The probabilities are kept for the backward pass; a second derivative is not
    defined.
    """
    return _RelativeAttention.apply(content_query, position_query, key_value, relative_key, mask)


class _RelativeAttention(torch.autograd.Function):
    """Block by block over rows of the batch and over queries; inside, heads come first: `[H * rows, ...]`."""

    @staticmethod
    def forward(
        ctx: Any,
        content_query: Tensor,
        position_query: Tensor,
        key_value: Tensor,
        relative_key: Tensor,
        mask: Tensor,
    ) -> Tensor:
        n_heads = content_query.shape[2]
        n_keys = key_value.shape[1]
        relative_key = relative_key.transpose(0, 1).contiguous()  # [H, K + 1, Dh]
        out = torch.empty_like(content_query, memory_format=torch.contiguous_format)
        kept = []
        for rows, queries, keys in _blocks(content_query, n_keys):
            distances = slice(n_keys - keys.stop, None)
            by_distance = torch.bmm(
                _per_head(position_query[rows, queries]), relative_key[:, distances].transpose(1, 2)
            ).view(-1, queries.stop - queries.start, keys.stop + 1)
            scores = torch.baddbmm(
                relative_shift(by_distance),
                _per_head_and_row(content_query[rows, queries]),
                _per_head_and_row(key_value[rows, keys, 0]).transpose(1, 2),
            )
            scores.view(n_heads, -1, *scores.shape[1:]).add_(mask[rows, queries, keys])
            probs = torch.softmax(scores, dim=-1)
            _put(out, rows, queries, torch.bmm(probs, _per_head_and_row(key_value[rows, keys, 1])))
            if any(ctx.needs_input_grad):
                kept.append(probs)
        ctx.save_for_backward(content_query, position_query, key_value, relative_key, *kept)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, None]:
        content_query, position_query, key_value, relative_key, *kept = ctx.saved_tensors
        n_keys = key_value.shape[1]
        grad_content = torch.empty_like(content_query, memory_format=torch.contiguous_format)
        grad_position = torch.empty_like(position_query, memory_format=torch.contiguous_format)
        grad_key_value = torch.empty_like(key_value, memory_format=torch.contiguous_format)
        # a distance is shared by all rows and blocks, so its gradient is summed in at least float32
        wide = torch.promote_types(relative_key.dtype, torch.float32)
        grad_relative = torch.zeros(relative_key.shape, dtype=wide, device=relative_key.device)
        n_heads = content_query.shape[2]
        for (rows, queries, keys), probs in zip(_blocks(content_query, n_keys), kept, strict=True):
            # the last queries of a row come first and reach every key: they write what the others add to
            put_or_add = _put if keys.stop == n_keys else _add
            distances = slice(n_keys - keys.stop, None)
            grad = _per_head_and_row(grad_out[rows, queries])
            grad_probs = torch.bmm(grad, _per_head_and_row(key_value[rows, keys, 1]).transpose(1, 2))
            grad_scores = torch.ops.aten._softmax_backward_data(grad_probs, probs, -1, probs.dtype)
            grad_value = torch.bmm(probs.transpose(1, 2), grad)
            put_or_add(grad_key_value[:, :, 1], rows, keys, grad_value)
            grad_key = torch.bmm(grad_scores.transpose(1, 2), _per_head_and_row(content_query[rows, queries]))
            put_or_add(grad_key_value[:, :, 0], rows, keys, grad_key)
            grad_query = torch.bmm(grad_scores, _per_head_and_row(key_value[rows, keys, 0]))
            _put(grad_content, rows, queries, grad_query)
            by_distance = undo_relative_shift(grad_scores).view(n_heads, -1, keys.stop + 1)
            _put(grad_position, rows, queries, torch.bmm(by_distance, relative_key[:, distances]))
            position = _per_head(position_query[rows, queries])
            grad_relative[:, distances] += torch.bmm(by_distance.transpose(1, 2), position)
        grad_relative = grad_relative.transpose(0, 1).to(relative_key.dtype)
        return grad_content, grad_position, grad_key_value, grad_relative, None


def _blocks(query: Tensor, n_keys: int) -> Iterator[tuple[slice, slice, slice]]:
    """(rows of the batch, queries, keys that these queries reach), the last queries of a row first."""
    batch, n_queries, n_heads = query.shape[:3]
    device = query.device.type
    step = min(n_queries, _BLOCK_QUERIES.get(device, _BLOCK_QUERIES_ELSEWHERE))
    n_rows = max(1, _BLOCK_SCORES.get(device, _BLOCK_SCORES_ELSEWHERE) // (n_heads * step * n_keys))
    for row in range(0, batch, n_rows):
        for stop in range(n_queries, 0, -step):
            queries = slice(max(stop - step, 0), stop)
            yield slice(row, min(row + n_rows, batch)), queries, slice(0, n_keys - n_queries + stop)


def _per_head(x: Tensor) -> Tensor:
    """`[rows, n, H, Dh]` -> `[H, rows * n, Dh]`."""
    return x.permute(2, 0, 1, 3).reshape(x.shape[2], -1, x.shape[3])


def _per_head_and_row(x: Tensor) -> Tensor:
    """`[rows, n, H, Dh]` -> `[H * rows, n, Dh]`."""
    return x.permute(2, 0, 1, 3).reshape(-1, x.shape[1], x.shape[3])


def _put(target: Tensor, rows: slice, positions: slice, value: Tensor) -> None:
    """Write `[H * rows, n, Dh]` to its place in `[B, N, H, Dh]`."""
    place = target[rows, positions].permute(2, 0, 1, 3)
    place.copy_(value.view(place.shape))


def _add(target: Tensor, rows: slice, positions: slice, value: Tensor) -> None:
    place = target[rows, positions].permute(2, 0, 1, 3)
    place.add_(value.view(place.shape))
