"""Explicit attention against one query at a time, outputs and gradients."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from moekit.kernels.attention import attention, explicit_attention

SHAPES = {  # B, H, S, L, N
    "square": (2, 3, 6, 6, 4),
    "one query": (1, 2, 1, 5, 4),
    "one key": (2, 1, 1, 1, 3),
    "more keys": (2, 2, 3, 8, 5),
}


def plain(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    length, keys = q.shape[2], k.shape[2]
    scores = torch.einsum("bhsn,bhln->bhsl", q, k) / math.sqrt(q.shape[-1])
    if mask is None:
        # the last query sees all keys
        mask = torch.arange(keys)[None, :] <= torch.arange(keys - length, keys)[:, None]
    weights = torch.where(mask, scores.exp(), 0.0)
    return torch.einsum("bhsl,bhln->bhsn", weights / weights.sum(dim=-1, keepdim=True), v)


def some_mask(batch: int, length: int, keys: int) -> Tensor:
    mask = torch.rand(batch, 1, length, keys) > 0.5
    mask[..., 0] = True
    return mask


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_explicit_attention(shape: tuple[int, ...], masked: bool, dtype: torch.dtype) -> None:
    batch, heads, length, keys, width = shape
    sizes = [(batch, heads, length, width), (batch, heads, keys, width), (batch, heads, keys, width)]
    # as they come from a projection: not contiguous
    ours = [torch.randn(b, s, h, n).to(dtype).transpose(1, 2).requires_grad_() for b, h, s, n in sizes]
    exact = [part.detach().double().requires_grad_() for part in ours]
    mask = some_mask(batch, length, keys) if masked else None
    direction = torch.randn(sizes[0])
    out, expected = explicit_attention(*ours, mask), plain(*exact, mask)
    assert out.dtype == dtype
    tolerance = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 0.05, "atol": 0.03}
    torch.testing.assert_close(out.double(), expected, **tolerance)
    (out.float() * direction).sum().backward()
    (expected * direction).sum().backward()
    for mine, other in zip(ours, exact, strict=True):
        assert mine.grad.dtype == dtype
        torch.testing.assert_close(mine.grad.double(), other.grad, **tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_whichever_way_is_taken(dtype: torch.dtype, requires_grad: bool, masked: bool) -> None:
    q, k, v = (torch.randn(2, 2, 5, 4).to(dtype).requires_grad_(requires_grad) for _ in range(3))
    mask = some_mask(2, 5, 5) if masked else None
    expected = plain(q.double(), k.double(), v.double(), mask)
    tolerance = 1e-5 if dtype == torch.float32 else 0.03
    torch.testing.assert_close(attention(q, k, v, mask).double(), expected, rtol=0.02, atol=tolerance)
    # a single new query sees every held key, mask or not
    one = attention(q[:, :, -1:], k, v, None)
    torch.testing.assert_close(
        one.double(), plain(q.double(), k.double(), v.double(), None)[:, :, -1:], rtol=0.02, atol=tolerance
    )


def test_scores_are_scaled_in_any_size() -> None:
    q = torch.full((1, 1, 2, 4), 100.0).bfloat16().requires_grad_()
    out = explicit_attention(q, q, torch.eye(2, 4).bfloat16()[None, None], None)
    assert out.isfinite().all()
    assert out[0, 0].tolist() == [[1.0, 0.0, 0.0, 0.0], [0.5, 0.5, 0.0, 0.0]]


def test_a_second_derivative_is_refused() -> None:
    q = torch.randn(1, 1, 2, 4, requires_grad=True)
    (gradient,) = torch.autograd.grad(explicit_attention(q, q, q, None).sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match=r"once_differentiable|does not require grad"):
        gradient.sum().backward()
