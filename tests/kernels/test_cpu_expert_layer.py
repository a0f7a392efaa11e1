"""The fused CPU layer against the reference in float64: outputs, all gradients, odd numbers of rows, every width."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

import moekit
from moekit.config.errors import ConfigError
from moekit.kernels.cpu.expert_layer import ACTIVATIONS, SWITCH, expert_layer_cpu, fits
from moekit.kernels.expert_mlp import expert_mlp_reference
from moekit.kernels.registry import available, find

_, CAN_RUN, WHY = available("expert_layer")[0]
needs_kernel = pytest.mark.skipif(not CAN_RUN, reason=f"the fused CPU layer cannot run here: {WHY}")

# rows of each expert: multiples of a block and not, one, none, all at one
COUNTS = {
    "odd": [3, 70, 1, 21, 35],
    "empty experts": [0, 17, 0, 0, 9],
    "all at one": [0, 0, 133, 0, 0],
    "one row": [0, 0, 0, 1, 0],
    "no row": [0, 0, 0, 0, 0],
    "whole blocks": [64, 128, 32, 16, 64],
}
# D, F, O: steps and tiles of 64, and neither
SIZES = {
    "tiles": (64, 128, 64),
    "rests": (96, 80, 32),
    "smallest": (32, 16, 32),
    "narrow middle": (160, 48, 96),
}
N_TOKENS = 40


def problem(counts: list[int], sizes: tuple[int, int, int], activation: str, dtype: torch.dtype):
    """(tokens, row_weight, w_in, w_out) with values that bfloat16 holds, token_index, counts, dy."""
    d, f, o = sizes
    inner = 2 * f if activation == "swiglu" else f
    shapes = [(N_TOKENS, d), (sum(counts),), (len(counts), inner, d), (len(counts), o, f)]
    scales = [1.0, 1.0, d**-0.5, f**-0.5]
    leaves = [
        (torch.randn(shape) * scale).bfloat16().to(dtype) for shape, scale in zip(shapes, scales, strict=True)
    ]
    leaves[1] = torch.rand(sum(counts)) + 0.1
    token_index = torch.cat([torch.randint(0, N_TOKENS, (n,)).sort().values for n in counts]).long()
    return leaves, token_index, torch.tensor(counts), torch.randn(N_TOKENS, o).bfloat16()


def truth(leaves: list[Tensor], token_index: Tensor, counts: Tensor, dy: Tensor, activation: str):
    tokens, weight, w_in, w_out = exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    answers = expert_mlp_reference(tokens[token_index], counts, w_in, w_out, None, None, activation)
    out = torch.zeros(len(tokens), w_out.shape[1], dtype=torch.float64)
    out = out.index_add(0, token_index, answers * weight[:, None])
    return out, torch.autograd.grad(
        (out * dy.double()).sum(), exact, allow_unused=True, materialize_grads=True
    )


def close(ours: Tensor, theirs: Tensor, what: str) -> None:
    error = (ours.double() - theirs).norm()
    # a few roundings to bfloat16, each of relative size 2**-9 at most
    assert error <= 0.008 * theirs.norm() + 1e-12, f"{what}: {error / theirs.norm()}"
    assert ours.isfinite().all()


@needs_kernel
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES.keys())
@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS.keys())
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["master weights", "bfloat16"])
def test_outputs_and_gradients_equal_the_reference(activation, counts, sizes, dtype) -> None:
    leaves, token_index, counts, dy = problem(counts, sizes, activation, dtype)
    expected, expected_gradients = truth(leaves, token_index, counts, dy, activation)
    leaves = [leaf.requires_grad_() for leaf in leaves]
    tokens, weight, w_in, w_out = leaves
    out = expert_layer_cpu(tokens, token_index, weight, counts, w_in, w_out, activation)
    assert out.dtype == torch.bfloat16
    close(out, expected, "output")
    gradients = torch.autograd.grad(out, leaves, dy)
    for name, leaf, ours, theirs in zip(
        ("tokens", "weight", "w_in", "w_out"), leaves, gradients, expected_gradients, strict=True
    ):
        assert (ours.dtype, ours.shape) == (leaf.dtype, leaf.shape)
        close(ours, theirs, name)
    # without a gradient nothing is kept, and the result is the same to the bit
    with torch.no_grad():
        plain = expert_layer_cpu(tokens, token_index, weight, counts, w_in, w_out, activation)
    assert torch.equal(plain, out)


@needs_kernel
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_every_number_of_threads_gives_the_same_bits(threads) -> None:
    leaves, token_index, counts, dy = problem(COUNTS["odd"], SIZES["rests"], "swiglu", torch.float32)
    before = torch.get_num_threads()
    results = []
    try:
        for n in (1, threads, threads):
            torch.set_num_threads(n)
            fresh = [leaf.detach().clone().requires_grad_() for leaf in leaves]
            out = expert_layer_cpu(fresh[0], token_index, fresh[1], counts, fresh[2], fresh[3], "swiglu")
            results.append([out, *torch.autograd.grad(out, fresh, dy)])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@needs_kernel
@pytest.mark.parametrize("wanted", list(itertools.product([False, True], repeat=4)))
def test_only_the_gradients_that_are_wanted(wanted) -> None:
    leaves, token_index, counts, dy = problem(COUNTS["odd"], SIZES["smallest"], "gelu", torch.float32)
    _, expected = truth(leaves, token_index, counts, dy, "gelu")
    for leaf, wants in zip(leaves, wanted, strict=True):
        leaf.requires_grad_(wants)
    out = expert_layer_cpu(leaves[0], token_index, leaves[1], counts, leaves[2], leaves[3], "gelu")
    assert out.requires_grad == any(wanted)
    if any(wanted):
        out.backward(dy)
    for leaf, wants, theirs in zip(leaves, wanted, expected, strict=True):
        assert (leaf.grad is not None) == wants
        if wants:
            close(leaf.grad, theirs, "gradient")


@needs_kernel
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("value", [float("nan"), 1e4, -1e4, 1e30, -1e30])
def test_extreme_values_end_as_in_the_reference(activation, value) -> None:
    """NaN is never hidden, and large values saturate as they do in PyTorch."""
    leaves, token_index, counts, _ = problem([5, 4], (32, 16, 32), activation, torch.bfloat16)
    leaves[0][token_index[2]] = value
    tokens, weight, w_in, w_out = leaves
    ours = expert_layer_cpu(tokens, token_index, weight, counts, w_in, w_out, activation).float()
    answers = expert_mlp_reference(
        tokens.float()[token_index], counts, w_in.float(), w_out.float(), None, None, activation
    )
    theirs = torch.zeros(N_TOKENS, 32).index_add(0, token_index, answers * weight[:, None])
    assert torch.equal(ours.isnan(), theirs.isnan())
    ours, theirs = ours.nan_to_num(), theirs.nan_to_num()
    assert (ours - theirs).abs().max() <= 0.02 * theirs.abs().max()


@pytest.mark.parametrize(
    ("sizes", "reason"),
    [
        ((33, 16, 32, False), "d_model must be a multiple of 32; got 33"),
        ((32, 24, 32, False), "d_expert must be a multiple of 16; got 24"),
        ((32, 16, 16, False), "d_out must be a multiple of 32; got 16"),
        ((32, 16, 32, True), "biases"),
        ((32, 16, 32, False), ""),
    ],
)
def test_what_does_not_fit_is_said(sizes, reason) -> None:
    assert reason in fits(*sizes) if reason else fits(*sizes) == ""


# ---------------------------------------------------------------- in the layer


def layer(**fields) -> moekit.MoE:
    return moekit.MoE(**({"d_model": 32, "d_expert": 16, "n_experts": 4, "top_k": 2} | fields))


def with_bf16(module: moekit.MoE, x: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return module(x).hidden_states


@needs_kernel
def test_the_layer_takes_it_and_agrees_with_the_separate_steps() -> None:
    module, x = layer(n_shared_experts=1), torch.randn(3, 7, 32)
    fused = with_bf16(module, x)
    called = []
    handle = module.experts.register_forward_hook(lambda *args: called.append(1))
    apart = with_bf16(module, x)  # whoever watches the experts sees their rows
    handle.remove()
    assert called == [1]
    close(fused, apart.double(), "layer")
    assert with_bf16(module, x).equal(fused)
    assert module(x).hidden_states.dtype == torch.float32  # without autocast nothing is rounded


@needs_kernel
@pytest.mark.parametrize(
    "fields",
    [
        {"bias": True}, {"d_expert": 24}, {"combine": "vote_soft", "d_out": 32}, {"null_experts": {"zero": 1}},
        {"router": "soft"}, {"kernel": "reference"}, {"kernel": "grouped_mm"},
    ],
)  # fmt: skip
def test_other_layers_go_the_plain_way(fields, monkeypatch) -> None:
    import moekit.kernels.cpu.expert_layer as module

    def refuse(*args):
        raise AssertionError("the fused layer was called")

    monkeypatch.setattr(module._ExpertLayer, "apply", refuse)
    assert with_bf16(layer(**fields), torch.randn(2, 5, 32)).shape == (2, 5, 32)
    with pytest.raises(AssertionError, match="was called"):
        with_bf16(layer(), torch.randn(2, 5, 32))


@needs_kernel
def test_a_layer_that_must_be_fused_says_why_it_cannot() -> None:
    with pytest.raises(
        ConfigError,
        match=r"kernel 'fused_cpu' cannot compute these experts: d_expert must be a multiple of 16; got 24. Use",
    ):
        with_bf16(layer(d_expert=24, kernel="fused_cpu"), torch.randn(2, 5, 32))
    x = torch.randn(2, 5, 32)
    assert with_bf16(layer(kernel="fused_cpu"), x).shape == x.shape
    with pytest.raises(ConfigError, match=r"'fused_cpu'.*float32"):
        layer(kernel="fused_cpu")(x)


def test_the_switch_turns_it_off(monkeypatch) -> None:
    monkeypatch.setenv(SWITCH, "0")
    find.cache_clear()
    try:
        assert find("expert_layer", "cpu", torch.bfloat16) is None
        assert SWITCH in available("expert_layer")[0][2]
    finally:
        monkeypatch.undo()
        find.cache_clear()
