"""Decoding kernels against a loop over rows in float64: every kind of weights, layout, activation and routing."""

from __future__ import annotations

import copy
import itertools
import math

import pytest
import torch
from torch import Tensor

from moekit.config.errors import ConfigError
from moekit.kernels.cpu.decode import decode_fits, expert_decode
from moekit.kernels.cpu.library import SWITCH
from moekit.kernels.expert_weights import KINDS, Activation, ExpertWeights
from moekit.kernels.quantized import QuantizedMatrix, quantize_experts
from moekit.kernels.registry import available

_, CAN_RUN, WHY = available("expert_decode")[0]
needs_kernel = pytest.mark.skipif(not CAN_RUN, reason=f"the decoding kernels cannot run here: {WHY}")

FORMATS = ["bf16", "transposed", "interleaved", "alternating rows", "float32", "int8", "int4", "mixed"]
# D, F, O: the smallest, odd numbers of 32, and several units with a rest
SIZES = {"smallest": (32, 32, 32), "odd": (96, 160, 224), "units": (64, 544, 320)}
N_EXPERTS = 6
GPT_OSS = Activation("clamped_swiglu", alpha=1.702, limit=0.8, offset=1.0)


@pytest.fixture(autouse=True)
def _inference():
    with torch.no_grad():
        yield


def experts(form: str, sizes, activation=Activation(), bias=True, group_size=32) -> ExpertWeights:  # noqa: B008
    d, f, o = sizes
    inner = 2 * f if activation.gated else f
    weights = ExpertWeights(
        torch.randn(N_EXPERTS, inner, d) * d**-0.5,
        torch.randn(N_EXPERTS, o, f) * f**-0.5,
        torch.randn(N_EXPERTS, inner) if bias else None,
        torch.randn(N_EXPERTS, o) if bias else None,
        activation,
        interleaved=form in ("interleaved", "alternating rows"),
    )
    if form == "float32":
        return weights
    if form in ("int8", "int4"):
        return quantize_experts(weights, int(form[3:]), group_size)
    if form == "mixed":
        eight, four = (quantize_experts(weights, bits, group_size) for bits in (8, 4))
        return ExpertWeights(eight.w_in, four.w_out, eight.b_in, eight.b_out, activation)
    weights = weights.to(torch.bfloat16)
    if form in ("transposed", "interleaved"):
        w_in, w_out = weights.w_in.mT.contiguous(), weights.w_out.mT.contiguous()
        return ExpertWeights(
            w_in, w_out, weights.b_in, weights.b_out, activation, True, form == "interleaved"
        )
    return weights


def routing(n_tokens: int, top_k: int) -> tuple[Tensor, Tensor]:
    index = torch.stack([torch.randperm(N_EXPERTS)[:top_k] for _ in range(n_tokens)])
    return index, torch.rand(n_tokens, top_k) + 0.1


def truth(tokens: Tensor, index: Tensor, weight: Tensor, weights: ExpertWeights) -> Tensor:
    def exact(matrix) -> Tensor:
        plain = matrix.dequantize(torch.float64) if isinstance(matrix, QuantizedMatrix) else matrix.double()
        return plain.mT if weights.transposed else plain

    w_in, w_out = exact(weights.w_in), exact(weights.w_out)
    y = torch.zeros(len(tokens), w_out.shape[1], dtype=torch.float64)
    for t, k in itertools.product(range(len(tokens)), range(index.shape[1])):
        e = int(index[t, k])
        if not 0 <= e < N_EXPERTS:
            continue
        hidden = w_in[e] @ tokens[t].double()
        if weights.b_in is not None:
            hidden = hidden + weights.b_in[e].double()
        answer = w_out[e] @ weights.activation(hidden, weights.interleaved)
        if weights.b_out is not None:
            answer = answer + weights.b_out[e].double()
        y[t] += weight[t, k].double() * answer
    return y


def close(ours: Tensor, theirs: Tensor, form: str) -> None:
    # float32 sums; tokens and hidden values of 16 bits; hidden values of 8 bits (bfloat16)
    bound = {"float32": 2e-6, "int8": 1e-4, "int4": 1e-4, "mixed": 1e-4}.get(form, 4e-3)
    if ours.dtype == torch.bfloat16:
        bound += 3e-3
    assert ours.isfinite().all()
    assert (ours.double() - theirs).norm() <= bound * theirs.norm() + 1e-12


