"""What stands around the experts of a transformers model: the same results, in inference only, and all of it undone."""

from __future__ import annotations

import copy
import io
from collections import Counter

import pytest
import torch
from torch import Tensor, nn

import moekit
from moekit.config.errors import ConfigError
from moekit.convert import around_experts
from moekit.convert.transformers import quantize_experts, undo
from moekit.kernels.registry import available, find

pytest.importorskip("transformers", minversion="5.0")
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers_families import COMMON, FAMILIES, tiny_model

OPS = ("cached_attention", "linear_decode", "rms_norm")
USABLE = {op: available(op)[0][1:] for op in OPS}
needs_kernels = pytest.mark.skipif(not all(ok for ok, _ in USABLE.values()), reason=str(USABLE))
WIDE = {"hidden_size": 128, "head_dim": 32}
MLA_WIDE = {"qk_rope_head_dim": 32, "qk_nope_head_dim": 32, "v_head_dim": 32}


@pytest.fixture
def calls(monkeypatch) -> Counter[str]:
    """How often each of moekit's kernels is asked for a result from now on."""
    seen: Counter[str] = Counter()
    for op in OPS:
        kernel = find(op, "cpu", torch.bfloat16)
        if kernel is not None:
            counted = _counted(kernel.function, op, seen)
            monkeypatch.setitem(kernel.__dict__, "function", counted)
    return seen


def _counted(function, op: str, seen: Counter[str]):
    def call(*args):
        seen[op] += 1
        return function(*args)

    return call


def wide_model(family: str, dtype: torch.dtype = torch.bfloat16, monkeypatch=None, **changes):
    """As `tiny_model`, with heads as wide as the kernel takes them."""
    extra = MLA_WIDE if "qk_rope_head_dim" in FAMILIES[family] else {}
    sizes = {**WIDE, **extra, **changes}
    kept = {**FAMILIES[family]}
    monkeypatch.setitem(FAMILIES, family, {**kept, **{k: v for k, v in sizes.items() if k in kept}})
    for name, value in sizes.items():
        if name not in kept:
            monkeypatch.setitem(COMMON, name, value)
    return tiny_model(family, dtype=dtype)


def ids(length: int, batch: int = 1) -> Tensor:
    return torch.randint(3, 96, (batch, length), generator=torch.Generator().manual_seed(length))


def error(ours: Tensor, theirs: Tensor) -> float:
    assert ours.dtype == theirs.dtype
    return ((ours.float() - theirs.float()).norm() / theirs.float().norm()).item()


def parts_of(model) -> list[tuple[nn.Module, str]]:
    """The attention blocks, and every module whose forward was replaced."""
    return [
        (module, name)
        for name, module in model.named_modules()
        if name.endswith(("self_attn", ".attn")) or "forward" in module.__dict__
    ]


def recorded(model, run) -> dict[str, tuple[tuple, dict, Tensor]]:
    """Input and output of each part while `run` computes."""
    notes: dict[str, tuple[tuple, dict, Tensor]] = {}
    handles = []
    for module, name in parts_of(model):

        def note(_, args, kwargs, out, name=name):
            notes[name] = args, kwargs, (out[0] if isinstance(out, tuple) else out).clone()

        handles.append(module.register_forward_hook(note, with_kwargs=True))
    run()
    for handle in handles:
        handle.remove()
    return notes


@needs_kernels
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("length", [1, 37])
def test_every_part_computes_what_transformers_computes(family, length, monkeypatch, calls) -> None:
    # part by part: in a whole model a rounding sends some tokens to other experts
    model, tokens = wide_model(family, monkeypatch=monkeypatch), ids(length, 2)
    moekit.use_in_transformers(model)
    with torch.no_grad():
        notes = recorded(model, lambda: model(tokens, use_cache=False))
        assert len(notes) >= 4
        undo(model)
        for module, name in ((model.get_submodule(name), name) for name in notes):
            args, kwargs, ours = notes[name]
            theirs = module(*args, **kwargs)
            theirs = theirs[0] if isinstance(theirs, tuple) else theirs
            assert error(ours, theirs) < 0.012, name
    assert (calls["rms_norm"] > 0) == (family != "phimoe")  # has another kind of norm
    assert (calls["linear_decode"] > 0) == (length == 1)
    if family not in ("gpt_oss", "granitemoe"):
        assert calls["cached_attention"] > 0


