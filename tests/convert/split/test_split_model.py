"""A decoder split: what is recorded, which layers change, and that the source stays as it is."""

from __future__ import annotations

import pytest
import torch
from split_samples import random_mlp, tiny_model
from torch import nn

from moekit.config.encoder import EncoderConfig
from moekit.config.errors import ConfigError, DataError
from moekit.convert.split.calibration import Recorded, record
from moekit.convert.split.layer import split_layer
from moekit.convert.split.model import layers_to_split, record_layers, split_model
from moekit.convert.split.oracle import experts_active
from moekit.convert.split.settings import SplitSettings
from moekit.layers.experts import MLP
from moekit.layers.moe import MoE
from moekit.models.encoder import Encoder
from moekit.models.language_model import LanguageModel
from moekit.models.transformer_xl import TransformerXL

SETTINGS = SplitSettings(4, 0.5, grouping="kmeans", router="similarity")


def texts() -> list[torch.Tensor]:
    return [torch.randint(0, 64, (2, 16)) for _ in range(4)]


def run_of(model: LanguageModel):
    return lambda ids: model(ids, targets=ids).loss


def split(model: LanguageModel, settings: SplitSettings = SETTINGS):
    recorded = record_layers(model, settings, texts(), run_of(model), n_tokens=64)
    return split_model(model, recorded, settings)


# ---------------------------------------------------------------- recording


def test_inputs_and_gradients_are_what_autograd_says():
    """Two layers, f(x) = sum(b(a(x))): the gradient behind b is 1, behind a the derivative of b."""
    model = nn.Sequential(random_mlp(4, 6, "relu"), random_mlp(4, 6, "relu")).train()
    x = torch.randn(5, 4)
    middle = model[0](x).detach().requires_grad_()
    model[1](middle).sum().backward()
    expected = middle.grad.clone()
    model.zero_grad()
    found = record(
        model, {"a": model[0], "b": model[1]}, [x], lambda x: model(x).sum(), n_tokens=5, gradients=True
    )
    torch.testing.assert_close(found["a"].inputs, x)
    torch.testing.assert_close(found["b"].inputs, middle.detach())
    torch.testing.assert_close(found["a"].gradients, expected)
    torch.testing.assert_close(found["b"].gradients, torch.ones(5, 4))
    assert model.training
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_padding_is_left_out_and_recording_stops_when_there_is_enough():
    model = random_mlp(4, 6)
    batches = iter([torch.full((1, 3, 4), float(i)) for i in range(9)])
    mask = torch.tensor([[True, False, True]])
    found = record(model, {0: model}, batches, lambda x: model(x).sum(), n_tokens=5, mask=lambda _: mask,
                   gradients=True)[0]  # fmt: skip
    assert found.inputs[:, 0].tolist() == [0, 0, 1, 1, 2]
    assert found.gradients.shape == (5, 4)
    assert float(next(batches)[0, 0, 0]) == 3


def test_too_little_text():
    model = random_mlp(4, 6)
    with pytest.raises(DataError, match="fewer than two tokens"):
        record(model, {0: model}, [], lambda x: model(x).sum(), n_tokens=5)
    with pytest.raises(ConfigError, match="tokens must be at least 2"):
        record(model, {0: model}, [], lambda x: model(x).sum(), n_tokens=1)


def test_an_error_leaves_no_hook_behind():
    model = random_mlp(4, 6)
    with pytest.raises(ZeroDivisionError):
        record(model, {0: model}, [torch.zeros(3, 4)], lambda x: 1 / 0, n_tokens=5)
    assert not model._forward_pre_hooks
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_fitted_and_held_tokens():
    fit, held = Recorded(torch.arange(16.0)[:, None], torch.arange(16.0)[:, None]).parted()
    assert fit.inputs[:, 0].tolist() == list(range(14))
    assert held.inputs[:, 0].tolist() == held.gradients[:, 0].tolist() == [14, 15]


# ---------------------------------------------------------------- models


@pytest.mark.parametrize("fields", [{}, {"tie_embeddings": False}, {"activation": "gelu", "mlp_bias": True},
                                    {"activation": "relu"}])  # fmt: skip
def test_all_experts_give_the_logits_of_the_dense_model(fields):
    model = tiny_model(**fields)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = split(model)
    ids = torch.randint(0, 64, (2, 20))
    with torch.no_grad():
        dense = model(ids).logits
        assert (found.model(ids).logits - dense).norm() > 1e-2 * dense.norm()
        with experts_active(found.layers):
            torch.testing.assert_close(found.model(ids).logits, dense, rtol=1e-5, atol=1e-5)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert found.model.config.moe_layers == (0, 1, 2)
    assert found.model.config.moe_by_layer == {}
    assert found.model.moe_layers == found.layers
    assert not found.model.training


def test_a_tied_model_stays_tied_and_every_parameter_learns():
    found = split(tiny_model()).model
    assert found.head.weight is found.stem.weight
    ids = torch.randint(0, 64, (2, 8))
    found.train()(ids, targets=ids).loss.backward()
    # a layer whose top-k is chosen by similarity teaches its router too
    assert all(parameter.grad is not None for parameter in found.parameters())


def test_only_the_layers_that_are_wanted():
    settings = SplitSettings(4, 0.5, grouping="kmeans", router="similarity", layers=(2, 0))
    model = tiny_model()
    found = split(model, settings)
    kinds = [type(layer.feed_forward) for layer in found.model.backbone.layers]
    assert kinds == [MoE, MLP, MoE]
    assert found.model.config.dense_layers == (1,)
    assert list(found.reports) == [0, 2]


