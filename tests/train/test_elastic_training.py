"""Training at drawn numbers of experts: what is drawn, what reaches the model, resume, and what is refused."""

import json
import shutil
from collections import Counter

import pytest
import torch
from training_samples import (
    assert_same_run,
    assert_same_tensors,
    at_micro_step,
    copies,
    decoder,
    dense,
    make_trainer,
    run_config,
)

from moekit.config.elastic import ElasticConfig
from moekit.config.errors import ConfigError
from moekit.layers.moe import MoE
from moekit.train.elastic import drawn
from moekit.train.run import resume_run, train_run


@pytest.fixture
def settings_seen(monkeypatch):
    seen = []
    original = MoE.forward

    def forward(self, *arguments, elastic=None, **more):
        seen.append(elastic)
        return original(self, *arguments, elastic=elastic, **more)

    monkeypatch.setattr(MoE, "forward", forward)
    return seen


def test_shares_of_the_draws_follow_the_weights():
    config = ElasticConfig(k=(1, 2, 4), weights=(1, 2, 1), n_experts=(4, 8))
    found = Counter(drawn(config, seed=3, step=step, micro=0) for step in range(8000))
    share = {(s.top_k, s.n_experts): n / 8000 for s, n in found.items()}
    for k, wanted in ((1, 0.125), (2, 0.25), (4, 0.125)):
        for n in (4, 8):
            assert share[k, n] == pytest.approx(wanted, abs=0.02)


def test_each_micro_batch_draws_and_all_layers_follow(settings_seen):
    config = {"k": [1, 2, 4]}
    trainer = make_trainer(decoder(), steps=6, accumulation=3, elastic=config)
    list(trainer.steps())
    pairs = list(zip(settings_seen[::2], settings_seen[1::2], strict=True))  # two sparse layers
    assert all(one == other for one, other in pairs)
    wanted = [drawn(ElasticConfig(k=(1, 2, 4)), 0, step, micro) for step in range(6) for micro in range(3)]
    assert [one for one, _ in pairs] == wanted
    assert {one.top_k for one, _ in pairs} == {1, 2, 4}


def test_one_draw_for_the_whole_step(settings_seen):
    trainer = make_trainer(decoder(), steps=6, accumulation=3, elastic={"k": [1, 2, 4], "per": "step"})
    list(trainer.steps())
    by_step = [settings_seen[i : i + 6] for i in range(0, 36, 6)]
    assert all(len(set(step)) == 1 for step in by_step)
    assert len({step[0] for step in by_step}) > 1


def test_balance_of_the_batch_is_counted_over_micro_batches_of_one_setting(monkeypatch):
    given = []
    original = MoE.forward

    def forward(self, *arguments, earlier_counts=None, elastic=None, **more):
        out = original(self, *arguments, earlier_counts=earlier_counts, elastic=elastic, **more)
        given.append((elastic, earlier_counts, out.routing.requested))
        return out

    monkeypatch.setattr(MoE, "forward", forward)
    trainer = make_trainer(decoder(), steps=4, accumulation=6, elastic={"k": [1, 2], "n_experts": [2, 4]})
    list(trainer.steps())
    calls = given[::2]  # of the first of two layers
    n_with = 0
    for step in range(4):
        seen = {}
        for elastic, earlier, requested in calls[6 * step : 6 * step + 6]:
            if elastic not in seen:
                assert earlier is None  # closed experts of other micro-batches are no reason to choose them
            else:
                assert torch.equal(earlier, seen[elastic])
                n_with += 1
            seen[elastic] = seen.get(elastic, 0) + requested
    assert n_with > 4


def test_a_step_that_was_interrupted_goes_on_with_the_counts_of_its_settings(monkeypatch):
    def made():
        model = decoder(balance={"load_balance": 1.0})
        return make_trainer(model, steps=4, accumulation=6, elastic={"k": [1, 2]})

    whole, parts, resumed = made(), made(), made()
    list(whole.steps())
    at_micro_step(monkeypatch, 2, 2, lambda trainer: setattr(trainer, "should_stop", lambda: True))
    list(parts.steps())
    assert (parts.step, parts.micro) == (2, 3)
    resumed.load(copies(parts.tensors()), json.loads(json.dumps(parts.state())))
    list(resumed.steps())
    assert_same_tensors(copies(resumed.tensors()), copies(whole.tensors()))


def test_one_k_that_is_the_configured_one_changes_no_bit():
    plain, elastic = make_trainer(decoder()), make_trainer(decoder(), elastic={"k": [2]})
    list(plain.steps()), list(elastic.steps())
    assert_same_tensors(copies(elastic.tensors()), copies(plain.tensors()))


def test_a_resumed_run_draws_the_same(tmp_path):
    settings = {"elastic": {"k": [1, 2, 3], "n_experts": [3, 4]}, "accumulation": 3}
    folders = []
    for name in ("whole", "parts"):
        (tmp_path / name).mkdir()
        folders.append(train_run(run_config(tmp_path / name, **settings), quiet=True).folder)
    whole, parts = folders
    # as if stopped after the older of the two checkpoints
    for later in sorted((parts / "checkpoints").glob("step-*"))[1:]:
        shutil.rmtree(later)
    (parts / "final.json").unlink()
    resume_run(parts, quiet=True)
    assert_same_run(parts, whole)


@pytest.mark.parametrize(
    ("model", "elastic", "message"),
    [
        (decoder(), {"k": [1, 5]}, r"train.elastic \(k=5\) does not fit sparse layer 0: elastic.top_k must be at most"),
        (decoder(router="hash"), {"k": [1]}, "elastic.top_k cannot be set with router 'hash'"),
        (dense(), {"k": [1]}, "train.elastic must"),
        (decoder(router="sigmoid", balance={"bias_update_rate": 0.01}), {"k": [1], "n_experts": [2]},
         "train.elastic.n_experts must be empty with moe.balance.bias_update_rate"),
    ],
)  # fmt: skip
def test_what_the_model_cannot_do_is_refused_before_training(model, elastic, message):
    with pytest.raises(ConfigError, match=message):
        make_trainer(model, elastic=elastic)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"k": [2, 2]}, "k must hold different numbers"),
        ({"k": [], "n_experts": []}, "k must hold a number"),
        ({"k": [1, 2], "weights": [1]}, "weights must hold one weight for each k"),
        ({"k": [1], "weights": [0]}, "weights must be 0 or more"),
        ({"k": [4], "n_experts": [2]}, "n_experts must be at least the largest k"),
    ],
)
def test_configurations_that_cannot_be(fields, message):
    with pytest.raises(ConfigError, match=message):
        ElasticConfig.from_dict(fields)