@needs_kernels
@pytest.mark.parametrize("family", FAMILIES)
def test_whole_models_stay_near_in_prefill_and_decoding(family, monkeypatch) -> None:
    model = wide_model(family, monkeypatch=monkeypatch)
    tokens = ids(20)
    exact = copy.deepcopy(model).float()
    results = []
    for each, prepare in (
        (exact, lambda m: None),
        (model, lambda m: None),
        (model, moekit.use_in_transformers),
    ):
        prepare(each)
        with torch.no_grad():
            out = each(tokens[:, :17], use_cache=True)
            steps = [out.logits]
            for i in range(17, 20):
                out = each(tokens[:, i : i + 1], past_key_values=out.past_key_values, use_cache=True)
                steps.append(out.logits)
        results.append(torch.cat(steps, 1).float())
    truth, theirs, ours = results
    # a token whose router was near a tie is elsewhere for one of the two: most tokens say what there is to say
    per_token = [((r - truth).norm(dim=-1) / truth.norm(dim=-1)).median() for r in (theirs, ours)]
    assert per_token[1] < max(1.5 * per_token[0], 0.02)


@needs_kernels
@pytest.mark.parametrize("family", ["mixtral", "olmoe", "qwen3_moe", "deepseek_v3"])
def test_generated_text_is_the_same(family, monkeypatch, calls) -> None:
    model, tokens = wide_model(family, monkeypatch=monkeypatch), ids(6)
    # words far apart: the rounding of a bfloat16 model must not choose between them
    with torch.no_grad():
        model.lm_head.weight.mul_(0).add_(
            torch.randn(96, 1) @ torch.randn(1, model.config.hidden_size)
        ).bfloat16()
    theirs = model.generate(tokens, max_new_tokens=8, do_sample=False)
    moekit.use_in_transformers(model)
    assert torch.equal(model.generate(tokens, max_new_tokens=8, do_sample=False), theirs)
    assert calls["linear_decode"] > 0
    assert calls["cached_attention"] > 0


@needs_kernels
def test_padded_batches_and_beams_work(monkeypatch, calls) -> None:
    model, tokens = wide_model("olmoe", monkeypatch=monkeypatch), ids(9, 2)
    mask = torch.ones_like(tokens)
    mask[0, :4] = 0
    with torch.no_grad():
        theirs = model(tokens, attention_mask=mask).logits
        moekit.use_in_transformers(model)
        ours = model(tokens, attention_mask=mask).logits
    assert error(ours[0, 4:], theirs[0, 4:]) < 0.05
    assert calls["cached_attention"] > 0  # few queries take a mask
    assert model.generate(
        tokens, attention_mask=mask, num_beams=2, max_new_tokens=4, do_sample=False
    ).shape == (2, 13)


@needs_kernels
def test_undo_restores_everything(monkeypatch) -> None:
    model = wide_model("olmoe", monkeypatch=monkeypatch)
    other = copy.deepcopy(model)
    before = {name: dict(module.__dict__) for name, module in model.named_modules()}
    state = {name: value.clone() for name, value in model.state_dict().items()}
    moekit.use_in_transformers(model)
    moekit.use_in_transformers(model)
    assert model.config._attn_implementation == model.config._experts_implementation == "moekit"
    assert any("forward" in module.__dict__ for module in model.modules())
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    undo(model)
    undo(model)
    assert {name: set(module.__dict__) for name, module in model.named_modules()} == {
        name: set(values) for name, values in before.items()
    }
    assert not model._forward_pre_hooks
    assert not model._forward_pre_hooks_with_kwargs
    assert model.config._attn_implementation == "sdpa"
    assert model.config._experts_implementation == "eager"
    assert torch.equal(model(ids(5)).logits, other(ids(5)).logits)


@needs_kernels
def test_copies_are_whole_and_undone_by_themselves(monkeypatch) -> None:
    model, tokens = wide_model("olmoe", monkeypatch=monkeypatch), ids(1)
    moekit.use_in_transformers(model)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for twin in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        with torch.no_grad():
            expected = model(tokens).logits
            assert torch.equal(twin(tokens).logits, expected)
            twin.lm_head.weight.zero_()
            assert twin(tokens).logits.abs().sum() == 0
            assert torch.equal(model(tokens).logits, expected)
        undo(twin)
        assert not any("forward" in module.__dict__ for module in twin.modules())
        assert twin.config._attn_implementation == "sdpa"
        assert "forward" in model.lm_head.__dict__


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_training_afterwards_gives_the_same_gradients(dtype, monkeypatch, calls) -> None:
    model, tokens = wide_model("olmoe", dtype, monkeypatch=monkeypatch), ids(5)
    model.train()
    gradients = []
    for prepare in (lambda m: m.set_experts_implementation("moekit"), moekit.use_in_transformers):
        prepare(model)
        model.zero_grad()
        model(tokens, labels=tokens).loss.backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters()})
    assert gradients[0].keys() == gradients[1].keys()
    assert all(torch.equal(gradients[1][name], gradient) for name, gradient in gradients[0].items())
    assert not calls