def test_the_dense_layers_of_a_sparse_model():
    """Layers 0 and 2 are dense, 1 is sparse with another router, balancing and shape: it stays what it is."""
    moe = {"n_experts": 6, "top_k": 2, "d_expert": 5, "router": "sigmoid", "balance": {"load_balance": 0.02}}
    model = tiny_model(moe=moe, dense_layers=(0, 2))
    found = split(model)
    config = found.model.config
    assert [config.moe_of(layer).router.name for layer in range(3)] == ["softmax", "sigmoid", "softmax"]
    assert config.moe_of(1) == model.config.moe
    assert config.moe_of(0).n_experts == 4
    assert len(found.layers) == 2
    ids = torch.randint(0, 64, (2, 20))
    with torch.no_grad(), experts_active(found.layers):
        torch.testing.assert_close(found.model(ids).logits, model(ids).logits, rtol=1e-5, atol=1e-5)


def test_models_and_layers_that_cannot_be_split():
    with pytest.raises(ConfigError, match="no dense layer to split: all 3 are sparse"):
        layers_to_split(tiny_model(moe={"n_experts": 2, "d_expert": 4}), None)
    with pytest.raises(
        ConfigError, match=r"layers must be numbers of dense layers, from 0; got 3. Dense layers: 0, 1, 2"
    ):
        layers_to_split(tiny_model(), (0, 3))
    codes = {"bits": 8, "group_size": 32}
    with pytest.raises(ConfigError, match=r"layer 0 is quantised and cannot be taken apart. Split the model"):
        layers_to_split(tiny_model(d_model=32, d_ff=32, linear_quantization=codes), None)
    with pytest.raises(ConfigError, match="at least one layer"):
        layers_to_split(tiny_model(), ())
    from moekit.config.model import TransformerXLConfig

    with pytest.raises(ConfigError, match="TransformerXL has no layers that this splits"):
        layers_to_split(TransformerXL(TransformerXLConfig(d_model=8, n_layers=1, d_ff=8, n_heads=2)), None)


def test_a_wrong_width_is_found_before_anything_runs():
    def never(ids: torch.Tensor) -> torch.Tensor:
        raise AssertionError("the model was run")

    with pytest.raises(ConfigError, match="divide the 24 neurons of layer 0"):
        record_layers(tiny_model(), SplitSettings(5, 0.4), texts(), never, n_tokens=8)


def test_random_groups_differ_between_layers():
    model = tiny_model()
    with torch.no_grad():  # equal layers: only the groups can differ
        for layer in model.backbone.layers[1:]:
            layer.feed_forward.load_state_dict(model.backbone.layers[0].feed_forward.state_dict())
    layers = split(model, SplitSettings(4, 0.5, grouping="random", router="random")).layers
    assert not torch.equal(layers[0].experts.w_in, layers[1].experts.w_in)


def test_a_split_layer_decodes_token_by_token():
    from moekit.layers.cache import KVCache

    model = split(tiny_model()).model
    ids = torch.randint(0, 64, (1, 12))
    cache = KVCache.for_config(model.config, 1, 12)
    with torch.no_grad():
        whole = model(ids).logits
        steps = torch.cat([model(ids[:, t : t + 1], cache=cache).logits for t in range(12)], dim=1)
    torch.testing.assert_close(steps, whole, rtol=1e-4, atol=1e-4)


def test_an_encoder_with_padding():
    config = EncoderConfig(vocab_size=64, d_model=16, n_layers=2, n_heads=2, d_ff=24, activation="relu",
                           labels=("a", "b", "c"), init_std=0.3)  # fmt: skip
    model = Encoder(config).eval()
    ids = torch.randint(0, 64, (6, 9))
    mask = torch.arange(9) < torch.tensor([9, 3, 5, 1, 9, 8])[:, None]
    settings = SplitSettings(4, 0.5, grouping="coactivation", router="mlp", d_router=4, router_steps=20)
    recorded = record_layers(
        model, settings, [ids], lambda ids: model(ids, token_mask=mask, targets=ids[:, 0] % 3).loss,
        n_tokens=100, mask=lambda ids: mask,
    )  # fmt: skip
    assert [len(found.inputs) for found in recorded.values()] == [int(mask.sum())] * 2
    found = split_model(model, recorded, settings)
    with torch.no_grad():
        dense = model(ids, token_mask=mask).logits
        assert (found.model(ids, token_mask=mask).logits - dense).norm() > 1e-3 * dense.norm()
        with experts_active(found.layers):
            torch.testing.assert_close(found.model(ids, token_mask=mask).logits, dense, rtol=1e-5, atol=1e-5)
    assert found.model.config.moe_layers == (0, 1)
    assert found.model.moe_layers == found.layers


def test_any_module_of_mlps_can_be_split():
    """No decoder: a network of a user's own, with padding."""

    class Tower(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = random_mlp(8, 12, "relu", True), random_mlp(8, 12, "gelu")

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.second(self.first(x))

    tower, x = Tower(), torch.randn(4, 10, 8)
    layers = {name: getattr(tower, name) for name in ("first", "second")}
    recorded = record(tower, layers, [x], lambda x: tower(x).mean(), n_tokens=40)
    for name, mlp in layers.items():
        layer, _ = split_layer(mlp, recorded[name], SETTINGS, name)
        with torch.no_grad(), experts_active([layer]):
            torch.testing.assert_close(layer(x).hidden_states, mlp(x), rtol=1e-5, atol=1e-5)
