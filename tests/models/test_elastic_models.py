"""A decoder at a setting of the call: with a cache, recomputed, grown, with other paths beside its experts."""

import pytest
import torch

from moekit import ModelConfig
from moekit.config.errors import ConfigError
from moekit.layers.cache import KVCache
from moekit.layers.elastic import Elastic
from moekit.models.elastic import AtSetting, require_elastic_model
from moekit.models.language_model import LanguageModel
from moekit.models.reshape_experts import Reshape, reshape_layer

E = 6
KINDS = {
    "plain": {},
    "shared": {"n_shared_experts": 1, "shared_gate": True},
    "null": {"null_experts": {"zero": 1, "copy_input": 1}},
    "bias": {"balance": {"bias_update_rate": 0.1}},
    "grown": {"families": True},
    "grown, bias": {"families": True, "balance": {"bias_update_rate": 0.1}},
}


def decoder(kind="plain", **more):
    torch.manual_seed(0)
    moe = {"n_experts": E, "d_expert": 32, "top_k": 2, "router": {"name": "softmax", "normalize": "before"}}
    fields = {"vocab_size": 50, "d_model": 32, "n_layers": 2, "n_heads": 2, "init_std": 0.3, **more}
    model = LanguageModel(ModelConfig.from_dict({**fields, "moe": {**moe, **KINDS[kind]}})).eval()
    for number, layer in enumerate(model.config.moe_layers):
        router = model.moe_layers[number].router
        if router.expert_bias is not None:
            router.expert_bias.copy_(torch.linspace(-0.3, 0.3, router.n_experts))
        if router.family is not None:
            reshape_layer(model, layer, Reshape.split(range(E), range(E), [0, 2, 3]), 0.05, seed=(layer,))
    return model


def configured(model, k):
    """The same weights in a model whose configuration says `k`."""
    config = model.config
    layers = {index: {**change, "top_k": k} for index, change in config.moe_by_layer.items()}
    made = LanguageModel(config.replace(moe=config.moe.replace(top_k=k), moe_by_layer=layers))
    made.load_state_dict(model.state_dict())
    return made.eval()


@pytest.fixture
def ids():
    return torch.randint(0, 50, (3, 12), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("k", [1, 2, 4])
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_call_equals_the_configuration_and_token_by_token_the_whole(kind, k, ids):
    model, at = decoder(kind), Elastic(top_k=k)
    whole = AtSetting(model, at)(ids)
    assert torch.equal(whole.logits, configured(model, k)(ids).logits)
    assert all(int(plan.requested.sum()) == k * ids.numel() for plan in whole.routing)
    cache = KVCache.for_config(model.config, 3, 12, torch.float32, ids.device)
    # single rows without a gradient take the kernels of decoding
    parts = [model(ids[:, :4], cache=cache, elastic=at)]
    parts += [model(ids[:, place : place + 1], cache=cache, elastic=at) for place in range(4, 12)]
    assert torch.allclose(torch.cat([part.logits for part in parts], dim=1), whole.logits, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_recomputed_activations_have_the_setting_of_the_call(kind, ids):
    gradients = []
    for recompute in (False, True):
        model = decoder(kind).train()
        model.backbone.recompute = recompute
        model(ids, targets=ids, elastic=Elastic(top_k=3)).loss.backward()
        gradients.append([p.grad for p in model.parameters()])
    for plain, recomputed in zip(*gradients, strict=True):
        assert (plain is None) == (recomputed is None)
        assert plain is None or torch.equal(plain, recomputed)


def test_what_has_no_number_to_set():
    dense = LanguageModel(ModelConfig(vocab_size=50, d_model=32, n_layers=1, n_heads=2))
    with pytest.raises(ConfigError, match=r"elastic \(k=1\) needs a model with sparse layers"):
        AtSetting(dense, Elastic(top_k=1))
    require_elastic_model(dense, Elastic())
    with pytest.raises(ConfigError, match=r"sparse layer 0: elastic.top_k must be at most the families"):
        AtSetting(decoder("grown"), Elastic(top_k=7))
