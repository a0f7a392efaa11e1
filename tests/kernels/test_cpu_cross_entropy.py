"""The cross-entropy kernel against float64: losses, both gradients, ignored targets, odd sizes, extreme logits."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from cpu_kernel_helpers import close, needs

from moekit.kernels.cpu.cross_entropy import fits, linear_cross_entropy_cpu
from moekit.kernels.cross_entropy import IGNORED, linear_cross_entropy

needs_kernel = needs("linear_cross_entropy")

SIZES = {  # N, D, V
    "one": (1, 32, 1),
    "small": (5, 32, 3),
    "rests": (70, 64, 131),
    "several chunks": (1030, 32, 257),
    "panels": (64, 96, 512),
}


def exact(hidden, weight, targets):
    leaves = [part.detach().double().requires_grad_() for part in (hidden, weight)]
    each = F.cross_entropy(leaves[0] @ leaves[1].t(), targets, reduction="none", ignore_index=IGNORED)
    mean = each.sum() / (targets != IGNORED).sum().clamp(min=1)
    return mean, each, *torch.autograd.grad(mean, leaves)


@needs_kernel
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES.keys())
@pytest.mark.parametrize("ignored", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [1.0, -2.5])
def test_equals_float64(sizes, ignored, dtype, scale) -> None:
    n, d, v = sizes
    hidden = torch.randn(n, d).bfloat16().to(dtype).requires_grad_()
    weight = torch.randn(v, d).bfloat16().requires_grad_(False).float().requires_grad_()
    targets = torch.where(torch.rand(n) < ignored, IGNORED, torch.randint(0, v, (n,)))
    mean, each, *gradients = exact(hidden, weight, targets)
    ours, losses = linear_cross_entropy_cpu(hidden, weight, targets, IGNORED)
    assert (ours.dtype, losses.dtype, losses.requires_grad) == (torch.float32, torch.float32, False)
    torch.testing.assert_close(losses.double(), each, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours.double(), mean, rtol=1e-5, atol=1e-5)
    found = torch.autograd.grad(ours, (hidden, weight), torch.tensor(scale))
    for name, part, leaf, theirs in zip(
        ("hidden", "weight"), found, (hidden, weight), gradients, strict=True
    ):
        assert part.dtype == leaf.dtype
        close(part, scale * theirs, name)
    with torch.no_grad():
        assert linear_cross_entropy_cpu(hidden, weight, targets, IGNORED)[1].equal(losses)


@needs_kernel
@pytest.mark.parametrize("wanted", [(True, False), (False, True)])
def test_only_the_gradient_that_is_wanted(wanted) -> None:
    hidden, weight, targets = torch.randn(40, 32).bfloat16(), torch.randn(70, 32), torch.randint(0, 70, (40,))
    leaves = [hidden.requires_grad_(wanted[0]), weight.bfloat16().float().requires_grad_(wanted[1])]
    gradients = exact(*leaves, targets)[2:]
    linear_cross_entropy_cpu(*leaves, targets, IGNORED)[0].backward()
    for leaf, theirs, wants in zip(leaves, gradients, wanted, strict=True):
        assert (leaf.grad is not None) == wants
        if wants:
            close(leaf.grad, theirs, "gradient")


@needs_kernel
def test_every_number_of_threads_gives_the_same_bits() -> None:
    h, w, t = torch.randn(700, 32), torch.randn(200, 32), torch.randint(0, 200, (700,))
    before, found = torch.get_num_threads(), []
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            hidden, weight = h.clone().requires_grad_(), w.clone().requires_grad_()
            mean, each = linear_cross_entropy_cpu(hidden, weight, t, IGNORED)
            found.append((each, *torch.autograd.grad(mean, (hidden, weight))))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@needs_kernel
def test_large_logits_saturate_and_nan_is_seen() -> None:
    hidden = torch.zeros(2, 32)
    hidden[0, 0], hidden[0, 1] = 1e4, -1e4
    weight = torch.zeros(100, 32)
    weight[0, 0] = weight[70, 1] = 1.0
    hidden.requires_grad_()
    mean, each = linear_cross_entropy_cpu(hidden, weight, torch.tensor([70, IGNORED]), IGNORED)
    mean.backward()
    # 1e4 in bfloat16 is 9984
    assert each.tolist() == [2 * 9984.0, 0.0]
    assert hidden.grad[0, :2].tolist() == [1.0, -1.0]
    bad = hidden.detach().clone()
    bad[0, 5] = torch.nan
    assert linear_cross_entropy_cpu(bad, weight, torch.tensor([70, IGNORED]), IGNORED)[0].isnan()


@needs_kernel
@pytest.mark.parametrize("target", [-1, 70, -99])
def test_a_target_outside_the_vocabulary_is_an_error(target) -> None:
    with pytest.raises(IndexError, match=rf"target {target} is out of bounds for 70"):
        linear_cross_entropy_cpu(torch.randn(2, 32), torch.randn(70, 32), torch.tensor([0, target]), IGNORED)


@needs_kernel
def test_autocast_takes_it_where_it_fits(monkeypatch) -> None:
    import moekit.kernels.cpu.cross_entropy as kernel

    def refuse(*args):
        raise AssertionError("the kernel was called")

    monkeypatch.setattr(kernel._LinearCrossEntropy, "apply", refuse)
    targets = torch.zeros(3, dtype=torch.long)
    linear_cross_entropy(torch.randn(3, 32), torch.randn(5, 32), targets)  # float32
    with torch.autocast("cpu", torch.bfloat16):
        linear_cross_entropy(torch.randn(3, 24), torch.randn(5, 24), targets)
        with pytest.raises(AssertionError, match="was called"):
            linear_cross_entropy(torch.randn(3, 32), torch.randn(5, 32), targets)
    assert "multiple of 32; got 24" in fits(24)


@needs_kernel
def test_no_position_at_all() -> None:
    hidden, weight = torch.randn(0, 32, requires_grad=True), torch.randn(5, 32, requires_grad=True)
    mean, each = linear_cross_entropy_cpu(hidden, weight, torch.zeros(0, dtype=torch.long), IGNORED)
    mean.backward()
    assert (mean.item(), each.shape) == (0.0, (0,))
    assert not weight.grad.any()
