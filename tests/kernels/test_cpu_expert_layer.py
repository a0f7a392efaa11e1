"""The fused CPU layer against the reference in float64: outputs, all gradients, odd numbers of rows, every width."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

import moekit
from moekit.config.errors import ConfigError
from moekit.kernels import chosen_experts
from moekit.kernels.cpu.expert_layer import CHUNK_BYTES, _chunk, expert_layer_cpu, fits
from moekit.kernels.cpu.library import SWITCH
from moekit.kernels.expert_mlp import expert_mlp_reference
from moekit.kernels.expert_weights import KINDS, Activation, ExpertWeights
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
    "several chunks": [300, 5, 0, 257, 640],
}
# D, F, O: steps and tiles of 64, and neither
SIZES = {
    "tiles": (64, 128, 64),
    "rests": (96, 80, 32),
    "smallest": (32, 16, 32),
    "narrow middle": (160, 48, 96),
}
N_TOKENS = 40


# (transposed, interleaved)
LAYOUTS = {
    "out, in": (False, False),
    "in, out": (True, False),
    "alternating": (False, True),
    "in, out, alternating": (True, True),
}
# type of the leaves, type that is computed in
TYPES = {
    "master weights": (torch.float32, torch.bfloat16),
    "bfloat16": (torch.bfloat16, torch.bfloat16),
    "float32": (torch.float32, torch.float32),
}
NAMES = ("tokens", "weight", "w_in", "w_out", "b_in", "b_out")


def activation_of(kind: str, dtype: torch.dtype) -> Activation:
    if kind != "clamped_swiglu":
        return Activation(kind)
    # a limit that many hidden values pass; in bfloat16 few, since roundings carry some over it, where the slope jumps
    return Activation(kind, alpha=1.7, limit=0.8 if dtype == torch.float32 else 2.5, offset=1.0)


class Problem:
    """Leaves with values that bfloat16 holds (tokens, row weights, two maps, two biases or None), and the plan."""

    def __init__(
        self, counts, sizes, kind="swiglu", types=TYPES["bfloat16"], bias=False, layout=(False, False)
    ):
        (d, f, o), e = sizes, len(counts)
        dtype, self.computed_in = types
        self.activation, (self.transposed, self.interleaved) = activation_of(kind, self.computed_in), layout
        inner = 2 * f if self.activation.gated else f
        w_in, w_out = torch.randn(e, inner, d) * d**-0.5, torch.randn(e, o, f) * f**-0.5
        if self.transposed:
            w_in, w_out = w_in.transpose(1, 2).contiguous(), w_out.transpose(1, 2).contiguous()
        biases = [torch.randn(e, inner) * 0.5, torch.randn(e, o)] if bias else []
        leaves = [torch.randn(N_TOKENS, d), torch.rand(sum(counts)) + 0.1, w_in, w_out, *biases]
        self.leaves = [leaf.bfloat16().to(dtype) for leaf in leaves]
        self.leaves[1] = leaves[1]
        self.token_index = torch.cat([torch.randint(0, N_TOKENS, (n,)).sort().values for n in counts]).long()
        self.counts, self.dy = torch.tensor(counts), torch.randn(N_TOKENS, o).bfloat16()

    def weights(self, leaves: list[Tensor]) -> ExpertWeights:
        biases = leaves[4:] or [None, None]
        return ExpertWeights(*leaves[2:4], *biases, self.activation, self.transposed, self.interleaved)

    def ours(self, leaves: list[Tensor]) -> Tensor:
        weights = self.weights(leaves)
        return expert_layer_cpu(
            leaves[0], self.token_index, leaves[1], self.counts, weights, self.computed_in
        )

    def reference(self, leaves: list[Tensor]) -> Tensor:
        answers = expert_mlp_reference(leaves[0][self.token_index], self.counts, self.weights(leaves))
        out = torch.zeros(N_TOKENS, answers.shape[1], dtype=answers.dtype)
        return out.index_add(0, self.token_index, answers * leaves[1][:, None])

    def truth(self) -> tuple[Tensor, tuple[Tensor, ...]]:
        exact = [leaf.detach().double().requires_grad_() for leaf in self.leaves]
        out = self.reference(exact)
        loss = (out * self.dy.double()).sum()
        return out, torch.autograd.grad(loss, exact, allow_unused=True, materialize_grads=True)


def close(ours: Tensor, theirs: Tensor, what: str, limit: float = 0.008) -> None:
    """The limit for bfloat16: a few roundings, each of relative size 2**-9 at most."""
    error = (ours.double() - theirs).norm()
    assert error <= limit * theirs.norm() + 1e-12, f"{what}: {error / theirs.norm()}"
    assert ours.isfinite().all()


def check(problem: Problem) -> None:
    expected, expected_gradients = problem.truth()
    leaves, dtype = [leaf.requires_grad_() for leaf in problem.leaves], problem.computed_in
    out = problem.ours(leaves)
    # one number alone does not average its roundings; in bfloat16 some hidden values fall on the limit's other side
    slack = 5 if len(problem.token_index) == 1 or problem.activation.kind == "clamped_swiglu" else 1
    limit = 0.008 * slack if dtype == torch.bfloat16 else 2e-6
    assert out.dtype == dtype
    close(out, expected, "output", limit)
    gradients = torch.autograd.grad(out, leaves, problem.dy.to(dtype))
    for name, leaf, ours, theirs in zip(NAMES, leaves, gradients, expected_gradients, strict=False):
        assert (ours.dtype, ours.shape) == (leaf.dtype, leaf.shape)
        close(ours, theirs, name, limit)
    # without a gradient nothing is kept, and the result is the same to the bit
    with torch.no_grad():
        assert torch.equal(problem.ours(leaves), out)


@needs_kernel
@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS.keys())
@pytest.mark.parametrize("types", TYPES.values(), ids=TYPES.keys())
@pytest.mark.parametrize("kind", KINDS)
def test_every_activation_equals_the_reference(kind, types, counts) -> None:
    check(Problem(counts, SIZES["rests"], kind, types, bias=len(counts) > 4))


@needs_kernel
@pytest.mark.parametrize("kind", ["swiglu", "clamped_swiglu", "relu"])
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES.keys())
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
@pytest.mark.parametrize("types", TYPES.values(), ids=TYPES.keys())
def test_every_layout_equals_the_reference(types, layout, sizes, bias, kind) -> None:
    if kind == "relu" and layout[1]:
        layout = (layout[0], False)  # nothing to alternate
    check(Problem(COUNTS["odd"], sizes, kind, types, bias, layout))


@needs_kernel
@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("types", TYPES.values(), ids=TYPES.keys())
@pytest.mark.parametrize("name", ["several chunks", "all at one", "empty experts"])
def test_uneven_experts_are_shared_out_among_threads(name, types, threads) -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        check(Problem(COUNTS[name], SIZES["tiles"], "geglu", types, True, (True, True)))
    finally:
        torch.set_num_threads(before)


def test_a_chunk_is_whole_blocks_and_fits_the_cache() -> None:
    for d, f in ((32, 16), (512, 512), (1024, 512), (2048, 1024), (8192, 28672)):
        for dtype in (torch.bfloat16, torch.float32):
            chunk = _chunk(d, f, dtype)
            assert chunk % 64 == 0
            assert 64 <= chunk <= 256
            assert chunk == 64 or chunk * (d + f) * dtype.itemsize <= CHUNK_BYTES


@needs_kernel
@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("counts", [COUNTS["odd"], COUNTS["several chunks"]], ids=["odd", "several chunks"])
@pytest.mark.parametrize("types", TYPES.values(), ids=TYPES.keys())
def test_every_number_of_threads_gives_the_same_bits(types, counts, threads) -> None:
    problem = Problem(counts, SIZES["rests"], "swiglu", types, bias=True)
    before = torch.get_num_threads()
    results = []
    try:
        for n in (1, threads, threads):
            torch.set_num_threads(n)
            fresh = [leaf.detach().clone().requires_grad_() for leaf in problem.leaves]
            out = problem.ours(fresh)
            results.append([out, *torch.autograd.grad(out, fresh, problem.dy.to(out.dtype))])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@needs_kernel
@pytest.mark.parametrize("wanted", list(itertools.product([False, True], repeat=4)))
def test_only_the_gradients_that_are_wanted(wanted) -> None:
    problem = Problem(COUNTS["odd"], SIZES["smallest"], "gelu", TYPES["master weights"], bias=True)
    _, expected = problem.truth()
    for leaf, wants in zip(problem.leaves, (*wanted, *wanted[2:]), strict=True):
        leaf.requires_grad_(wants)
    out = problem.ours(problem.leaves)
    assert out.requires_grad == any(wanted)
    if any(wanted):
        out.backward(problem.dy)
    for leaf, theirs in zip(problem.leaves, expected, strict=True):
        assert (leaf.grad is not None) == leaf.requires_grad
        if leaf.requires_grad:
            close(leaf.grad, theirs, "gradient")


@needs_kernel
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [float("nan"), 1e4, -1e4, 1e30, -1e30])
def test_extreme_values_end_as_in_the_reference(kind, value) -> None:
    """NaN is never hidden, and large values saturate as they do in PyTorch."""
    problem = Problem([5, 4], (32, 16, 32), kind)
    problem.leaves[0][problem.token_index[2]] = value
    ours = problem.ours(problem.leaves).float()
    theirs = problem.reference([leaf.float() for leaf in problem.leaves])
    assert torch.equal(ours.isnan(), theirs.isnan())
    ours, theirs = ours.nan_to_num(), theirs.nan_to_num()
    assert (ours - theirs).abs().max() <= 0.02 * theirs.abs().max()


@pytest.mark.parametrize(
    ("sizes", "reason"),
    [
        ((33, 16, 32), "d_model must be a multiple of 32; got 33"),
        ((32, 24, 32), "d_expert must be a multiple of 16; got 24"),
        ((32, 16, 16), "d_out must be a multiple of 32; got 16"),
        ((32, 16, 32), ""),
    ],
)
def test_what_does_not_fit_is_said(sizes, reason) -> None:
    d, f, o = sizes
    weights = ExpertWeights(torch.zeros(2, 2 * f, d), torch.zeros(2, o, f))
    assert weights.sizes == sizes
    assert fits(weights) == reason
    turned = ExpertWeights(torch.zeros(2, d, 2 * f), torch.zeros(2, f, o), transposed=True)
    assert turned.sizes == sizes
    assert fits(turned) == reason


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
        {"d_expert": 24}, {"combine": "vote_soft", "d_out": 32}, {"null_experts": {"zero": 1}},
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
    with pytest.raises(ConfigError, match=r"'fused_cpu'.*float64"):
        layer(kernel="fused_cpu").double()(x.double())


def test_the_switch_turns_it_off(monkeypatch) -> None:
    monkeypatch.setenv(SWITCH, "0")
    find.cache_clear()
    try:
        assert find("expert_layer", "cpu", torch.bfloat16) is None
        assert SWITCH in available("expert_layer")[0][2]
    finally:
        monkeypatch.undo()
        find.cache_clear()


@needs_kernel
@pytest.mark.parametrize("fields", [{}, {"bias": True}, {"activation": "geglu"}, {"router": "top_p"}])
@pytest.mark.parametrize("n_tokens", [1, 5])
def test_a_few_tokens_without_a_gradient_are_decoded_alike(n_tokens, fields, monkeypatch) -> None:
    module = layer(d_expert=32, n_experts=16, **fields)
    x = torch.randn(1, n_tokens, 32)
    with_gradient = with_bf16(module, x)
    called = []
    original = chosen_experts.decoded_experts
    monkeypatch.setattr(
        chosen_experts, "decoded_experts", lambda *args: (called.append(1), original(*args))[1]
    )
    with torch.no_grad():
        decoded = with_bf16(module, x)
        visits = module(x).routing.token_index.bincount(minlength=n_tokens)
    assert bool(called) == bool((visits == visits[0]).all())
    assert decoded.dtype == with_gradient.dtype
    close(decoded, with_gradient.detach().double(), "decoded")


@needs_kernel
def test_the_buffer_of_rows_is_reused_in_every_mode_and_never_shared() -> None:
    import moekit.kernels.cpu.expert_layer as module

    module._SPARE.clear()
    small, large = Problem(COUNTS["odd"], SIZES["rests"]), Problem(COUNTS["several chunks"], SIZES["rests"])
    with torch.inference_mode():  # what was made here serves a training step later
        expected = small.ours(small.leaves).clone()
    for problem in (large, small, large):
        check(problem)
    with torch.no_grad():
        assert torch.equal(small.ours(small.leaves), expected)
    assert len(module._SPARE) == 1
    with module._borrowed(2, 8, torch.float32) as first, module._borrowed(2, 8, torch.float32) as second:
        assert first.data_ptr() != second.data_ptr()
        assert (first.shape, first.dtype) == ((2, 8), torch.float32)
    assert len(module._SPARE) == 1


def test_a_huge_buffer_is_not_kept(monkeypatch) -> None:
    import moekit.kernels.cpu.expert_layer as module

    monkeypatch.setattr(module, "KEPT_BYTES", 64)
    module._SPARE.clear()
    with module._borrowed(5, 8, torch.bfloat16):
        pass
    assert not module._SPARE
    with module._borrowed(4, 8, torch.bfloat16):
        pass
    assert len(module._SPARE) == 1
