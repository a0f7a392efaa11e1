"""The plan of a run: exact where it can be, near what happens where it cannot."""

from __future__ import annotations

import json

import pytest
import torch

from moekit.config.errors import ConfigError
from moekit.config.loading import load_run_config
from moekit.config.train import RunConfig
from moekit.evaluate import plan as planning
from moekit.evaluate.plan import plan_run, probe_config
from moekit.models.accounting import total_parameters
from moekit.models.build import build_model

SMALL = [
    "model.d_model=32",
    "model.n_layers=3",
    "model.n_heads=2",
    "model.d_ff=64",
    "model.vocab_size=300",
    "model.max_seq_len=16",
    "data.vocab_size=300",
    "data.seq_len=16",
    "train.batch_size=8",
    "train.steps=10",
    "train.schedule.warmup_steps=1",
    "train.device=cpu",
]
SPARSE = [*SMALL, "model.moe.n_experts=8", "model.moe.d_expert=16"]
RECURRENT = [*SMALL, "model.kind=transformer_xl", "model.memory_length=16"]


def planned(*overrides: str, measure: bool = True) -> dict:
    return plan_run(load_run_config(None, overrides), measure=measure)


@pytest.mark.parametrize("overrides", [SMALL, SPARSE, RECURRENT], ids=["dense", "sparse", "recurrent"])
def test_everything_adds_up(overrides):
    plan = planned(*overrides)
    config = load_run_config(None, overrides)
    stored = sum(parameter.numel() for parameter in build_model(config.model).parameters())
    assert plan["parameters"]["total"] == stored
    assert plan["parameters"]["active"] <= stored
    assert (plan["tokens_per_step"], plan["tokens"]) == (8 * 16, 8 * 16 * 10)
    assert plan["flops"]["run"] == plan["flops"]["per_token"] * plan["tokens"]
    memory = dict(plan["memory_bytes"])
    assert (memory["weights"], memory["gradients"], memory["optimizer"]) == (
        4 * stored,
        4 * stored,
        8 * stored,
    )
    assert memory.pop("total") == sum(memory.values())
    time = plan["time"]
    assert time["seconds"] == pytest.approx(10 * time["seconds_per_step"])
    assert time["tokens_per_second"] == pytest.approx(8 * 16 / time["seconds_per_step"])
    assert plan["warnings"] == []
    json.dumps(plan, allow_nan=False)


def kept_by_autograd(config: RunConfig, rows: int) -> int:
    """The oracle: bytes that one real forward pass of the whole model keeps."""
    torch.manual_seed(0)
    model = build_model(config.model)
    ids = torch.randint(0, config.model.vocab_size, (rows, config.data.seq_len))
    carried = planning._memory_of(model, ids)
    with planning._Kept(model) as counted:
        planning._loss(model, ids, carried)
    return counted.bytes


@pytest.mark.parametrize("overrides", [SMALL, SPARSE, RECURRENT], ids=["dense", "sparse", "recurrent"])
def test_activations_scale_to_what_a_micro_batch_keeps(overrides):
    config = load_run_config(None, [*overrides, "train.precision=float32", "train.batch_size=32"])
    estimate = plan_run(config)["memory_bytes"]["activations"]
    assert estimate == pytest.approx(kept_by_autograd(config, rows=32), rel=0.15)


def test_accumulation_and_recomputation_save_activations():
    large = [*SPARSE, "train.batch_size=64", "train.precision=float32"]
    whole = planned(*large)["memory_bytes"]["activations"]
    assert planned(*large, "train.accumulation=8")["memory_bytes"]["activations"] < 0.25 * whole
    assert planned(*large, "train.recompute=true")["memory_bytes"]["activations"] < 0.6 * whole


def test_a_plan_without_a_probe_is_immediate_and_says_so():
    plan = planned(*SPARSE, measure=False)
    assert plan["time"]["seconds"] is None
    assert plan["memory_bytes"]["activations"] is None
    assert plan["memory_bytes"]["total"] == 16 * plan["parameters"]["total"]


def test_a_model_that_cannot_be_built_is_refused():
    with pytest.raises(ConfigError, match="sigmoid"):
        planned(*SPARSE, "model.moe.router=sigmiod", measure=False)
    with pytest.raises(ConfigError, match="causal"):
        planned(*SPARSE, "model.moe.router=expert_choice", measure=False)


def test_the_probe_leaves_the_random_numbers_alone():
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    planned(*SPARSE)
    assert torch.equal(torch.rand(3), expected)


def test_the_probe_shrinks_until_it_fits():
    config = load_run_config(
        None, [*SPARSE, "model.moe.n_experts=64", "model.n_dense_layers=1", "model.moe_every=2"]
    ).model
    whole = 16 * total_parameters(config)
    assert probe_config(config, free=2 * whole) == config
    fewer_layers = probe_config(config, free=2 * whole - 1)
    assert (fewer_layers.n_layers, fewer_layers.moe.n_experts) == (2, 64)
    fewer_experts = probe_config(config, free=whole // 4)
    assert fewer_experts.n_layers == 2
    assert fewer_experts.moe.top_k <= fewer_experts.moe.n_experts < 64


def test_a_probe_of_a_part_still_plans_the_whole(monkeypatch):
    config = load_run_config(None, [*SPARSE, "train.precision=float32"])
    whole = plan_run(config)
    monkeypatch.setattr(planning, "probe_config", lambda model, free: model.replace(n_layers=1))
    part = plan_run(config)
    assert "1 of its layers" in part["time"]["basis"]
    assert part["memory_bytes"]["activations"] == pytest.approx(
        whole["memory_bytes"]["activations"], rel=0.35
    )


def test_a_schedule_that_never_decays_is_noted():
    warnings = planned(*SMALL, "train.schedule.warmup_steps=10", measure=False)["warnings"]
    assert any("fills all train.steps (10)" in warning for warning in warnings)


def test_the_model_is_fitted_to_the_data_as_training_does():
    plan = planned(*SMALL, "data.vocab_size=512", "model.vocab_size=300", measure=False)
    longer = planned(*SMALL, "model.vocab_size=512", "data.seq_len=32", "model.max_seq_len=16", measure=False)
    assert plan["parameters"]["total"] == longer["parameters"]["total"]
    assert longer["flops"]["per_token"] > plan["flops"]["per_token"]


def test_too_little_memory_is_said_before_the_run(monkeypatch):
    monkeypatch.setattr(planning, "_free_memory", lambda device: 1000)
    assert any("train.accumulation" in warning for warning in planned(*SMALL, measure=False)["warnings"])
