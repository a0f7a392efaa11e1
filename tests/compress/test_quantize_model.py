"""Models in 8 and 4 bits: they answer like the dequantised model, rare experts get tokens, and nobody trains them."""

from __future__ import annotations

import pytest
import torch
from compress_samples import calibration, logits_of, never_choose, relative_error, some_ids, tiny_model

from moekit import ModelConfig
from moekit.compress.calibration import hidden_values, moe_at, observe, stacked_experts
from moekit.compress.moments import input_moments
from moekit.compress.prune import pruned
from moekit.compress.quantize import Quantize, linear_moments, share_quantized
from moekit.config.errors import ConfigError
from moekit.convert.formats.folder import read_model_folder, write_model_folder
from moekit.kernels.quantized import quantize
from moekit.layers.elastic import Elastic
from moekit.layers.quantized import QuantizedLinear, QuantizedWeight
from moekit.models.language_model import LanguageModel

SHARED = {"n_shared_experts": 1, "d_shared": 40, "shared_gate": True, "bias": True}
# every token to every expert: rounding then cannot move a choice, which would hide how small it is
ALL = {"top_k": 6}


def dequantised(model: LanguageModel, like: LanguageModel) -> LanguageModel:
    """A plain model of `like`'s kind (widths may be padded) with the weights that the codes stand for."""
    config = model.config.replace(linear_quantization=None)
    moe = config.moe.replace(quantization=None) if config.moe is not None else None
    plain = LanguageModel(config.replace(moe=moe))
    state = dict(model.state_dict())
    for name, module in model.named_modules():
        if isinstance(module, QuantizedWeight):
            del state[f"{name}.codes"], state[f"{name}.scales"]
            values = module.dequantize(torch.float32)
            state[name] = values[0] if plain.state_dict()[name].ndim == 2 else values
    plain.load_state_dict(state)
    return plain.eval()


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("more", [{}, SHARED, {"activation": "relu", "null_experts": {"zero": 1}}], ids=str)
@pytest.mark.parametrize("linear", [False, True], ids=["experts", "linear"])
def test_a_quantised_model_answers_like_the_dequantised_one(bits, more, linear, tmp_path):
    model = tiny_model(**more, **ALL)
    smaller, details = Quantize(bits, 32, linear, fewest_tokens=8).apply(model, calibration())
    plain = dequantised(smaller, model)
    assert relative_error(logits_of(smaller), logits_of(plain)) < 1e-3, "tokens are rounded to 16 bits"
    assert relative_error(logits_of(smaller), logits_of(model)) < (0.04 if bits == 8 else 0.5)
    write_model_folder(smaller, tmp_path, [], {})
    again = read_model_folder(tmp_path)
    assert torch.equal(logits_of(again), logits_of(smaller))
    assert details["quantized"]["share_of_expert_bytes"] > 0.95
    as_stored = read_model_folder(tmp_path, None)
    assert relative_error(logits_of(as_stored), logits_of(smaller)) == 0


def test_without_kernels_and_with_hooks_the_weights_are_made(monkeypatch):
    """The plain path: another machine, a GPU, somebody who watches the experts, uneven rows."""
    smaller, _ = Quantize(4, 32, True).apply(tiny_model(), calibration())
    expected = logits_of(smaller)
    handle = smaller.moe_layers[0].experts.register_forward_hook(lambda *_: None)
    assert relative_error(logits_of(smaller), expected) < 1e-3
    handle.remove()
    monkeypatch.setattr("moekit.kernels.chosen_experts.find", lambda *_: None)
    monkeypatch.setattr("moekit.kernels.quantized_linear.find", lambda *_: None)
    assert relative_error(logits_of(smaller), expected) < 1e-3
    with torch.enable_grad():  # in evaluation mode a gradient of the input may be asked for
        logits = smaller(some_ids()).logits
        assert logits.requires_grad
    assert relative_error(logits.detach(), expected) < 1e-3


def test_padding_rows_and_generation_with_a_cache():
    smaller, _ = Quantize(8, 32).apply(tiny_model(), calibration())
    ids = some_ids()
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[0, 9:] = False
    with torch.no_grad():
        masked = smaller(ids, token_mask=mask).logits
    assert relative_error(masked[1:], logits_of(smaller)[1:]) < 1e-3


