"""moekit's experts inside transformers models: equal outputs and gradients, and an honest word where it cannot."""

from __future__ import annotations

import copy
import subprocess
import sys
import warnings
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

import moekit
from moekit.config.errors import ConfigError, MissingExtraError
from moekit.convert import transformers as seam
from moekit.convert.transformers import MoekitFallbackWarning, quantize_experts
from moekit.kernels.expert_weights import Activation
from moekit.kernels.registry import available

pytest.importorskip("transformers", minversion="5.0")
from transformers.integrations.moe import batched_mm_experts_forward, grouped_mm_experts_forward
from transformers_families import FAMILIES, tiny_model

_, FUSED, WHY = available("expert_layer")[0]
_, DECODES, WHY_NOT_DECODE = available("expert_decode")[0]
needs_kernels = pytest.mark.skipif(not (FUSED and DECODES), reason=f"{WHY}; {WHY_NOT_DECODE}")


@pytest.fixture(autouse=True)
def registered():
    """The implementation known, and a fallback an error unless a test expects it."""
    moekit.use_in_transformers()
    seam._say_once.cache_clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error", MoekitFallbackWarning)
        yield
    seam._say_once.cache_clear()


def ids(length: int) -> Tensor:
    return torch.randint(3, 96, (2, length))


def error(ours: Tensor, theirs: Tensor) -> float:
    assert ours.dtype == theirs.dtype
    return ((ours.float() - theirs.float()).norm() / theirs.float().norm()).item()


def counted(monkeypatch) -> list[int]:
    """Calls of moekit's experts from now on."""
    calls: list[int] = []
    original = seam.chosen_experts
    monkeypatch.setattr(seam, "chosen_experts", lambda *args: (calls.append(1), original(*args))[1])
    return calls


