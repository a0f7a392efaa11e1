"""Every implementation of the experts' feed-forward against the reference, and that against a plain loop."""

from __future__ import annotations

from typing import get_args

import pytest
import torch
from torch import Tensor

from moekit.config.moe import Activation
from moekit.kernels.expert_mlp import CPU_BLOCK, activate, expert_mlp_reference
from moekit.kernels.registry import available, pick

ACTIVATIONS = get_args(Activation)
# rows of each expert: odd numbers, empty experts at every end, all at one, one row, none, more than a block
COUNTS = {
    "odd": [3, 7, 1, 5],
    "empty ends": [0, 9, 4, 0],
    "empty middle": [5, 0, 0, 2],
    "all at one": [0, 0, 13, 0],
    "one row": [0, 0, 0, 1],
    "no row": [0, 0, 0, 0],
    "over a block": [CPU_BLOCK + 1, 0, CPU_BLOCK, CPU_BLOCK - 1],
}
# D, F, O: multiples of 8 take the fast way, others must fall back
SIZES = {"eights": (16, 24, 16), "other output": (8, 16, 32), "odd": (7, 5, 3)}


def problem(
    counts: list[int], sizes: tuple[int, int, int], activation: str, bias: bool, dtype: torch.dtype
) -> tuple[list[Tensor | None], Tensor]:
    """Leaf tensors (rows, w_in, w_out, b_in, b_out), and the direction in which to differentiate."""
    d, f, o = sizes
    inner = 2 * f if activation == "swiglu" else f
    shapes = [(sum(counts), d), (len(counts), inner, d), (len(counts), o, f)]
    shapes += [(len(counts), inner), (len(counts), o)] if bias else []
    leaves: list[Tensor | None] = [
        (torch.randn(shape) * (0.3 if i in (1, 2) else 1.0)).to(dtype).requires_grad_()
        for i, shape in enumerate(shapes)
    ]
    return leaves + [None] * (5 - len(leaves)), torch.randn(sum(counts), o)


def outputs_and_gradients(
    kernel, leaves: list[Tensor | None], counts: list[int], activation: str, direction: Tensor
):
    rows, w_in, w_out, b_in, b_out = leaves
    out = kernel(rows, torch.tensor(counts), w_in, w_out, b_in, b_out, activation)
    given = [leaf for leaf in leaves if leaf is not None]
    return out, torch.autograd.grad((out.float() * direction).sum(), given)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES.keys())
@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS.keys())
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_fast_paths_equal_the_reference(
    activation: str, counts: list[int], sizes: tuple[int, int, int], bias: bool
) -> None:
    names = [name for name, usable, _ in available("expert_mlp") if usable and name != "reference"]
    if not names:
        pytest.skip("only the reference runs here")
    leaves, direction = problem(counts, sizes, activation, bias, torch.bfloat16)
    exact_leaves = [None if leaf is None else leaf.detach().float().requires_grad_() for leaf in leaves]
    exact, exact_grads = outputs_and_gradients(
        expert_mlp_reference, exact_leaves, counts, activation, direction
    )
    for name in names:
        kernel = pick("expert_mlp", "cpu", torch.bfloat16, name).function
        out, grads = outputs_and_gradients(kernel, leaves, counts, activation, direction)
        assert out.dtype == torch.bfloat16
        for ours, theirs in [(out, exact), *zip(grads, exact_grads, strict=True)]:
            assert ours.shape == theirs.shape
            assert ours.isfinite().all()
            # bfloat16 keeps 8 bits: compare with the size of the whole; some inputs round over relu's kink
            assert (ours.float() - theirs).norm() <= (0.06 if activation == "relu" else 0.02) * theirs.norm()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("counts", [c for c in COUNTS.values() if 0 < sum(c) < 20])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_reference_equals_one_row_at_a_time(activation: str, counts: list[int], bias: bool) -> None:
    leaves, direction = problem(counts, SIZES["odd"], activation, bias, torch.float64)
    rows, w_in, w_out, b_in, b_out = leaves
    expert_of_row = [e for e, n in enumerate(counts) for _ in range(n)]
    answers = []
    for row, e in zip(rows, expert_of_row, strict=True):
        hidden = (w_in[e] * row).sum(dim=1) + (b_in[e] if bias else 0)
        hidden = {
            "swiglu": lambda h: h[:5] * h[:5].sigmoid() * h[5:],
            "gelu": lambda h: h * torch.special.ndtr(h),
            "relu": lambda h: h.clamp(min=0),
            "sigmoid": lambda h: 1 / (1 + (-h).exp()),
        }[activation](hidden)
        answers.append(((w_out[e] * hidden).sum(dim=1) + (b_out[e] if bias else 0))[None])
    expected = torch.cat(answers)
    given = [leaf for leaf in leaves if leaf is not None]
    expected_grads = torch.autograd.grad((expected * direction).sum(), given, allow_unused=True)
    out, grads = outputs_and_gradients(expert_mlp_reference, leaves, counts, activation, direction)
    torch.testing.assert_close(out, expected)
    for ours, theirs, leaf in zip(grads, expected_grads, given, strict=True):
        # an expert without a row has a gradient of zero, not none
        torch.testing.assert_close(
            ours, torch.zeros_like(leaf) if theirs is None else theirs, rtol=1e-5, atol=1e-6
        )


def test_activations_by_hand() -> None:
    x = torch.tensor([-1.0, 0.0, 2.0, 3.0])
    assert activate(x, "relu").tolist() == [0.0, 0.0, 2.0, 3.0]
    assert activate(x, "sigmoid")[1].item() == 0.5
    assert activate(x, "gelu")[2].item() == pytest.approx(2 * 0.9772499, rel=1e-6)  # 2 * Phi(2)
    # gate (-1, 0), up (2, 3): silu(-1) = -0.26894142
    assert activate(x, "swiglu").tolist() == pytest.approx([2 * -0.26894142, 0.0])