@needs_kernel
@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES.keys())
@pytest.mark.parametrize("n_tokens", [1, 3, 16])
@pytest.mark.parametrize("top_k", [1, 2, 6])
def test_the_result_is_that_of_the_reference(form, sizes, n_tokens, top_k) -> None:
    weights = experts(form, sizes, bias=top_k == 2)
    tokens, (index, weight) = torch.randn(n_tokens, sizes[0]).bfloat16(), routing(n_tokens, top_k)
    theirs = truth(tokens, index, weight, weights)
    for x in (tokens, tokens.float()):
        ours = expert_decode(x, index, weight, weights)
        assert (ours.dtype, ours.shape) == (x.dtype, theirs.shape)
        close(ours, theirs, form)


@needs_kernel
@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_activation(form, kind) -> None:
    activation = GPT_OSS if kind == "clamped_swiglu" else Activation(kind)
    weights = experts(form, SIZES["odd"], activation)
    tokens, (index, weight) = torch.randn(3, 96).bfloat16().float(), routing(3, 2)
    close(expert_decode(tokens, index, weight, weights), truth(tokens, index, weight, weights), form)


@needs_kernel
@pytest.mark.parametrize("form", ["int8", "int4"])
@pytest.mark.parametrize("group_size", [64, 128])
def test_larger_groups(form, group_size) -> None:
    weights = experts(form, (256, 384, 128), group_size=group_size)
    tokens, (index, weight) = torch.randn(5, 256), routing(5, 3)
    close(expert_decode(tokens, index, weight, weights), truth(tokens, index, weight, weights), form)


@needs_kernel
@pytest.mark.parametrize("form", ["int8", "int4"])
def test_groups_of_very_different_size_keep_their_digits(form) -> None:
    """One outlier among the inputs does not cost the others theirs: each group has its own scale."""
    weights = experts(form, SIZES["odd"], Activation("relu"), bias=False)
    tokens, (index, weight) = torch.randn(2, 96), routing(2, 2)
    tokens[:, 32:] *= 1e-6
    weights.w_in.scales[:, :, 0] = 0  # the first group, with the large values, does not count
    close(expert_decode(tokens, index, weight, weights), truth(tokens, index, weight, weights), form)


@needs_kernel
@pytest.mark.parametrize("form", FORMATS)
def test_routings_at_the_edge(form) -> None:
    weights = experts(form, SIZES["odd"])
    tokens, (index, weight) = torch.randn(40, 96).bfloat16().float(), routing(40, 2)
    skipped, one = index.clone(), torch.full_like(index, 4)
    skipped[::2, 0], skipped[5], skipped[1::3, 1] = N_EXPERTS, -1, 2**40
    twice = index.clone()
    twice[:, 1] = twice[:, 0]
    for chosen in (skipped, one, twice):
        ours = expert_decode(tokens, chosen, weight, weights)
        close(ours, truth(tokens, chosen, weight, weights), form)
    assert (expert_decode(tokens, skipped, weight, weights)[5] == 0).all()
    assert (expert_decode(tokens, torch.full_like(index, -1), weight, weights) == 0).all()
    assert expert_decode(tokens[:0], index[:0], weight[:0], weights).shape == (0, 224)
    assert (expert_decode(tokens, index[:, :0], weight[:, :0], weights) == 0).all()


@needs_kernel
def test_a_skipped_row_does_not_count_whatever_its_weight() -> None:
    weights = experts("bf16", SIZES["odd"])
    tokens, (index, weight) = torch.randn(2, 96), routing(2, 2)
    index[0, 1], weight[0, 1] = N_EXPERTS, math.nan
    assert expert_decode(tokens, index, weight, weights).isfinite().all()


@needs_kernel
@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_seen(form, value) -> None:
    weights = experts(form, SIZES["odd"])
    tokens, (index, weight) = torch.randn(3, 96), routing(3, 2)
    tokens[1, 40] = value
    ours = expert_decode(tokens, index, weight, weights)
    assert not ours[1].isfinite().any()
    assert ours[::2].isfinite().all()


@needs_kernel
@pytest.mark.parametrize("form", FORMATS)
def test_every_number_of_threads_and_every_batch_gives_the_same_bits(form) -> None:
    weights = experts(form, (256, 544, 512))
    tokens, (index, weight) = torch.randn(9, 256), routing(9, 3)
    before, results = torch.get_num_threads(), []
    try:
        for n in (1, 2, 3, 2):
            torch.set_num_threads(n)
            results += [expert_decode(tokens, index, weight, weights) for _ in range(3)]
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(results[0], other) for other in results[1:])
    alone = [expert_decode(tokens[i : i + 1], index[i : i + 1], weight[i : i + 1], weights) for i in range(9)]
    assert torch.equal(torch.cat(alone), results[0])


