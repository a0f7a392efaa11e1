"""Spaces: whatever is drawn can be built, stays within the budget, and can reach all of it."""

from __future__ import annotations

import pytest
import torch
from tiny_design import RandomDraws, tiny_config

from moekit.config.errors import ConfigError
from moekit.config.model import ModelConfig
from moekit.config.moe import MoEConfig
from moekit.config.train import RunConfig
from moekit.design.budget import TUNE_LIMITS, parse_budget
from moekit.design.hyper import TuneSpace
from moekit.design.sizes import Frame, layer_cost, widest
from moekit.design.space import ROUTERS, DesignSpace
from moekit.design.subject import Bench, Subject, changed
from moekit.models import build_model
from moekit.models.accounting import active_parameters, total_parameters


def language(**model) -> RunConfig:
    moe = {"n_experts": 8, "top_k": 2, "d_expert": 48, "router": "sigmoid"}
    return RunConfig(model=ModelConfig.from_dict({"d_model": 32, "n_layers": 4, "n_heads": 2, "vocab_size": 300,
                                                  "moe": moe, **model}))  # fmt: skip


def task(folder):
    return Bench.open(Subject("points", tiny_config(folder))).config


CASES = ["active=default", "active=0.7x,total=default", "active=3x,total=4x", "total=1.2x"]


@pytest.mark.parametrize("budget", CASES)
@pytest.mark.parametrize("kind", ["language", "task"])
def test_every_design_that_is_drawn_builds_within_the_budget(tmp_path, kind, budget):
    config = language() if kind == "language" else task(tmp_path)
    space, draws = DesignSpace(config, parse_budget(budget)), RandomDraws(1)
    for _ in range(25):  # in each of 8 cases: 200
        choice = space.sample(draws)
        model = changed(config, choice.changes).model
        with torch.device("meta"):
            build_model(model)
        assert active_parameters(model) == choice.cost["active"] <= space.limits["active"]
        assert total_parameters(model) == choice.cost["total"] <= space.limits.get("total", float("inf"))
        moe = model.moe
        assert 1 <= moe.top_k < moe.n_experts
        learned = [model.moe_of(index).router.name for index in model.moe_layers]
        assert any(name != "hash" for name in learned)
        if moe.top_k == 1:  # a weight that is always 1 teaches the router nothing
            named = {"name": moe.router.name, "options": moe.router.options}
            assert named in [ROUTERS[name] for name in ("softmax_before", "sigmoid_raw", "switch")]


@pytest.mark.parametrize("kind", ["language", "task"])
def test_designs_of_the_whole_budget_are_reached(tmp_path, kind):
    config = language() if kind == "language" else task(tmp_path)
    space, draws = DesignSpace(config, parse_budget("")), RandomDraws(2)
    blocks = space.limits["active"] - space.frame.fixed
    whole = [one for one in (space.sample(draws) for _ in range(60)) if one.features["share"] == 1.0]
    reached = [(one.cost["active"] - space.frame.fixed) / blocks for one in whole]
    # experts have whole widths, so that narrow ones leave a little
    assert sum(reached) / len(reached) > 0.9
    assert {one.features["top_k"] for one in whole} >= {1, 2, 4}


def test_the_default_is_itself(tmp_path):
    config = task(tmp_path)
    default = DesignSpace(config, parse_budget("")).default()
    assert default.changes == {}
    assert default.cost["active"] == active_parameters(config.model)
    assert default.features["router"] == "softmax"
    assert default.features["placement"] == "all"


def test_the_default_with_hashed_layers():
    config = language(moe_by_layer={"0": {"router": "hash"}})
    assert DesignSpace(config, parse_budget("")).default().features["hash_layers"] == 1


def test_ideas_are_drawn_as_they_stand(tmp_path):
    optuna = pytest.importorskip("optuna")
    for config in (task(tmp_path), language()):
        space = DesignSpace(config, parse_budget("active=4x"))
        study = optuna.create_study(sampler=optuna.samplers.RandomSampler(0))
        for idea in space.ideas():
            study.enqueue_trial(idea)
            trial = study.ask()
            choice = space.sample(trial)
            assert {name: trial.params[name] for name in idea} == idea
            assert choice.features["n_experts"] == idea["top_k"] * idea["experts_per_choice"]


def test_the_widest_layer_by_hand():
    # SwiGLU has three matrices of 16 x F for each of two experts, the router 16 x 4: 96 F + 64 <= 1000, so F = 9
    fit = widest(16, MoEConfig(n_experts=4, top_k=2), 0.0, 1000)
    assert fit is not None
    assert fit.d_expert == 9
    assert layer_cost(16, fit) == (96 * 9 + 64, 192 * 9 + 64)
    assert widest(16, MoEConfig(n_experts=4, top_k=2), 0.0, 96 * 4 + 63) is None


def test_the_frame_is_what_is_no_expert_s():
    config = ModelConfig(d_model=16, n_layers=2, n_heads=2, vocab_size=100, d_ff=24, activation="gelu")
    frame = Frame.of(config)
    assert frame.row == 32
    assert frame.fixed == active_parameters(config) - 2 * 24 * 32


@pytest.mark.parametrize(
    ("config", "budget", "parts"),
    [
        (language(moe=None), "", ["model.moe", "no sparse layers"]),
        (language(), "active=100", ["budget.active", "must be at least", "got 100", "Raise it"]),
        (language(), "total=100", ["budget.total", "must be at least", "got 100"]),
    ],
)
def test_what_cannot_be_searched(config, budget, parts):
    with pytest.raises(ConfigError) as error:
        DesignSpace(config, parse_budget(budget))
    for part in parts:
        assert part in str(error.value)


def test_a_setting_never_sees_more_examples(tmp_path):
    config = task(tmp_path)
    space, draws = TuneSpace(config, parse_budget("", TUNE_LIMITS), n_train=96), RandomDraws(3)
    assert space.default().cost["examples"] == 12 * 16
    lengths = set()
    for _ in range(200):
        choice = space.sample(draws)
        train = changed(config, choice.changes).train
        assert train.steps * train.batch_size == choice.cost["examples"] <= 192
        assert train.schedule.warmup_steps <= train.steps
        lengths.add(choice.features["length"])
    assert lengths == {0.5, 0.75, 1.0}
    assert max(space.batches) == 32
    assert TuneSpace(config, parse_budget("", TUNE_LIMITS), n_train=20).batches == (8, 16)


def test_a_budget_below_one_batch(tmp_path):
    with pytest.raises(ConfigError, match=r"budget\.examples must be at least one batch \(16\); got 5"):
        TuneSpace(task(tmp_path), parse_budget("examples=5", TUNE_LIMITS))