@needs_kernels
def test_hooks_of_a_linear_map_still_run_and_other_forwards_are_left_alone() -> None:
    class Special(nn.Linear):
        pass

    model = nn.Sequential(nn.Linear(32, 8, dtype=torch.bfloat16), Special(32, 8), nn.Linear(32, 8))
    model[2].forward = theirs = lambda x: x
    around_experts.install(model)
    assert "forward" not in model[1].__dict__
    assert model[2].forward is theirs
    seen = []
    model[0].register_forward_hook(lambda module, args, out: seen.append(out.shape))
    with torch.no_grad():
        model[0](torch.randn(3, 32).bfloat16())
    assert seen == [(3, 8)]
    around_experts.remove(model)
    assert "forward" not in model[0].__dict__
    assert model[2].forward is theirs


@needs_kernels
def test_linear_falls_back_where_the_kernel_does_not_apply(calls) -> None:
    linear = nn.Linear(32, 8, dtype=torch.bfloat16)
    around_experts.install(linear)
    with torch.no_grad():
        linear(torch.randn(9, 32).bfloat16())  # too many rows
        linear(torch.randn(0, 32).bfloat16())
        with torch.autocast("cpu", torch.bfloat16):
            linear(torch.randn(1, 32).bfloat16())
        with pytest.raises(RuntimeError):
            linear(torch.randn(1, 32))  # as without moekit
    x = torch.randn(1, 32).bfloat16()
    assert linear(x).requires_grad
    assert not calls
    with torch.no_grad():
        linear(x)
    assert calls["linear_decode"] == 1
    compiled = torch.compile(linear, backend="eager")
    with torch.no_grad():
        assert error(compiled(x), linear(x)) < 0.01


def test_without_kernels_everything_falls_back(monkeypatch) -> None:
    model, tokens = wide_model("olmoe", monkeypatch=monkeypatch), ids(1)
    with torch.no_grad():
        theirs = model(tokens).logits
        monkeypatch.setenv("MOEKIT_CPU_KERNELS", "0")
        find.cache_clear()
        try:
            moekit.use_in_transformers(model)
            model.set_experts_implementation("eager")
            assert torch.equal(model(tokens).logits, theirs)
        finally:
            monkeypatch.undo()
            find.cache_clear()


def test_a_model_of_somebody_else_is_refused() -> None:
    with pytest.raises(ConfigError, match="model must be a model of transformers; got 'Linear'"):
        moekit.use_in_transformers(nn.Linear(2, 2))


@needs_kernels
def test_quantised_experts_stay_on_moekit_after_undo(monkeypatch) -> None:
    model = wide_model("olmoe", monkeypatch=monkeypatch)
    moekit.use_in_transformers(model)
    quantize_experts(model, 8, 32)
    undo(model)
    assert model.config._experts_implementation == "moekit"
    assert model.config._attn_implementation == "sdpa"


# ---------------------------------------------------------------- attention


def attention_module(groups: int = 1) -> nn.Module:
    module = nn.Module()
    module.num_key_value_groups, module.is_causal = groups, True
    return module


@needs_kernels
@pytest.mark.parametrize(
    "case", ["dropout", "bias", "grad", "float32", "mask of many", "float mask", "sinks", "scale"]
)
def test_what_the_kernel_cannot_do_is_done_by_sdpa(case, calls) -> None:
    n = 20 if case == "mask of many" else 4
    q, k, v = torch.randn(3, 1, 2, n, 32).bfloat16()
    mask, extra = None, {}
    if case == "dropout":
        extra["dropout"] = 0.5
    elif case == "bias":
        extra["position_bias"] = torch.randn(1, 2, n, n).bfloat16()
    elif case == "grad":
        q.requires_grad_()
    elif case == "float32":
        q, k, v = q.float(), k.float(), v.float()
    elif case == "mask of many":
        mask = torch.ones(n, n).tril().bool()[None, None]
    elif case == "float mask":
        mask = torch.zeros(1, 1, n, n).bfloat16()
    elif case == "sinks":
        extra["s_aux"] = torch.zeros(2)
    elif case == "scale":
        extra["scaling"] = 0.0
    torch.manual_seed(0)
    ours, weights = around_experts.attention_forward(attention_module(), q, k, v, mask, **extra)
    torch.manual_seed(0)
    theirs, _ = sdpa_attention_forward(attention_module(), q, k, v, mask, **extra)
    assert weights is None
    torch.testing.assert_close(
        ours, theirs, rtol=0, atol=0, equal_nan=True
    )  # torch's own scale of 0 gives some
    assert not calls


