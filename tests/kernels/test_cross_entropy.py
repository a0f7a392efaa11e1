"""Blockwise cross-entropy against the plain one: values, gradients, ignored targets, errors."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from moekit.kernels.cross_entropy import linear_cross_entropy, linear_cross_entropy_reference

TARGETS = {
    "all count": [0, 4, 2, 6, 1, 1, 3, 5, 0, 2],
    "some ignored": [0, -100, 2, -100, -100, 1, 3, 5, -100, 2],
    "a whole block ignored": [0, 4, 2, -100, -100, -100, 3, 5, 0, 2],
    "one counts": [-100] * 9 + [3],
    "none counts": [-100] * 10,
}


def run(function, targets: torch.Tensor, scale: float = 1.0, **options: int):
    """Mean, losses and gradients of `scale` times the mean, for the same numbers each time."""
    generator = torch.Generator().manual_seed(7)
    hidden = torch.randn(len(targets), 5, generator=generator).requires_grad_()
    weight = torch.randn(7, 5, generator=generator).requires_grad_()
    mean, each = function(hidden, weight, targets, **options)
    (scale * mean).backward()
    return mean.detach(), each.detach(), hidden.grad, weight.grad


@pytest.mark.parametrize("targets", TARGETS.values(), ids=TARGETS.keys())
@pytest.mark.parametrize("block", [1, 3, 5, 10, 256])  # 3 does not divide 10
@pytest.mark.parametrize("scale", [1.0, -2.5])
def test_equals_the_reference(targets: list[int], block: int, scale: float) -> None:
    ours = run(linear_cross_entropy, torch.tensor(targets), scale, block=block)
    theirs = run(linear_cross_entropy_reference, torch.tensor(targets), scale)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-6)


def test_reference_equals_pytorch_and_zero_where_nothing_counts() -> None:
    hidden, weight, targets = torch.randn(6, 5), torch.randn(7, 5), torch.tensor([0, 1, -100, 6, 3, -100])
    mean, each = linear_cross_entropy_reference(hidden, weight, targets)
    logits = hidden @ weight.t()
    torch.testing.assert_close(mean, F.cross_entropy(logits, targets))
    torch.testing.assert_close(each, F.cross_entropy(logits, targets, reduction="none"))
    mean, each, grad_hidden, grad_weight = run(linear_cross_entropy, torch.full((4,), -100))
    assert mean == 0
    assert not each.any()
    assert not grad_hidden.any()
    assert not grad_weight.any()


def test_no_position_at_all() -> None:
    mean, each, grad_hidden, grad_weight = run(linear_cross_entropy, torch.zeros(0, dtype=torch.long))
    assert (mean.item(), each.shape, grad_hidden.shape) == (0.0, (0,), (0, 5))
    assert not grad_weight.any()


def test_large_logits_do_not_overflow() -> None:
    hidden = torch.tensor([[1e4, -1e4]], requires_grad=True)
    weight = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.5, 0.5]])
    mean, _ = linear_cross_entropy(hidden, weight, torch.tensor([1]))
    mean.backward()
    assert mean.item() == pytest.approx(2e4)
    assert hidden.grad.tolist() == [[1.0, -1.0]]


@pytest.mark.parametrize("wanted", ["hidden", "weight"])
def test_only_one_side_needs_a_gradient(wanted: str) -> None:
    hidden = torch.randn(4, 5, requires_grad=wanted == "hidden")
    weight = torch.randn(7, 5, requires_grad=wanted == "weight")
    targets = torch.tensor([0, 1, -100, 6])
    linear_cross_entropy(hidden, weight, targets)[0].backward()
    ours = hidden.grad if wanted == "hidden" else weight.grad
    leaf = hidden if wanted == "hidden" else weight
    (theirs,) = torch.autograd.grad(linear_cross_entropy_reference(hidden, weight, targets)[0], leaf)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_bf16_autocast() -> None:
    hidden = torch.randn(50, 16, requires_grad=True)
    weight = torch.randn(30, 16, requires_grad=True)
    targets = torch.randint(0, 30, (50,))
    exact, _ = linear_cross_entropy_reference(hidden, weight, targets)
    exact_grads = torch.autograd.grad(exact, (hidden, weight))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mean, each = linear_cross_entropy(hidden, weight, targets, block=16)
    assert (mean.dtype, each.dtype) == (torch.float32, torch.float32)
    assert mean.item() == pytest.approx(exact.item(), rel=5e-3)
    for ours, theirs in zip(torch.autograd.grad(mean, (hidden, weight)), exact_grads, strict=True):
        assert ours.dtype == torch.float32
        assert (ours - theirs).norm() < 0.02 * theirs.norm()


def test_losses_of_positions_carry_no_gradient() -> None:
    weight = torch.randn(7, 5, requires_grad=True)
    _, each = linear_cross_entropy(torch.randn(3, 5), weight, torch.tensor([0, 1, 2]))
    assert not each.requires_grad


@pytest.mark.parametrize("guard", [torch.no_grad, torch.inference_mode])
def test_evaluation_computes_no_gradient(guard) -> None:
    hidden, weight = torch.randn(6, 5), torch.nn.Parameter(torch.randn(7, 5))
    with FlopCounterMode(display=False) as counter, guard():
        linear_cross_entropy(hidden, weight, torch.tensor([0, 1, 2, 3, 4, 5]))
    assert counter.get_total_flops() == 2 * 6 * 5 * 7  # the logits alone


@pytest.mark.parametrize("target", [-1, 7, -99])
def test_a_target_outside_the_vocabulary_is_an_error(target: int) -> None:
    with pytest.raises((RuntimeError, IndexError), match="out of bounds"):
        linear_cross_entropy(torch.randn(2, 5), torch.randn(7, 5), torch.tensor([0, target]))


def test_a_second_derivative_is_refused() -> None:
    hidden = torch.randn(3, 5, requires_grad=True)
    mean, _ = linear_cross_entropy(hidden, torch.randn(7, 5), torch.tensor([0, 1, 2]))
    (gradient,) = torch.autograd.grad(mean, hidden, create_graph=True)
    with pytest.raises(RuntimeError, match=r"once_differentiable|does not require grad"):
        gradient.sum().backward()