@pytest.mark.parametrize("activation", ["swiglu", "gelu", "sigmoid"])
def test_widths_that_are_no_multiple_are_padded_with_neurons_that_say_nothing(activation):
    model = tiny_model(d_expert=20, activation=activation, bias=True, **ALL)
    for name, parameter in model.named_parameters():
        if ".b_in" in name:
            torch.nn.init.normal_(parameter)
    smaller, details = Quantize(8, 32).apply(model, calibration())
    assert smaller.config.moe.d_expert == 32
    assert details["zero_neurons_added"] == {"0": 12, "1": 12}
    # the padded model in full precision is the same function; only rounding is left
    assert relative_error(logits_of(smaller), logits_of(model)) < 0.02
    w_out = smaller.moe_layers[0].experts.w_out.dequantize(torch.float32)
    assert (w_out[:, :, 20:] == 0).all()


def test_weights_on_the_grid_lose_nothing():
    model = tiny_model()
    with torch.no_grad():
        for layer in model.moe_layers:
            for name in ("w_in", "w_out"):
                weight = getattr(layer.experts, name)
                codes = torch.randint(-7, 8, weight.shape)
                codes[..., 0] = -8  # the largest of each group of 32 is a code of the usual scale
                weight.copy_(codes * 0.0625)
    smaller, _ = Quantize(4, 32).apply(model, calibration())
    for old, new in zip(model.moe_layers, smaller.moe_layers, strict=True):
        assert torch.equal(new.experts.w_in.dequantize(torch.float32), old.experts.w_in)
    assert relative_error(logits_of(smaller), logits_of(model)) < 1e-3


def test_a_starved_expert_is_given_the_tokens_that_its_router_likes_best():
    model = tiny_model(balance={"bias_update_rate": 0.01})
    never_choose(model, 1, 3)
    moments = input_moments(model, [0, 1], calibration(256), fewest=40)[1]
    natural, seen = moments.natural.tolist(), moments.tokens.tolist()
    assert natural[3] == 0
    assert seen[3] == 40
    assert min(seen) >= 40
    assert [s for s, n in zip(seen, natural, strict=True) if n >= 40] == [n for n in natural if n >= 40]
    # by hand: the 40 tokens with the largest logits for expert 3
    tokens, logits = [], []

    def note(call):
        tokens.append(call.tokens)
        logits.append(call.plan.router_logits[:, 3])

    observe(model, calibration(256).batches(), {1: note})
    best = torch.cat(tokens)[torch.cat(logits).topk(40).indices]
    weights = stacked_experts(moe_at(model, 1)).tensors(torch.float32)
    expected = best.double().square().sum(0)
    torch.testing.assert_close(moments.first[3], expected, rtol=1e-5, atol=1e-8)
    expected = hidden_values(weights, 3, best).double().square().sum(0)
    torch.testing.assert_close(moments.second[3], expected, rtol=1e-5, atol=1e-8)


def test_the_report_names_the_experts_that_were_given_tokens():
    model = tiny_model(balance={"bias_update_rate": 0.01})
    never_choose(model, 0, 5)
    _, details = Quantize(8, 32, fewest_tokens=20).apply(model, calibration())
    assert details["layers"][0]["forced"] == [5]
    assert details["layers"][1]["forced"] == []
    assert details["forced_experts"] == 1
    assert details["layers"][0]["tokens_of_router"][5] == 0
    assert details["layers"][0]["tokens_seen"][5] == 20


def test_routers_without_logits_force_random_tokens():
    moments = input_moments(tiny_model(router="hash"), [0], calibration(64), fewest=48)[0]
    assert moments.tokens.min() == 48
    assert moments.first.min() > 0


def test_an_expert_that_saw_nothing_is_rounded_with_all_inputs_alike():
    model = tiny_model(balance={"bias_update_rate": 0.01})
    never_choose(model, 0, 1)
    moments = input_moments(model, [0], calibration(64), fewest=0)[0]
    first, second = moments.importance()
    assert (first[1] == 1).all()
    assert (second[1] == 1).all()
    assert (first > 0).all()


def test_calibrated_scales_make_the_answers_better_where_inputs_differ():
    weight = torch.randn(2, 32, 128)
    inputs = torch.randn(2, 400, 128) * torch.logspace(-2, 1, 128)[torch.randperm(128)]
    importance = inputs.square().mean(1)

    def error(matrix) -> float:
        answer = inputs @ matrix.dequantize(torch.float32).transpose(1, 2)
        return float((answer - inputs @ weight.transpose(1, 2)).norm())

    for bits in (4, 8):
        plain, calibrated = quantize(weight, bits), quantize(weight, bits, importance=importance)
        assert error(calibrated) < 0.97 * error(plain), bits