@needs_kernels
@pytest.mark.parametrize("is_causal", [None, True, False])
@pytest.mark.parametrize(("n_queries", "n_keys"), [(1, 9), (3, 3), (3, 9), (40, 40), (40, 70)])
def test_causality_is_that_of_sdpa(n_queries, n_keys, is_causal, calls) -> None:
    q, k, v = torch.randn(2, 4, n_queries, 32), torch.randn(2, 2, n_keys, 32), torch.randn(2, 2, n_keys, 32)
    q, k, v = q.bfloat16(), k.bfloat16(), v.bfloat16()
    ours, _ = around_experts.attention_forward(attention_module(2), q, k, v, None, is_causal=is_causal)
    theirs, _ = sdpa_attention_forward(
        attention_module(2), q.float(), k.float(), v.float(), None, is_causal=is_causal
    )
    assert error(ours.float(), theirs) < 0.01
    assert calls["cached_attention"] == 1


# ---------------------------------------------------------------- norms


class LlamaRMSNorm(nn.Module):
    def __init__(self, width: int = 32, eps: float = 1e-5, early: bool = True, offset: float = 0.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width).bfloat16())
        self.variance_epsilon, self.early, self.offset = eps, early, offset

    def forward(self, x: Tensor) -> Tensor:
        normed = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        if self.early:
            return self.weight * normed.to(x.dtype)
        return ((self.weight.float() + self.offset) * normed).to(x.dtype)


class CentredRMSNorm(LlamaRMSNorm):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x - x.mean(-1, keepdim=True))


class WidenedRMSNorm(LlamaRMSNorm):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 1.01


@needs_kernels
@pytest.mark.parametrize("how", [{}, {"eps": 1e-2}, {"early": False}, {"early": False, "offset": 1.0}])
def test_norms_are_known_by_what_they_compute(how, calls) -> None:
    norm, x = LlamaRMSNorm(**how), torch.randn(3, 7, 32).bfloat16()
    nn.init.normal_(norm.weight)
    with torch.no_grad():
        theirs = norm(x)
        around_experts.install(norm)
        ours = norm(x)
    assert calls["rms_norm"] == 1
    assert (ours == theirs).float().mean() > 0.99
    assert error(ours, theirs) < 1e-3
    assert norm(x).requires_grad
    assert calls["rms_norm"] == 1


@needs_kernels
@pytest.mark.parametrize("kind", [CentredRMSNorm, WidenedRMSNorm])
def test_other_norms_are_left_alone(kind, calls) -> None:
    norm, x = kind(), torch.randn(3, 32).bfloat16()
    with torch.no_grad():
        theirs = norm(x)
        around_experts.install(norm)
        assert torch.equal(norm(x), theirs)
    assert not calls


# ---------------------------------------------------------------- caches


def test_a_growing_layer_holds_what_a_dynamic_one_holds() -> None:
    ours, theirs = around_experts._growing_layer()(), DynamicLayer()
    handed_out: list[tuple[Tensor, Tensor]] = []
    torch.manual_seed(0)
    for step, more in enumerate([5, 1, 1, 70, 1, 1, 3, 1]):
        keys, values = torch.randn(2, 2, 3, more, 8).unbind()
        if step == 4:
            ours.crop(-4)
            theirs.crop(-4)
        if step == 6:
            ours.reorder_cache(torch.tensor([1, 0]))
            theirs.reorder_cache(torch.tensor([1, 0]))
        with torch.inference_mode(step == 2):
            got, expected = ours.update(keys, values), theirs.update(keys, values)
        assert torch.equal(got[0], expected[0])
        assert torch.equal(got[1], expected[1])
        handed_out.append((got[0], got[0].clone()))
        assert ours.get_seq_length() == theirs.get_seq_length()
    # nothing that was handed out has changed, not even behind the crop
    assert all(torch.equal(now, then) for now, then in handed_out)
    twin = copy.deepcopy(ours)
    keys, values = torch.randn(2, 2, 3, 1, 8).unbind()
    before = ours.keys.clone()
    twin.update(keys, values)
    assert torch.equal(ours.keys, before)


def test_a_growing_layer_keeps_gradients() -> None:
    layer = around_experts._growing_layer()()
    first, second = torch.randn(1, 1, 2, 4, requires_grad=True), torch.randn(1, 1, 1, 4, requires_grad=True)
    layer.update(first, first)
    keys, _ = layer.update(second, second)
    keys.sum().backward()
    assert torch.equal(first.grad, torch.ones_like(first))
    assert torch.equal(second.grad, torch.ones_like(second))


@needs_kernels
def test_caches_of_a_model_grow_in_place(monkeypatch) -> None:
    model = wide_model("olmoe", monkeypatch=monkeypatch)
    moekit.use_in_transformers(model)
    cache, places = DynamicCache(), []
    with torch.no_grad():
        for _ in range(4):
            model(ids(1), past_key_values=cache)
            places.append(cache.layers[0].keys.data_ptr())
    assert len(set(places[1:])) == 1
    assert type(cache.layers[0]).__name__ == "GrowingLayer"
    assert copy.deepcopy(cache).get_seq_length() == 4