def choices(n_tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(n_tokens, 64), torch.rand(n_tokens, 4).topk(2).indices, torch.rand(n_tokens, 2)


def experts_of(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if seam._is_experts(module)]


@needs_kernels
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_gradients_are_those_of_transformers(family, monkeypatch) -> None:
    model, tokens = tiny_model(family), ids(40)
    calls = counted(monkeypatch)
    results = []
    for name in ("eager", "moekit"):
        model.set_experts_implementation(name)
        model.zero_grad()
        out = model(tokens, labels=tokens)
        out.loss.backward()
        gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        results.append((out.logits.detach(), gradients))
    assert len(calls) == len(experts_of(model)) > 0
    (theirs, their_gradients), (ours, our_gradients) = results
    assert error(ours, theirs) < 1e-5
    assert our_gradients.keys() == their_gradients.keys()
    for name, gradient in their_gradients.items():
        assert error(our_gradients[name], gradient) < 1e-4, name


@needs_kernels
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("n_tokens", [1, 50])
def test_bfloat16_is_near_the_same_weights_in_float32(n_tokens, family) -> None:
    # the experts alone: in a whole model a rounding sends some tokens to other experts
    for experts in experts_of(tiny_model(family, dtype=torch.bfloat16)):
        x, index, weight = choices(n_tokens)
        with torch.no_grad():
            ours = seam.experts_forward(experts, x.bfloat16(), index, weight)
            truth = batched_mm_experts_forward(experts.float(), x.bfloat16().float(), index, weight)
        assert ours.dtype == torch.bfloat16
        assert error(ours.float(), truth) < 0.01


@needs_kernels
@pytest.mark.parametrize("family", ["mixtral", "olmoe", "gpt_oss", "deepseek_v3"])
def test_generated_text_is_the_same(family, monkeypatch) -> None:
    model, tokens = tiny_model(family), ids(6)[:1]
    theirs = model.generate(tokens, max_new_tokens=8, do_sample=False)
    model.set_experts_implementation("moekit")
    calls = counted(monkeypatch)
    assert torch.equal(model.generate(tokens, max_new_tokens=8, do_sample=False), theirs)
    assert len(calls) == 8 * len(experts_of(model))


@needs_kernels
def test_from_config_takes_the_name_and_other_names_are_refused_by_transformers() -> None:
    model = tiny_model("olmoe", implementation="moekit")
    assert model.config._experts_implementation == "moekit"
    with pytest.raises(ValueError, match="moekit"):  # it is among the names that transformers offers
        model.set_experts_implementation("moekitt")


@needs_kernels
def test_autocast_trains_master_weights_in_bfloat16() -> None:
    model, tokens = tiny_model("qwen3_moe"), ids(40)
    model.set_experts_implementation("moekit")
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(tokens, labels=tokens).loss
    loss.backward()
    experts = experts_of(model)[0]
    assert experts.gate_up_proj.grad.dtype == torch.float32
    assert experts.gate_up_proj.grad.abs().sum() > 0


@needs_kernels
def test_moved_and_replaced_parameters_are_seen() -> None:
    model, tokens = tiny_model("olmoe", implementation="moekit"), ids(8)
    with torch.no_grad():
        before = model(tokens).logits
        other = copy.deepcopy(model)
        other.load_state_dict({n: v * 0.5 if "experts" in n else v for n, v in model.state_dict().items()})
        changed = other(tokens).logits
        other.set_experts_implementation("eager")
        assert error(changed, other(tokens).logits) < 1e-5
        assert error(changed, before) > 0.01
        assert model.bfloat16()(tokens).logits.dtype == torch.bfloat16
        for experts in experts_of(model):
            experts.down_proj = nn.Parameter(torch.zeros_like(experts.down_proj))
        ours = model(tokens).logits
        model.set_experts_implementation("eager")
        assert error(ours, model(tokens).logits) < 0.02


# ---------------------------------------------------------------- experts that stand alone


class Experts(nn.Module):
    """What `use_experts_implementation` makes of a class, without a model around it."""

    def __init__(
        self, gate=None, *, transposed=False, bias=False, has_gate=True, act="silu", size=(8, 32, 32), **extra
    ):
        super().__init__()
        n, d, f = size
        inner = 2 * f if has_gate else f
        shapes = [(n, d, inner), (n, f, d)] if transposed else [(n, inner, d), (n, d, f)]
        name = "gate_up_proj" if has_gate else "up_proj"
        setattr(self, name, nn.Parameter(torch.randn(shapes[0]) * d**-0.5))
        self.down_proj = nn.Parameter(torch.randn(shapes[1]) * f**-0.5)
        if bias:
            setattr(self, f"{name}_bias", nn.Parameter(torch.randn(n, inner)))
            self.down_proj_bias = nn.Parameter(torch.randn(n, d))
        self.has_gate, self.has_bias, self.is_transposed, self.is_concatenated = (
            has_gate,
            bias,
            transposed,
            True,
        )
        self.num_experts, self._is_expert_parallel = n, False
        self.has_post_expert_norm, self.post_expert_norm = False, nn.Identity()
        self.act_fn = {"silu": nn.functional.silu, "gelu": nn.functional.gelu, "tanh": torch.tanh,
                       "relu2": lambda x: x.relu() ** 2, "gelu_tanh": nn.GELU("tanh")}[act]  # fmt: skip
        self._gate = gate
        self.__dict__.update(extra)
        self.config = SimpleNamespace(_experts_implementation="moekit")

    def _apply_gate(self, hidden: Tensor) -> Tensor:
        if self._gate is not None:
            return self._gate(self, hidden)
        gate, up = hidden.chunk(2, dim=-1)
        return self.act_fn(gate) * up


def clamped(self: Experts, hidden: Tensor) -> Tensor:
    gate, up = hidden.chunk(2, dim=-1)
    return nn.functional.silu(gate.clamp(max=self.swiglu_limit)) * up.clamp(
        -self.swiglu_limit, self.swiglu_limit
    )


def scaled(self: Experts, hidden: Tensor) -> Tensor:
    gate, up = hidden[..., ::2].clamp(max=self.limit), hidden[..., 1::2].clamp(-self.limit, self.limit)
    return (up + 1) * gate * torch.sigmoid(gate * self.alpha)


def clamped_after(self: Experts, hidden: Tensor) -> Tensor:
    gate, up = hidden.chunk(2, dim=-1)
    return nn.functional.silu(gate).clamp(max=1.0) * up


def refuses(self: Experts, hidden: Tensor) -> Tensor:
    raise RuntimeError("wants more than that")


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        ({}, (Activation("swiglu"), False)),
        ({"act": "gelu"}, (Activation("geglu"), False)),
        ({"act": "gelu_tanh"}, (Activation("geglu_tanh"), False)),
        ({"gate": clamped, "swiglu_limit": 7.0}, (Activation("clamped_swiglu", 1.0, 7.0, 0.0), False)),
        ({"gate": clamped, "swiglu_limit": 0.5}, (Activation("clamped_swiglu", 1.0, 0.5, 0.0), False)),
        (
            {"gate": scaled, "limit": 7.0, "alpha": 1.702},
            (Activation("clamped_swiglu", 1.702, 7.0, 1.0), True),
        ),
        ({"has_gate": False, "act": "relu2"}, (Activation("relu_squared"), False)),
        ({"has_gate": False, "act": "gelu"}, (Activation("gelu"), False)),
        ({"has_gate": False, "act": "silu"}, (Activation("silu"), False)),
        ({"act": "tanh"}, None),
        ({"gate": clamped_after}, None),
        ({"gate": refuses}, None),
    ],
)
def test_the_activation_is_found_by_what_it_does(module, expected) -> None:
    assert seam._activation_of(Experts(**module)) == expected


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n_tokens", [0, 1, 3, 70])
@pytest.mark.parametrize(
    "module",
    [
        {}, {"transposed": True}, {"bias": True, "transposed": True, "gate": scaled, "limit": 1.5, "alpha": 1.702},
        {"has_gate": False, "act": "relu2"}, {"act": "gelu_tanh", "bias": True},
    ],
)  # fmt: skip
def test_experts_of_every_form_equal_the_grouped_product(module, n_tokens, dtype) -> None:
    experts = Experts(**module).to(dtype)
    x, weight = torch.randn(n_tokens, 32).to(dtype), torch.rand(n_tokens, 2)
    index = torch.rand(n_tokens, 8).topk(2).indices
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            ours = seam.experts_forward(experts, x, index, weight.to(dtype))
            assert (ours.shape, ours.dtype) == (x.shape, dtype)
            if n_tokens:
                truth = batched_mm_experts_forward(
                    experts.float(), x.float(), index, weight.to(dtype).float()
                )
                experts.to(dtype)
                assert error(ours.float(), truth) < (1e-5 if dtype == torch.float32 else 0.01)


