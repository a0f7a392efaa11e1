"""Experts taken away: exactly where nobody used them, in every router that allows it, at every kind of tensor."""

from __future__ import annotations

import pytest
import torch
from compress_samples import calibration, logits_of, never_choose, relative_error, some_ids, tiny_model

from moekit import ModelConfig, MoEConfig
from moekit.compress.merge import Merge
from moekit.compress.prune import Prune, pruned
from moekit.compress.reshaping import BY_ROWS, with_layers
from moekit.config.errors import ConfigError
from moekit.convert.formats.folder import read_model_folder, write_model_folder
from moekit.layers.routing import ROUTERS
from moekit.layers.statistics import routing_stats
from moekit.models.language_model import LanguageModel
from moekit.models.reshape_experts import Reshape, reshape_layer
from moekit.train.loop import balance_metrics

BIASED = {"bias_update_rate": 0.01}


@pytest.mark.parametrize("router", ["softmax", "sigmoid", "noisy_topk", "mlp"])
@pytest.mark.parametrize(
    "more", [{}, {"null_experts": {"copy_input": 1, "zero": 1}}, {"bias": True}], ids=str
)
def test_an_expert_that_is_never_chosen_leaves_no_trace(router, more):
    model = tiny_model(router=router, balance=BIASED, **more)
    for name, parameter in model.named_parameters():  # biases that are zeros would hide a mistake
        if ".b_in" in name or ".b_out" in name:
            torch.nn.init.normal_(parameter)
    never_choose(model, 0, 2)
    never_choose(model, 1, 0)
    smaller = pruned(model, {0: [0, 1, 3, 4, 5], 1: [1, 2, 3, 4, 5]})
    assert relative_error(logits_of(smaller), logits_of(model)) < 1e-6
    assert [layer.config.n_experts for layer in smaller.moe_layers] == [5, 5]
    assert smaller.moe_layers[0].router.expert_bias.shape == (5 + model.config.moe.null_experts.total,)


def test_reap_and_frequency_find_the_expert_that_is_never_chosen():
    for method in ("reap", "frequency"):
        model = tiny_model(balance=BIASED)
        never_choose(model, 0, 4)
        never_choose(model, 1, 1)
        smaller, details = Prune(method, n_experts=5).apply(model, calibration())
        assert [entry["kept"] for entry in details["layers"]] == [[0, 1, 2, 3, 5], [0, 2, 3, 4, 5]]
        assert [entry["share_of_rows_kept"] for entry in details["layers"]] == [1.0, 1.0]
        assert relative_error(logits_of(smaller), logits_of(model)) < 1e-6


def test_an_expert_in_use_is_missed():
    model = tiny_model()
    assert relative_error(logits_of(pruned(model, {0: [0, 1, 2], 1: [0, 1, 2]})), logits_of(model)) > 0.05


def test_what_is_kept_is_what_was_there():
    model = tiny_model(balance=BIASED, bias=True, router={"name": "softmax", "logit_bias": True})
    for name, tensor in model.state_dict().items():
        if "router" in name or ".b_" in name:
            torch.nn.init.normal_(tensor)
    smaller = pruned(model, {1: [1, 4]})
    old, new = model.state_dict(), smaller.state_dict()
    assert old.keys() == new.keys()
    for name, tensor in new.items():
        expected = old[name][[1, 4]] if "layers.1.feed_forward." in name else old[name]
        assert torch.equal(tensor, expected), name
    assert smaller.config.moe_of(0).n_experts == 6
    assert smaller.config.moe_of(1).n_experts == 2
    assert model.config.moe_of(1).n_experts == 6, "the source stays as it is"


@pytest.mark.parametrize("router", BY_ROWS)
def test_every_router_that_treats_experts_by_themselves_can_lose_some(router, tmp_path):
    fields = {"top_k": 1} if router == "switch" else {}
    model = tiny_model(router=router, **fields)
    smaller = pruned(model, {0: [0, 2, 5], 1: [1, 3, 4, 5]})
    out = smaller(some_ids())
    assert out.logits.isfinite().all()
    assert [len(plan.tokens_per_expert) for plan in out.routing] == [3, 4]
    write_model_folder(smaller, tmp_path, [], {})
    again = read_model_folder(tmp_path)
    torch.manual_seed(0)
    expected = logits_of(smaller)
    torch.manual_seed(0)
    assert torch.equal(logits_of(again), expected)


OTHERS = {
    "hierarchical": {"n_groups": 2},
    "group_limited": {"n_groups": 2},
    "rule": {"rules": [{"expert": 0, "token_ids": [[3]]}]},
    "expert_choice": {},
    "neurons": {},
    "base": {},
    "soft": {},
}


def test_every_router_is_one_or_the_other():
    ours = {name for name, router in ROUTERS.items() if router.__module__.startswith("moekit.layers.")}
    assert ours - {"first_expert"} == set(BY_ROWS) | set(OTHERS)


@pytest.mark.parametrize("router", OTHERS)
def test_every_other_router_is_refused_by_name(router):
    config = {"vocab_size": 64, "d_model": 32, "n_layers": 1, "n_heads": 2, "allow_noncausal_router": True,
              "moe": {"n_experts": 6, "d_expert": 32, "router": {"name": router, **OTHERS[router]}}}  # fmt: skip
    model = LanguageModel(ModelConfig.from_dict(config))
    with pytest.raises(ConfigError, match=f"router of layer 0 must be one that treats.*got '{router}'"):
        Prune("reap", keep=0.5).apply(model, calibration(64))


