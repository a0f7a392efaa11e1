"""Norm with residual sum, the gated activation, and routing's sorts on the CPU against their definitions."""

from __future__ import annotations

import pytest
import torch
from cpu_kernel_helpers import close, needs

from moekit.kernels.cpu.elementwise import add_rms_norm_cpu, norm_fits, swiglu_cpu, swiglu_fits
from moekit.kernels.cpu.library import SWITCH
from moekit.kernels.registry import available, find
from moekit.kernels.rms_norm import add_rms_norm
from moekit.kernels.routing import sort_by_expert, top_k
from moekit.kernels.swiglu import swiglu, swiglu_reference


@needs("add_rms_norm")
@pytest.mark.parametrize("shape", [(1, 16), (0, 16), (3, 5, 48), (200, 32)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("with_delta", [False, True])
@pytest.mark.parametrize("used", ["both", "sum", "norm"])
def test_norm_and_sum(shape, dtype, with_delta, used) -> None:
    x = (2 * torch.randn(shape)).requires_grad_()
    delta = torch.randn(shape).bfloat16().requires_grad_() if with_delta else None
    weight = torch.rand(shape[-1]).add(0.5).requires_grad_()
    leaves = [leaf for leaf in (x, delta, weight) if leaf is not None]
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    expected = exact[0] + exact[1] if with_delta else exact[0]
    normed = expected / (expected.square().mean(-1, keepdim=True) + 1e-6).sqrt() * exact[-1]
    total, ours = add_rms_norm_cpu(x, delta, weight, 1e-6, dtype)
    assert (total.dtype, ours.dtype) == (torch.float32, dtype)
    close(total, expected, "sum", 1e-6)
    close(ours, normed, "norm", 1e-6 if dtype == torch.float32 else 0.004)
    ways = [torch.randn(shape), torch.randn(shape).to(dtype)]
    outs = {"both": (0, 1), "sum": (0,), "norm": (1,)}[used]
    theirs = torch.autograd.grad(
        [(expected, normed)[i] for i in outs], exact, [ways[i].double() for i in outs],
        allow_unused=True, materialize_grads=True,
    )  # fmt: skip
    found = torch.autograd.grad(
        [(total, ours)[i] for i in outs],
        leaves,
        [ways[i] for i in outs],
        allow_unused=True,
        materialize_grads=True,
    )
    for leaf, mine, other in zip(leaves, found, theirs, strict=True):
        assert mine.dtype == leaf.dtype
        close(mine, other, str(leaf.shape), 0.004 if leaf.dtype == torch.bfloat16 else 1e-5)


@needs("add_rms_norm")
def test_the_norm_for_products_is_the_cast_of_the_other() -> None:
    x, delta, weight = torch.randn(4, 32), torch.randn(4, 32).bfloat16(), torch.rand(32)
    with torch.autocast("cpu", torch.bfloat16):
        total, fine = add_rms_norm(x, delta, weight, 1e-6)
        same, coarse = add_rms_norm(x, delta, weight, 1e-6, for_products=True)
    assert total.equal(same)
    assert fine.dtype == torch.float32
    assert fine.bfloat16().equal(coarse)
    plain_total, plain = add_rms_norm(x, delta.float(), weight, 1e-6)  # float32: the plain way
    torch.testing.assert_close(plain_total, total)
    torch.testing.assert_close(plain, fine)
    assert "multiple of 16; got 24" in norm_fits(24)
    with torch.autocast("cpu", torch.bfloat16):
        assert add_rms_norm(torch.randn(2, 24), None, torch.ones(24), 1e-6)[1].shape == (2, 24)


@needs("swiglu")
@pytest.mark.parametrize("width", [16, 17, 31, 48, 360])
@pytest.mark.parametrize("rows", [(0,), (1,), (2, 70)])
def test_swiglu(width, rows) -> None:
    hidden = (3 * torch.randn(*rows, 2 * width)).bfloat16().requires_grad_()
    exact = hidden.detach().double().requires_grad_()
    out, expected = swiglu_cpu(hidden), swiglu_reference(exact)
    direction = torch.randn(*rows, width).bfloat16()
    close(out, expected, "output", 0.004)
    (ours,), (theirs,) = (
        torch.autograd.grad(out, hidden, direction),
        torch.autograd.grad(expected, exact, direction),
    )
    close(ours, theirs, "gradient", 0.004)


@needs("swiglu")
def test_swiglu_at_the_ends_of_the_range_and_where_it_does_not_fit() -> None:
    gate = torch.tensor([-1e30, -200.0, -0.0, 0.0, 200.0, 1e30, torch.nan, torch.inf] * 2)
    hidden = torch.cat([gate, torch.ones(16)]).bfloat16()
    torch.testing.assert_close(swiglu(hidden), swiglu_reference(hidden), equal_nan=True, rtol=0.01, atol=1e-6)
    assert "at least 16; got 8" in swiglu_fits(8)
    narrow = torch.randn(3, 16).bfloat16()
    assert swiglu(narrow).equal(swiglu_reference(narrow))
    across = torch.randn(40, 3).bfloat16().t()  # not contiguous
    close(swiglu(across), swiglu_reference(across.double()), "not contiguous", 0.004)


@needs("top_k", torch.float32)
@pytest.mark.parametrize("sizes", [(1, 1, 1), (600, 32, 2), (7, 9, 9), (5, 3, 1), (0, 4, 2)])
def test_top_k_is_that_of_torch(sizes) -> None:
    n, experts, k = sizes
    values = torch.rand(n, experts)
    assert top_k(values, k).equal(values.topk(k, dim=-1).indices)
    assert top_k(values.t().contiguous().t(), k).equal(values.topk(k, dim=-1).indices)


@needs("top_k", torch.float32)
def test_top_k_with_ties_nan_and_infinities() -> None:
    values = torch.tensor([[1.0, 2.0, 2.0, 0.0], [torch.nan, 5.0, 1.0, 1.0], [-torch.inf] * 4])
    assert top_k(values, 2).tolist() == [[1, 2], [0, 1], [0, 1]]
    with pytest.raises(RuntimeError, match="out of range"):
        top_k(values, 5)


@needs("sort_by_expert", torch.int64)
@pytest.mark.parametrize("experts", [[], [0], [2, 0, 2, 1, 0], [3] * 5])
def test_sort_by_expert_is_a_stable_sort(experts) -> None:
    experts = torch.tensor(experts, dtype=torch.long)
    order, counts = sort_by_expert(experts, 4)
    assert order.equal(experts.argsort(stable=True))
    assert counts.equal(experts.bincount(minlength=4))
    with pytest.raises(IndexError, match=r"0\.\.3"):
        sort_by_expert(torch.tensor([4]), 4)


def test_the_switch_turns_all_of_them_off(monkeypatch) -> None:
    monkeypatch.setenv(SWITCH, "0")
    find.cache_clear()
    try:
        for op, dtype in {
            "add_rms_norm": torch.bfloat16, "swiglu": torch.bfloat16, "rotary_attention": torch.bfloat16,
            "linear_cross_entropy": torch.bfloat16, "top_k": torch.float32, "sort_by_expert": torch.int64,
        }.items():  # fmt: skip
            assert find(op, "cpu", dtype) is None
            assert SWITCH in available(op, "cpu", dtype)[0][2]
        order, counts = sort_by_expert(torch.tensor([1, 0, 1]), 2)
        assert (order.tolist(), counts.tolist()) == ([1, 0, 2], [1, 2])
        assert top_k(torch.tensor([[0.1, 0.3]]), 1).tolist() == [[1]]
    finally:
        monkeypatch.undo()
        find.cache_clear()