def test_the_share_that_was_quantised_is_counted_in_bytes_of_before():
    model = tiny_model(bias=True)
    _, details = Quantize(8, 32).apply(model, calibration())
    weights = 2 * 6 * (3 * 32 * 32) * 4
    biases = 2 * 6 * (64 + 32) * 4
    total = sum(parameter.nbytes for parameter in model.parameters())
    assert details["quantized"]["share_of_expert_bytes"] == weights / (weights + biases)
    assert details["quantized"]["share_of_all_bytes"] == weights / total
    # 8 bits and a scale of 16 for each 32
    assert details["quantized"]["bits_per_weight"] == 8.5
    assert share_quantized(model, model)["share_of_expert_bytes"] == 0


def test_pruning_after_quantising():
    model = tiny_model()
    smaller, _ = Quantize(4, 32).apply(model, calibration())
    both = pruned(smaller, {0: [0, 4], 1: [1, 2, 3]})
    other, _ = Quantize(4, 32).apply(pruned(model, {0: [0, 4], 1: [1, 2, 3]}), calibration())
    assert both.moe_layers[0].experts.w_in.codes.shape == other.moe_layers[0].experts.w_in.codes.shape
    assert logits_of(both).isfinite().all()


def test_a_dense_model_can_have_its_linear_maps_quantised():
    config = ModelConfig(vocab_size=64, d_model=64, n_layers=2, n_heads=2, d_ff=96, init_std=0.3)
    model = LanguageModel(config).eval()
    smaller, details = Quantize(8, 32, linear=True).apply(model, calibration(64))
    assert relative_error(logits_of(smaller), logits_of(model)) < 0.05
    assert sum(isinstance(module, QuantizedLinear) for module in smaller.modules()) == 2 * 4
    assert details["quantized"]["share_of_all_bytes"] > 0.8
    with pytest.raises(ConfigError, match="a dense model has no experts"):
        Quantize(8, 32).apply(model, calibration(64))
    with pytest.raises(
        ConfigError, match="linear_quantization must be null: these maps are quantised already"
    ):
        Quantize(4, 32, linear=True).apply(smaller, calibration(64))


def test_moments_of_linear_maps():
    model = tiny_model(**SHARED)
    moments = linear_moments(model, calibration(64))
    assert {
        "backbone.layers.0.attention.qkv",
        "backbone.layers.1.feed_forward.shared.mlp.w_out",
    } <= moments.keys()
    assert moments["backbone.layers.0.attention.qkv"].shape == (32,)


@pytest.mark.parametrize(
    ("method", "fields", "words"),
    [
        (Quantize(8, 64), {}, r"group_size must divide d_model \(32\); got 64"),
        (Quantize(3, 32), {}, "quantize.bits"),
        (Quantize(8, 32), {"quantization": {"group_size": 32}}, "quantization of layer 0 must be null"),
    ],
)
def test_what_cannot_be_quantised(method, fields, words):
    with pytest.raises(ConfigError, match=words):
        method.apply(tiny_model(**fields), calibration(64))


def test_only_some_layers():
    smaller, details = Quantize(8, 32, layers=(1,)).apply(tiny_model(), calibration(64))
    assert [entry["layer"] for entry in details["layers"]] == [1]
    assert [layer.experts.quantized for layer in smaller.moe_layers] == [False, True]
    assert 0.4 < details["quantized"]["share_of_expert_bytes"] < 0.6


def test_one_layer_after_another():
    """Each report counts what was quantised then."""
    first, _ = Quantize(8, 32, layers=(0,)).apply(tiny_model(), calibration(64))
    _, details = Quantize(8, 32, layers=(1,)).apply(first, calibration(64))
    assert details["quantized"]["bits_per_weight"] == 8.5


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.filterwarnings("ignore::moekit.config.errors.UntaughtRouterWarning")
@torch.no_grad()
def test_a_quantised_model_follows_the_number_of_experts_of_a_call(bits):
    model = tiny_model()
    smaller, _ = Quantize(bits=bits, group_size=32).apply(model, calibration())
    config = smaller.config
    for k in (1, 4):
        layers = {index: {**change, "top_k": k} for index, change in config.moe_by_layer.items()}
        other = LanguageModel(config.replace(moe=config.moe.replace(top_k=k), moe_by_layer=layers)).eval()
        other.load_state_dict(smaller.state_dict())
        for ids in (some_ids(), some_ids(1, 1)):  # a single token takes the kernels of decoding
            assert torch.equal(smaller(ids, elastic=Elastic(top_k=k)).logits, other(ids).logits)
