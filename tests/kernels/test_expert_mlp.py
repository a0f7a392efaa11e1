"""Every implementation of the experts' feed-forward against the reference, and that against a plain loop."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moekit.config.errors import ConfigError
from moekit.kernels.expert_mlp import CPU_BLOCK, expert_mlp_reference
from moekit.kernels.expert_weights import KINDS, Activation, ExpertWeights
from moekit.kernels.registry import available, pick

ACTIVATIONS = tuple(KINDS)
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


def activation_of(kind: str) -> Activation:
    return Activation(kind, 1.7, 0.9, 1.0) if kind == "clamped_swiglu" else Activation(kind)


def problem(
    counts: list[int], sizes: tuple[int, int, int], activation: str, bias: bool, dtype: torch.dtype
) -> tuple[list[Tensor | None], Tensor]:
    """Leaf tensors (rows, w_in, w_out, b_in, b_out), and the direction in which to differentiate."""
    d, f, o = sizes
    inner = 2 * f if Activation(activation).gated else f
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
    weights = ExpertWeights(w_in, w_out, b_in, b_out, activation_of(activation))
    out = kernel(rows, torch.tensor(counts), weights)
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
            assert (ours.float() - theirs).norm() <= (
                0.06 if activation in ("relu", "clamped_swiglu") else 0.02
            ) * theirs.norm()


def gelu_tanh(x: Tensor) -> Tensor:
    return x * 0.5 * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)))


def clamped(gate: Tensor, up: Tensor) -> Tensor:
    gate, up = torch.where(gate > 0.9, 0.9, gate), torch.where(up.abs() > 0.9, 0.9 * up.sign(), up)
    return gate / (1 + (-1.7 * gate).exp()) * (up + 1)


def by_definition(hidden: Tensor, activation: str) -> Tensor:
    gate, up = hidden[:5], hidden[5:]
    return {
        "swiglu": lambda: gate * gate.sigmoid() * up,
        "geglu": lambda: gate * torch.special.ndtr(gate) * up,
        "geglu_tanh": lambda: gelu_tanh(gate) * up,
        "clamped_swiglu": lambda: clamped(gate, up),
        "gelu": lambda: hidden * torch.special.ndtr(hidden),
        "gelu_tanh": lambda: gelu_tanh(hidden),
        "relu": lambda: hidden.clamp(min=0),
        "relu_squared": lambda: hidden.clamp(min=0) ** 2,
        "silu": lambda: hidden / (1 + (-hidden).exp()),
        "sigmoid": lambda: 1 / (1 + (-hidden).exp()),
    }[activation]()


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
        hidden = by_definition(hidden, activation)
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
    assert Activation("relu")(x).tolist() == [0.0, 0.0, 2.0, 3.0]
    assert Activation("relu_squared")(x).tolist() == [0.0, 0.0, 4.0, 9.0]
    assert Activation("sigmoid")(x)[1].item() == 0.5
    assert Activation("gelu")(x)[2].item() == pytest.approx(2 * 0.9772499, rel=1e-6)  # 2 * Phi(2)
    # gate (-1, 0), up (2, 3): silu(-1) = -0.26894142
    assert Activation("swiglu")(x).tolist() == pytest.approx([2 * -0.26894142, 0.0])
    # alternating: gate (-1, 2), up (0, 3); silu(2) = 1.7615942
    assert Activation("swiglu")(x, interleaved=True).tolist() == pytest.approx([0.0, 3 * 1.7615942])
    # gate (-1, 0), up (1.5, 1.5) + 0.5
    clamped = Activation("clamped_swiglu", alpha=1.0, limit=1.5, offset=0.5)(x)
    assert clamped.tolist() == pytest.approx([2 * -0.26894142, 0.0])


def test_an_unknown_activation_is_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"activation must be one of swiglu.*got 'swigul'. did you mean 'swiglu'"
    ):
        Activation("swigul")
