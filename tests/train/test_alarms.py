"""Alarms: none in a healthy run, the right one in each provoked failure, each once, with the key to change."""

from io import StringIO

import pytest
import torch
from rich.console import Console
from training_samples import assert_same_run, at_micro_step, decoder, run_config

from moekit.config.errors import Interrupted
from moekit.config.model import model_config_from_dict
from moekit.config.train import TrainConfig
from moekit.layers.statistics import RoutingStats
from moekit.models import build_model
from moekit.train import run as run_module
from moekit.train.alarms import RoutingWatch
from moekit.train.run import resume_run, train_run
from moekit.train.terminal import TrainingView
from moekit.train.trackers import read_metrics

OFF = {"load_balance": 0, "router_z": 0}


def watch(alarms=None, n_layers=1, **moe):
    model = {**decoder(**{"n_experts": 4, "top_k": 1, "router": "switch", **moe}), "n_layers": n_layers}
    config = TrainConfig.from_dict({"alarms": alarms or {"dead_steps": 20, "collapse_steps": 5}})
    return RoutingWatch(build_model(model_config_from_dict(model)), config)


def stats(counts, k=1):
    requested = torch.tensor(counts)
    nothing = torch.zeros((), dtype=torch.float64)
    return RoutingStats(
        requested, torch.tensor(0), requested.sum() // k, torch.ones(len(counts)).double(), nothing
    )


def feed(watch, *steps):
    """{step: [(kind, experts)]} of all steps with an alarm."""
    found = {}
    for number, counts in enumerate(steps, start=1):
        alarms = watch.step([stats(counts)])
        if alarms:
            found[number] = [(alarm.kind, alarm.experts) for alarm in alarms]
    return found


def test_an_expert_without_tokens_is_dead_after_so_many_steps():
    assert feed(watch(), *[[40, 30, 30, 0]] * 50) == {20: [("dead", (3,))]}


def test_a_single_token_in_time_is_life():
    steps = [[40, 30, 30, 0]] * 19 + [[40, 30, 29, 1]]
    assert feed(watch(), *steps * 3) == {}


def test_under_one_per_cent_of_an_even_share_is_dead():
    # an even share is 1000: 9 is less than 1% of it, 10 is not
    assert feed(watch(), *[[1995, 1000, 996, 9]] * 30) == {20: [("dead", (3,))]}
    assert feed(watch(), *[[1994, 1000, 996, 10]] * 30) == {}


def test_one_expert_with_over_half_of_the_choices_is_a_collapse():
    found = feed(watch(), *[[51, 17, 16, 16]] * 50)
    assert found == {5: [("collapse", (0,))]}
    assert feed(watch(), *[[49, 17, 17, 17]] * 50) == {}


def test_half_of_two_experts_is_none():
    assert feed(watch(n_experts=2), *[[60, 40]] * 50) == {}
    assert feed(watch(n_experts=2), *[[95, 5]] * 50) == {5: [("collapse", (0,))]}


def test_two_choices_that_are_always_the_same_are_a_collapse():
    both = watch({"dead_steps": 100, "collapse_steps": 5}, top_k=2, router="softmax")
    found = [alarm for _ in range(20) for alarm in both.step([stats([50, 50, 0, 0], k=2)])]
    assert [(alarm.kind, alarm.layer) for alarm in found] == [("collapse", 0)]
    assert "load entropy 0.00" in found[0].message


def test_a_layer_that_recovers_is_left_alone():
    # eight experts, none with half: entropy low at first, then rising
    steps = [[45, 45, 10, 0, 0, 0, 0, 0]] * 3 + [[20, 20, 10, 10, 10, 10, 10, 10]] * 60
    assert feed(watch(n_experts=8), *steps) == {}