@needs_kernel
def test_inputs_of_other_types_and_strides() -> None:
    weights = experts("bf16", SIZES["odd"])
    tokens, (index, weight) = torch.randn(4, 192).bfloat16(), routing(4, 2)
    expected = expert_decode(tokens[:, ::2].contiguous(), index, weight.bfloat16().float(), weights)
    strided = index.T.contiguous().T.to(torch.int32)
    assert torch.equal(expert_decode(tokens[:, ::2], strided, weight.bfloat16(), weights), expected)


@needs_kernel
def test_changed_weights_are_seen() -> None:
    weights = experts("float32", SIZES["odd"])
    tokens, (index, weight) = torch.randn(2, 96), routing(2, 2)
    expert_decode(tokens, index, weight, weights)
    weights.w_in.mul_(0.5)
    weights.w_out.data = torch.randn_like(weights.w_out)
    close(expert_decode(tokens, index, weight, weights), truth(tokens, index, weight, weights), "float32")
    other = copy.deepcopy(weights)
    other.b_out.add_(1.0)
    close(expert_decode(tokens, index, weight, other), truth(tokens, index, weight, other), "float32")


@needs_kernel
def test_what_cannot_be_computed_is_refused() -> None:
    weights = experts("bf16", SIZES["odd"])
    tokens, (index, weight) = torch.randn(2, 96), routing(2, 2)
    with pytest.raises(ConfigError, match=r"tokens.dtype must be bfloat16 or float32; got torch.float64"):
        expert_decode(tokens.double(), index, weight, weights)
    with pytest.raises(ConfigError, match=r"tokens.shape must be \(2, 96\); got \(2, 64\)"):
        expert_decode(tokens[:, :64], index, weight, weights)
    with pytest.raises(ConfigError, match=r"expert_weight.shape must be \(2, 2\); got \(2, 1\)"):
        expert_decode(tokens, index, weight[:, :1], weights)
    with pytest.raises(ConfigError, match=r"weights must fit .*d_model must be a multiple of 32; got 48"):
        expert_decode(tokens[:, :48], index, weight, experts("bf16", (48, 32, 32)))
    weights.w_in.requires_grad_()
    expert_decode(tokens, index, weight, weights)
    with torch.enable_grad(), pytest.raises(ConfigError, match=r"torch.no_grad"):
        expert_decode(tokens, index, weight, weights)


def test_what_does_not_fit_is_said() -> None:
    def reason(form="bf16", sizes=SIZES["odd"], **changed) -> str:
        return decode_fits(ExpertWeights(**{**vars(experts(form, sizes)), **changed}))

    assert all(decode_fits(experts(form, SIZES["odd"])) == "" for form in FORMATS)
    assert reason(sizes=(32, 48, 32)) == "d_expert must be a multiple of 32; got 48"
    assert reason(sizes=(32, 32, 40)) == "d_out must be a multiple of 32; got 40"
    assert "w_in must have 160 hidden values" in reason(activation=Activation("relu"))
    assert "w_out must have as many experts" in reason(w_out=torch.zeros(2, 224, 160).bfloat16())
    assert "must be bfloat16, float32 or quantised; got torch.float64" in reason(
        w_in=torch.zeros(6, 320, 96).double()
    )
    assert "where it is transposed" in reason("transposed", w_in=torch.zeros(6, 96, 320))
    assert "quantize_experts" in reason("int4", interleaved=True)
    assert "b_out must be contiguous [6, 224]" in reason(b_out=torch.zeros(6, 32))
    assert "biases must be bfloat16 or float32" in reason(b_out=torch.zeros(6, 224).double())
    assert "w_in must be contiguous" in reason(w_in=torch.zeros(6, 96, 320).bfloat16().mT)


def test_the_switch_turns_it_off(monkeypatch) -> None:
    monkeypatch.setenv(SWITCH, "0")
    assert available("expert_decode")[0][1:] == (False, f"switched off by {SWITCH}=0")


def test_a_cpu_without_the_instructions_is_told_which(monkeypatch) -> None:
    import moekit.kernels.cpu.library as module

    capabilities = {**torch.cpu.get_capabilities(), "avx512_vnni": False}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    monkeypatch.setattr(module, "has_bf16_products", lambda: True)
    monkeypatch.setattr(module, "_cannot_run", module._cannot_run.__wrapped__)
    assert available("expert_decode")[0][1:] == (False, "this CPU lacks avx512_vnni")
