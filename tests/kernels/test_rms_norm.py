"""RMSNorm: both ways against the definition in float64, outputs and gradients."""

from __future__ import annotations

import pytest
import torch

from moekit.kernels.rms_norm import rms_norm, rms_norm_reference
from moekit.layers.norm import RMSNorm


@pytest.mark.parametrize("shape", [(1, 1), (5,), (3, 7), (2, 3, 16), (0, 4), (2, 1, 3, 5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("eps", [1e-6, 0.5])
def test_against_the_definition(shape: tuple[int, ...], dtype: torch.dtype, eps: float) -> None:
    x = (3 * torch.randn(shape)).to(dtype).requires_grad_()
    weight = torch.rand(shape[-1]).add(0.5).requires_grad_()
    exact_x, exact_weight = (leaf.detach().double().requires_grad_() for leaf in (x, weight))
    direction = torch.randn(shape)
    out = rms_norm(x, weight, eps)
    expected = exact_x / (exact_x.square().mean(dim=-1, keepdim=True) + eps).sqrt() * exact_weight
    assert out.dtype == dtype
    assert out.shape == shape
    tolerance = {"rtol": 0.03, "atol": 0.05} if dtype == torch.bfloat16 else {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(out.double(), expected, **tolerance)
    (out.double() * direction).sum().backward()
    (expected * direction).sum().backward()
    torch.testing.assert_close(x.grad.double(), exact_x.grad, **tolerance)
    torch.testing.assert_close(weight.grad.double(), exact_weight.grad, **tolerance)
    reference = rms_norm_reference(x.detach(), weight.detach().to(dtype), eps)
    torch.testing.assert_close(out.detach(), reference, **tolerance)


def test_rows_of_zeros_and_of_huge_numbers() -> None:
    x = torch.tensor([[0.0, 0.0], [1e18, -1e18]], requires_grad=True)
    out = rms_norm(x, torch.ones(2), 1e-6)
    out.sum().backward()
    assert out[0].tolist() == [0.0, 0.0]
    assert out[1].tolist() == pytest.approx([1.0, -1.0])
    assert x.grad.isfinite().all()


def test_input_that_is_not_contiguous() -> None:
    x, weight = torch.randn(4, 6).t(), torch.rand(4)
    torch.testing.assert_close(rms_norm(x, weight, 1e-6), rms_norm_reference(x, weight, 1e-6))


def test_module_in_autocast_keeps_the_type_of_its_input() -> None:
    norm = RMSNorm(8, eps=1e-5)
    assert "8, eps=1e-05" in repr(norm)
    for dtype in (torch.float32, torch.bfloat16):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert norm(torch.randn(2, 8, dtype=dtype)).dtype == dtype


def test_a_second_derivative_is_refused() -> None:
    x = torch.randn(3, 4, requires_grad=True)
    (gradient,) = torch.autograd.grad(rms_norm(x, torch.ones(4), 1e-6).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()