@needs_kernels
def test_experts_of_another_rank_add_nothing() -> None:
    experts, x = Experts(), torch.randn(50, 32)
    index, weight = torch.rand(50, 8).topk(3).indices, torch.rand(50, 3)
    away = index.clone()
    away[::2, 1] = 8  # the sentinel: the number of experts
    without = weight.clone()
    without[::2, 1] = 0
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            ours = seam.experts_forward(experts, x, away, weight)
            assert error(ours, seam.experts_forward(experts, x, index, without)) < 1e-5


@needs_kernels
@pytest.mark.parametrize(
    ("module", "reason"),
    [
        ({"act": "tanh"}, "Experts: its activation is none of moekit's; transformers' grouped_mm computes"),
        ({"size": (8, 40, 32)}, "d_model must be a multiple of 32; got 40"),
        ({"has_post_expert_norm": True}, "do not know what has_post_expert_norm means"),
    ],
)
def test_what_it_cannot_do_falls_back_and_says_so_once(module, reason) -> None:
    experts = Experts(**module)
    x = torch.randn(20, experts.down_proj.shape[1])
    arguments = x, torch.rand(20, 8).topk(2).indices, torch.rand(20, 2)
    with pytest.warns(MoekitFallbackWarning, match=reason):
        first = seam.experts_forward(experts, *arguments)
    seam.experts_forward(Experts(**module), *arguments)  # a second warning would be an error here
    assert torch.equal(first, grouped_mm_experts_forward(experts, *arguments))


def test_the_switch_falls_back(monkeypatch) -> None:
    from moekit.kernels.registry import find

    monkeypatch.setenv("MOEKIT_CPU_KERNELS", "0")
    find.cache_clear()
    try:
        with pytest.warns(MoekitFallbackWarning, match="no fused kernel for"):
            seam.experts_forward(Experts(), torch.randn(5, 32), torch.zeros(5, 1).long(), torch.ones(5, 1))
    finally:
        monkeypatch.undo()
        find.cache_clear()


# ---------------------------------------------------------------- quantised


@needs_kernels
@pytest.mark.parametrize("family", ["olmoe", "gpt_oss", "deepseek_v2"])
@pytest.mark.parametrize(("bits", "limit"), [(8, 0.012), (4, 0.2)])
def test_quantised_experts_stay_near_and_their_float_weights_are_freed(family, bits, limit) -> None:
    model, (x, index, weight) = tiny_model(family, dtype=torch.bfloat16), choices(24)
    with torch.no_grad():
        before = [seam.experts_forward(module, x, index, weight) for module in experts_of(model)]
        float_bytes = sum(m.gate_up_proj.nbytes + m.down_proj.nbytes for m in experts_of(model))
        size = quantize_experts(model, bits, group_size=32)
        after = [seam.experts_forward(module, x, index, weight) for module in experts_of(model)]
    assert all(1e-4 < error(ours, theirs) < limit for ours, theirs in zip(after, before, strict=True))
    assert size < float_bytes * (0.6 if bits == 8 else 0.35)
    assert all(m.gate_up_proj.device.type == "meta" for m in experts_of(model))
    assert model.generate(ids(24)[:1], max_new_tokens=3, do_sample=False).shape == (1, 27)


@needs_kernels
def test_quantised_experts_refuse_what_they_cannot_do() -> None:
    model, tokens = tiny_model("olmoe"), ids(8)
    quantize_experts(model, group_size=32)
    model.set_experts_implementation("moekit")
    with pytest.raises(ConfigError, match="quantised experts of OlmoeExperts cannot be computed"):
        model(tokens)  # a gradient is wanted by what comes before them


def test_a_model_without_experts_or_with_strange_ones_is_left_as_it_was() -> None:
    with pytest.raises(ConfigError, match="model must have experts that follow"):
        quantize_experts(nn.Linear(3, 3))
    strange = nn.Sequential(Experts(), Experts(act="tanh"))
    with pytest.raises(ConfigError, match="Experts cannot be quantised: its activation"):
        quantize_experts(strange)
    assert strange[0].gate_up_proj.device.type == "cpu"


def test_without_transformers_the_error_says_what_to_install(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers.integrations.moe", None)
    seam._interface.cache_clear()
    try:
        with pytest.raises(MissingExtraError, match=r"pip install 'moekit\[transformers\]'"):
            moekit.use_in_transformers()
    finally:
        seam._interface.cache_clear()


def test_importing_the_seam_imports_no_transformers() -> None:
    code = "import sys, moekit.convert.transformers; sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