def test_a_load_that_narrows_is_said_before_it_collapses():
    steps = [[25 + i, 25 - i // 2, 25 - i // 4, 25 - i // 4] for i in range(24)]
    steps += [[40, 40, 10, 10]] * 30
    narrow = watch({"dead_steps": 50, "collapse_steps": 500})
    assert feed(narrow, *[[25, 25, 25, 25]] * 10, *[[49, 47, 2, 2]] * 60) == {55: [("entropy", (0,))]}
    assert feed(watch({"dead_steps": 50, "collapse_steps": 500}), *steps) == {}


def test_fixed_rules_and_null_experts_are_no_accident():
    assert feed(watch(router="hash"), *[[100, 0, 0, 0]] * 50) == {}
    nulls = watch(null_experts={"zero": 1})
    assert feed(nulls, *[[25, 25, 25, 25, 0]] * 50) == {}


@pytest.mark.parametrize(("balance", "remedy"), [
    (OFF, "Nothing balances this layer: set model.moe.balance.load_balance=0.01"),
    ({"load_balance": 0.02}, "Raise model.moe.balance.load_balance (0.02 now), or lower "
                             "train.optimizer.router_lr_scale (1 now)"),
    ({"load_balance": 0, "bias_update_rate": 0.001}, "Raise model.moe.balance.bias_update_rate (0.001 now), or"),
])  # fmt: skip
def test_the_remedy_names_the_key(balance, remedy):
    watching = watch(balance=balance)
    (alarm,) = [alarm for _ in range(20) for alarm in watching.step([stats([40, 30, 30, 0])])]
    assert alarm.message.startswith(
        "layer 0 (backbone.layers.0.feed_forward): expert 3 is dead: under 1% of an even share in each of 20 steps. "
    )
    assert remedy in alarm.message


# --- in runs


def alarms_of(folder):
    return read_metrics(folder / "metrics.jsonl", "alarm")


def collapsing(**train):
    return {"steps": 12, "alarms": {"dead_steps": 8, "collapse_steps": 4}, "log_every": 1, **train}


def test_a_healthy_run_has_no_alarm(tmp_path):
    config = run_config(tmp_path, decoder(), **collapsing(steps=40, optimizer={"lr": 1e-3}))
    assert alarms_of(train_run(config, quiet=True).folder) == []


@pytest.fixture
def one_expert_takes_all(monkeypatch):
    """The router of layer 1 begins with weights that send every token to expert 2."""
    original = run_module.build_model

    def build(config):
        model = original(config)
        with torch.no_grad():
            model.moe_layers[1].router.logit_bias[2] = 20.0
        return model

    monkeypatch.setattr(run_module, "build_model", build)


def provoked(tmp_path, **train):
    router = {"name": "softmax", "normalize": "before", "logit_bias": True}
    model = decoder(router=router, top_k=1, balance=OFF)
    return run_config(tmp_path, model, **collapsing(**train))


def test_a_collapse_is_said_once(tmp_path, one_expert_takes_all, monkeypatch):
    screen = StringIO()

    def view(steps, title):
        return TrainingView(steps, title, console=Console(file=screen, width=200))

    monkeypatch.setattr(run_module, "TrainingView", view)
    folder = train_run(provoked(tmp_path)).folder
    found = alarms_of(folder)
    assert [(line["step"], line["alarm"], line["layer"]) for line in found] == [
        (4, "collapse", 1),
        (8, "dead", 1),
    ]
    assert found[0]["experts"] == [2]
    assert found[1]["experts"] == [0, 1, 3]
    for line in found:
        assert "set model.moe.balance.load_balance=0.01" in line["message"]
        assert line["layer_name"] == "backbone.layers.1.feed_forward"
        assert screen.getvalue().count(f"alarm: {line['message']}") == 1


def test_no_alarms_where_none_are_wanted(tmp_path, one_expert_takes_all):
    folder = train_run(provoked(tmp_path, alarms=None), quiet=True).folder
    assert alarms_of(folder) == []


@pytest.mark.parametrize("step", [2, 6])
def test_a_resumed_run_says_nothing_twice_and_forgets_nothing(
    tmp_path, monkeypatch, one_expert_takes_all, step
):
    for name in ("whole", "stopped"):
        (tmp_path / name).mkdir()
    expected = train_run(provoked(tmp_path / "whole"), quiet=True).folder

    def stop(trainer):
        trainer.should_stop.signal = 15

    with monkeypatch.context() as patched:
        at_micro_step(patched, step, 0, stop)
        with pytest.raises(Interrupted):
            train_run(provoked(tmp_path / "stopped"), quiet=True)
    folder = tmp_path / "stopped" / "runs" / "tiny-1"
    resume_run(folder, quiet=True)
    assert len(alarms_of(folder)) == 2
    assert_same_run(folder, expected)