def test_a_hash_router_moves_only_the_tokens_that_lost_an_expert():
    model = tiny_model(router={"name": "hash", "seed": 3})
    kept = [0, 2, 3, 5]
    smaller = pruned(model, {0: kept, 1: kept})
    ids = torch.arange(64)
    before = model.moe_layers[0].router._choices(ids)
    after = torch.tensor(kept)[smaller.moe_layers[0].router._choices(ids)]
    stays = torch.isin(before, torch.tensor(kept))
    untouched = stays.all(dim=1)
    assert 0 < untouched.sum() < 64
    assert torch.equal(after[untouched], before[untouched])
    for row in range(64):
        assert set(before[row][stays[row]].tolist()) <= set(after[row].tolist()), (
            "no choice is lost without need"
        )
    # and again: what was lost before stays lost
    twice = pruned(smaller, {0: [0, 2, 3]})
    numbers = torch.tensor(twice.config.moe_of(0).router.options["experts"])
    assert numbers.tolist() == [0, 3, 5]
    assert numbers[twice.moe_layers[0].router._choices(ids)].unique().tolist() == [0, 3, 5]


def test_the_floor_is_top_k_and_budgets_may_differ_between_layers():
    model = tiny_model()
    smaller, details = Prune("frequency", keep=0.01).apply(model, calibration())
    assert [entry["experts"] for entry in details["layers"]] == [2, 2]
    _, details = Prune("reap", keep=0.5, per_layer="global").apply(model, calibration())
    assert sum(entry["experts"] for entry in details["layers"]) == 6
    assert smaller.config.moe.n_experts == 2
    assert smaller.config.moe_by_layer == {}


def test_only_the_layers_that_were_named():
    model = tiny_model()
    smaller, details = Prune("random", keep=0.5, layers=(1,)).apply(model, calibration())
    assert [entry["layer"] for entry in details["layers"]] == [1]
    assert [layer.config.n_experts for layer in smaller.moe_layers] == [6, 3]


def test_the_control_has_as_many_experts_in_every_layer():
    model = tiny_model()
    method = Prune("reap", keep=0.7, per_layer="global")
    smaller, details = method.apply(model, calibration())
    what, control = method.control(model, calibration(), details)
    assert what == "random experts"
    sizes = [[layer.config.n_experts for layer in m.moe_layers] for m in (smaller, control)]
    assert sizes[0] == sizes[1]


def test_a_dense_model_has_nothing_to_prune():
    model = LanguageModel(ModelConfig(vocab_size=64, d_model=32, n_layers=1, n_heads=2))
    with pytest.raises(ConfigError, match=r"model.moe must be given: a dense model has no experts"):
        Prune("reap", keep=0.5).apply(model, calibration(64))


def test_layers_that_most_share_stand_in_moe_and_balance_stays_the_models():
    config = ModelConfig(
        n_layers=4,
        moe=MoEConfig(n_experts=8, balance=BIASED | {"router_z": 0.5}),
        moe_by_layer={0: {"router": "hash", "balance": {"bias_update_rate": 0}}},
    )
    small = config.moe_of(1).replace(n_experts=5)
    changed = with_layers(config, {1: small, 2: small, 3: small})
    assert changed.moe.n_experts == 5
    assert changed.moe.balance == config.moe.balance
    assert set(changed.moe_by_layer) == {0}
    assert [changed.moe_of(i) for i in range(4)] == [config.moe_of(0), small, small, small]
    assert ModelConfig.from_dict(changed.to_dict()) == changed


def test_training_goes_on_with_layers_of_different_sizes():
    """What is logged of the routing has one load for all layers, which such layers have not."""
    smaller = pruned(tiny_model(), {0: [0, 1, 2]}).train()
    out = smaller(some_ids(), targets=some_ids())
    out.loss.backward()
    metrics = balance_metrics(routing_stats(out.routing))
    assert "load" not in metrics
    assert metrics["mean_active_experts"] == 2.0


def grown():
    """Every layer's experts doubled; all tokens choose expert 0 or its copy: by use alone these two would stay."""
    model = tiny_model(router={"name": "softmax", "options": {"logit_bias": True}}, families=True)
    for layer in model.config.moe_layers:
        n = model.config.moe_of(layer).n_experts
        reshape_layer(model, layer, Reshape.split(range(n), range(n), range(n)), 0.01)
        model.backbone.layers[layer].feed_forward.router.logit_bias.data[[0, n]] = 30.0
    return model


@pytest.mark.parametrize("per_layer", ["uniform", "global"])
@pytest.mark.parametrize("method", ["frequency", "random"])
def test_as_many_families_stay_as_a_token_takes(method, per_layer):
    model, ids = grown(), some_ids()
    prune = Prune(method, n_experts=2, per_layer=per_layer, seed=3)
    smaller, details = prune.apply(model, calibration())
    _, control = prune.control(model, calibration(), details)
    for built in (smaller, control):
        for layer, plan in zip(built.moe_layers, built(ids).routing, strict=True):
            assert len(set(layer.router.family.tolist())) == 2
            chosen = plan.router_logits[plan.token_index, plan.expert_of_row()]
            assert torch.isfinite(chosen).all()  # nothing that is closed because its kin was chosen


def test_families_cannot_be_merged():
    for router in ("kept", "averaged"):
        with pytest.raises(ConfigError, match=r"families of layer \d must be false to merge.*compress prune"):
            Merge("hc-smoe", n_experts=2, router=router).apply(grown(), calibration())
