"""Trials: a whole one is the run that it stands for; others are shorter, given up, stopped or broken."""

from __future__ import annotations

import json

import pytest

from moekit.design.subject import Bench, changed
from moekit.design.trial import falls_behind, latency_of, run_trial, trial_config
from moekit.train.run import load_task_run, train_run


def test_a_whole_trial_is_the_run(by_loss, tmp_path):
    bench = Bench.open(by_loss)
    changes = {"model.moe.n_experts": 6, "train.optimizer.lr": 0.02}
    outcome = run_trial(bench, changes, seed=3)
    config = changed(by_loss.config, changes)
    config = config.replace(runs_dir=str(tmp_path / "runs"), train=config.train.replace(seed=3))
    trained = train_run(config, data=bench.data, quiet=True)
    loaded = load_task_run(trained.folder)
    assert outcome.figures == bench.score(loaded.config, loaded.model)
    assert outcome.ended == "complete"
    assert outcome.steps == 12


def test_the_data_are_read_once(by_loss, monkeypatch):
    bench = Bench.open(by_loss)
    monkeypatch.setattr("moekit.train.material.load_task_data", lambda *_: pytest.fail("read again"))
    assert run_trial(bench, {"train.batch_size": 8}, seed=0).ended == "complete"


def test_a_short_trial_has_its_whole_schedule(by_loss):
    config = trial_config(Bench.open(by_loss), {}, seed=0, effort=0.5)
    assert config.train.steps == 6
    assert config.train.schedule.warmup_steps == 1


def test_rungs_and_giving_up(by_loss):
    bench, asked = Bench.open(by_loss), []

    def second(rung, worse):
        asked.append((rung, worse))
        return rung == 1

    outcome = run_trial(bench, {}, seed=0, gives_up=second)
    assert outcome.ended == "pruned"
    assert outcome.steps == 6
    assert [rung for rung, _ in asked] == [0, 1]
    assert outcome.rungs == [worse for _, worse in asked]
    assert outcome.figures == {}


def test_stopped_from_outside(by_loss):
    calls = iter([False, False, True])
    outcome = run_trial(Bench.open(by_loss), {}, seed=0, should_stop=lambda: next(calls))
    assert (outcome.ended, outcome.steps) == ("stopped", 2)


def test_a_loss_that_is_not_finite(by_loss):
    outcome = run_trial(
        Bench.open(by_loss), {"train.optimizer.lr": 1e30, "train.gradient_clip": 1e30}, seed=0
    )
    assert outcome.ended == "broken"
    assert json.dumps(outcome.figures, allow_nan=True)


def test_falling_behind_by_hand():
    # three others cost no more: it is fourth of four, then second, then first
    others = [(1.0, 10.0), (2.0, 10.0), (3.0, 8.0), (0.0, 50.0)]
    assert falls_behind(4.0, 10.0, others)
    assert not falls_behind(1.5, 10.0, others)
    assert falls_behind(2.5, 10.0, others)
    # too few at its cost
    assert not falls_behind(4.0, 8.0, others)
    # all equal: nothing is worse
    assert not falls_behind(1.0, 10.0, [(1.0, 10.0)] * 9)


def test_the_latency_is_of_one_example(by_loss):
    assert 0 < latency_of(Bench.open(by_loss), {}) < 5


def test_equal_figures_are_told_apart_by_the_loss(subject):
    one, other = {"label.accuracy": 0.9, "loss": 0.2}, {"label.accuracy": 0.9, "loss": 0.3}
    assert subject.order(one) < subject.order(other)
    assert subject.order({"label.accuracy": 0.91, "loss": 9.0}) < subject.order(one)
