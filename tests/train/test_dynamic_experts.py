"""Experts that come and go in training: when, what the optimizer keeps, and that a resumed run does the same."""

import json
import shutil

import numpy as np
import pytest
import torch
from training_samples import assert_same_run, copies, decoder, make_trainer, newest, run_config

from moekit.config.elastic import DynamicExpertsConfig
from moekit.config.errors import CheckpointError, ConfigError
from moekit.observe.record import RoutingRecord
from moekit.train.material import material_of
from moekit.train.optimizer import optimizer_tensors
from moekit.train.run import _Run, load_run, resume_run, train_run
from moekit.train.trackers import read_metrics

W_IN = "backbone.layers.0.feed_forward.experts.w_in"
ROUTER = "backbone.layers.0.feed_forward.router.weight"


def growing(**moe):
    return decoder(families=True, **moe)


def sizes(trainer):
    return [layer.config.n_experts for layer in trainer.moe_layers]


def collapsed(trainer, *experts):
    """Make tokens shun experts of the first layer, whatever they are: the rows stand against all of them."""
    trainer.moe_layers[0].router.weight.data[list(experts or (3,))] = -50.0
    norm = trainer.model.backbone.layers[0].feed_forward_norm
    original = norm.add

    def add(x, update, **more):
        total, normed = original(x, update, **more)
        return total, normed.abs() + 0.1

    norm.add = add


def test_growth_at_its_step_takes_weights_and_moments_along():
    trainer = make_trainer(growing(), steps=8, experts={"grow_to": 8, "at": 0.5})
    steps = trainer.steps()
    for _ in range(3):
        metrics = next(steps)
        assert "experts" not in metrics
        assert sizes(trainer) == [4, 4]
    assert all(sum(counts) > 0 for counts in trainer.experts._counts)
    seen = {}
    original = trainer.experts.after_step

    def after_step(*arguments):  # what the fourth step left, before anything grew
        seen.update(copies(trainer.tensors()))
        return original(*arguments)

    trainer.experts.after_step = after_step
    metrics = next(steps)
    assert metrics["experts"] == ["layer 0: 4 experts became 8", "layer 1: 4 experts became 8"]
    assert sizes(trainer) == [8, 8]
    now = trainer.tensors()
    kin = trainer.moe_layers[0].router.family.tolist()
    assert sorted(kin) == [0, 0, 1, 1, 2, 2, 3, 3]
    for key in (f"model.{W_IN}", f"optimizer.{W_IN}.exp_avg", f"optimizer.{W_IN}.exp_avg_sq",
                f"optimizer.{ROUTER}.exp_avg"):  # fmt: skip
        assert torch.equal(now[key], seen[key][kin]), key
    assert torch.equal(now[f"optimizer.{W_IN}.step"], seen[f"optimizer.{W_IN}.step"])
    embedding = "optimizer.stem.weight.exp_avg"
    assert torch.equal(now[embedding], seen[embedding])
    distance = (now[f"model.{ROUTER}"] - seen[f"model.{ROUTER}"][kin]).norm(dim=1)
    assert distance.tolist() == pytest.approx(
        (0.01 * seen[f"model.{ROUTER}"][kin].norm(dim=1)).tolist(), rel=1e-4
    )
    assert all(name in trainer.model.state_dict() for name in (W_IN, ROUTER))
    held = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in trainer.model.parameters()}
    assert len(list(steps)) == 4  # and it trains on
    assert len(optimizer_tensors(trainer.optimizer, trainer.model)) == 3 * len(held)


def test_the_loss_does_not_jump_where_the_experts_grow():
    def losses(**experts):
        trainer = make_trainer(growing(), steps=20, experts=experts or None)
        return [metrics["loss"] for metrics in trainer.steps()]

    plain, grown = losses(), losses(grow_to=8, at=0.5)
    assert grown[:10] == plain[:10]
    assert grown[10] == pytest.approx(
        plain[10], abs=2e-3
    )  # the first loss of 8 experts, of the same weights but for d
    assert grown[11:] != plain[11:]


def test_resume_after_growth_equals_uninterrupted_training(tmp_path):
    folders = []
    for name in ("whole", "parts"):
        (tmp_path / name).mkdir()
        config = run_config(tmp_path / name, growing(), steps=12, checkpoint_every=4, keep_checkpoints=3,
                            record={"tokens": 6, "every": 2}, alarms={"dead_steps": 2},
                            experts={"grow_to": 7, "at": 0.4, "every": 2, "revive_after": 3})  # fmt: skip
        folders.append(train_run(config, quiet=True).folder)
    whole, parts = folders
    for step, n in ((4, 4), (8, 7)):  # before and after the experts grew
        for later in sorted((parts / "checkpoints").glob("step-*")):
            if int(later.name[5:]) > step:
                shutil.rmtree(later)
        (parts / "final.json").unlink()
        assert newest(parts)[1]["experts"]["n_experts"] == {"0": n, "1": n}
        resume_run(parts, quiet=True)
        assert_same_run(parts, whole)
    records = [RoutingRecord.load(folder / "routing") for folder in folders]
    assert [layer.n_experts for layer in records[0].layers] == [7, 7]
    # other experts, another history: it begins where they came
    assert records[0].arrays["history/step"].tolist() == [6, 8, 10, 12]
    assert records[0].counts(0).sum() > 0
    for name, array in records[0].arrays.items():
        np.testing.assert_array_equal(records[1].arrays[name], array, err_msg=name)


def test_a_grown_run_is_opened_with_the_experts_that_it_has(tmp_path):
    folder = train_run(run_config(tmp_path, growing(), experts={"grow_to": 6, "at": 0.5}), quiet=True).folder
    run = load_run(folder)
    assert [layer.config.n_experts for layer in run.model.moe_layers] == [6, 6]
    assert run.config.model.moe_of(0).n_experts == 6
    said = [line["experts"] for line in read_metrics(folder / "metrics.jsonl") if "experts" in line]
    assert said == [["layer 0: 4 experts became 6", "layer 1: 4 experts became 6"]]
    assert json.loads((folder / "final.json").read_text())["step"] == 10


def test_a_collapse_is_mended_within_the_stated_steps():
    after, every = 6, 4
    config = {"revive_after": after, "every": every}
    trainer = make_trainer(growing(), steps=30, experts=config, optimizer={"lr": 1e-4})
    collapsed(trainer)
    found = {}
    for metrics in trainer.steps():
        for text in metrics.get("experts", []):
            found[metrics["step"]] = text
    first = min(found)
    assert first <= after + every  # the bound of the how-to: revive_after, then the next look
    assert found[first].startswith("layer 0: dead expert 3 became a copy of")
    assert trainer.experts._idle[0][3] == 0
    assert len(found) == 1  # it stays alive


def test_many_dead_experts_are_all_alive_after_one_look():
    experts = {"revive_after": 3, "every": 4}
    trainer = make_trainer(growing(n_experts=8), steps=7, experts=experts, optimizer={"lr": 1e-5})
    collapsed(trainer, 2, 3, 4, 5, 6, 7)  # the two that are left must be copied three times each
    said = [text for metrics in trainer.steps() for text in metrics.get("experts", [])]
    assert [text.split()[4] for text in said if text.startswith("layer 0")] == ["2", "3", "4", "5", "6", "7"]
    use = trainer.moe_layers[0](torch.randn(5000, 16)).routing.requested
    assert (use > 50).all(), use.tolist()  # copies of one expert part in different directions
    assert sorted(trainer.moe_layers[0].router.family.tolist()) == [0, 0, 0, 0, 1, 1, 1, 1]


def test_experts_that_grow_to_four_times_as_many_are_all_used():
    trainer = make_trainer(growing(), steps=4, experts={"grow_to": 16, "at": 0.25})
    next(trainer.steps())
    assert sizes(trainer) == [16, 16]
    for layer in trainer.moe_layers:
        use = layer(torch.randn(5000, 16)).routing.requested
        assert (use > 50).all(), use.tolist()


def test_a_large_seed_does_not_overflow():
    trainer = make_trainer(growing(), steps=2, seed=2**31 - 1, experts={"grow_to": 8, "at": 0.5})
    list(trainer.steps())
    assert sizes(trainer) == [8, 8]


def test_what_the_largest_k_of_elastic_training_needs_is_never_dropped():
    trainer = make_trainer(
        growing(), steps=12, experts={"memory_bytes": 1, "every": 2}, elastic={"k": [1, 3]}
    )
    list(trainer.steps())
    assert sizes(trainer) == [3, 3]


def test_a_prefix_and_experts_that_change_exclude_each_other():
    with pytest.raises(ConfigError, match=r"elastic must have no n_experts with experts"):
        make_trainer(growing(), experts={"grow_to": 8, "at": 0.5}, elastic={"k": [1], "n_experts": [2]})


def test_growth_stays_within_the_memory_budget():
    trainer = make_trainer(growing())
    n_bytes = 16 * sum(p.numel() for p in trainer.model.parameters())
    expert = 16 * (3 * 8 * 16 + 16)
    budget = n_bytes + 3 * expert
    experts = {"grow_to": 8, "at": 0.25, "memory_bytes": budget, "every": 100}
    trainer = make_trainer(growing(), experts=experts)
    for _ in trainer.steps():
        assert 16 * sum(p.numel() for p in trainer.model.parameters()) <= budget
    assert sum(sizes(trainer)) == 11


def test_what_cannot_be_mended_is_said_once():
    trainer = make_trainer(growing(), steps=12, experts={"memory_bytes": 1, "every": 2})
    said = [text for metrics in trainer.steps() for text in metrics.get("experts", [])]
    assert sum("over train.experts.memory_bytes" in text for text in said) == 1


def test_a_change_is_logged_whatever_the_step(tmp_path):
    config = run_config(tmp_path, growing(), log_every=5, experts={"grow_to": 6, "at": 0.25})
    folder = train_run(config, quiet=True).folder
    lines = [line for line in read_metrics(folder / "metrics.jsonl", "train") if "experts" in line]
    assert [line["step"] for line in lines] == [3]


def test_a_grown_run_says_what_it_needs_to_go_on(tmp_path):
    config = run_config(tmp_path, growing(), experts={"grow_to": 6, "at": 0.25})
    folder = train_run(config, quiet=True).folder
    with pytest.raises(
        CheckpointError, match=r"train.experts must be set.*layer 0 has 6 experts.*train.experts=\{\}"
    ):
        resume_run(folder, overrides=["train.experts=null", "train.steps=12"], quiet=True)
    resume_run(folder, overrides=["train.experts={}", "train.steps=12"], quiet=True)
    assert [layer.config.n_experts for layer in load_run(folder).model.moe_layers] == [6, 6]
    more = [
        "train.experts.grow_to=5",
        "train.experts.split_above=1.01",
        "train.experts.every=1",
        "train.steps=15",
    ]
    resume_run(folder, overrides=more, quiet=True)  # there are more already: nothing is split
    assert [layer.config.n_experts for layer in load_run(folder).model.moe_layers] == [6, 6]


def test_alarms_of_other_layers_outlive_a_change(tmp_path):
    """An expert of the second layer is dead all along; the first layer changes again and again meanwhile."""
    config = run_config(tmp_path, growing(n_experts=5), steps=14, alarms={"dead_steps": 8},
                        experts={"split_above": 1.01, "grow_to": 12, "every": 3}, optimizer={"lr": 1e-5})  # fmt: skip
    run = _Run(material_of(config, None, None), True)
    trainer, told = run.trainer, []
    split = trainer.experts._split
    trainer.experts._split = lambda number, *more: split(number, *more) if number == 0 else None
    trainer.moe_layers[1].router.weight.data[3] = -50.0
    norm = trainer.model.backbone.layers[1].feed_forward_norm
    original = norm.add
    norm.add = lambda x, update, **more: (lambda total, normed: (total, normed.abs() + 0.1))(
        *original(x, update, **more)
    )
    changes = 0
    for _ in trainer.steps():
        told += run.watch.step(trainer.last_stats)
        if trainer.reshaped:
            changes += 1
            run._observe()
    assert changes >= 2
    dead = [alarm for alarm in told if alarm.kind == "dead" and alarm.layer == 1 and 3 in alarm.experts]
    assert len(dead) == 1


def test_without_it_the_expert_stays_dead():
    trainer = make_trainer(growing(), steps=30, optimizer={"lr": 1e-4})
    collapsed(trainer)
    loads = [metrics["load"] for metrics in trainer.steps()]
    stats = trainer.model(trainer.loader.next_batch().token_ids).routing[0].requested
    assert int(stats[3]) == 0
    assert len(loads) == 30


def test_dead_experts_are_dropped():
    trainer = make_trainer(growing(), steps=12, experts={"drop_after": 3, "every": 4}, optimizer={"lr": 1e-4})
    collapsed(trainer)
    said = [text for metrics in trainer.steps() for text in metrics.get("experts", [])]
    assert said == ["layer 0: dropped 1 experts, 3 stay"]
    assert sizes(trainer) == [3, 4]


def test_an_overloaded_expert_is_split_up_to_the_limit():
    trainer = make_trainer(growing(), steps=12, experts={"split_above": 1.01, "grow_to": 5, "every": 2})
    said = [text for metrics in trainer.steps() for text in metrics.get("experts", [])]
    assert sizes(trainer) == [5, 5]
    assert all("split expert" in text for text in said)


def test_growth_when_the_loss_stalls():
    still = {"grow_to": 8, "stall_below": 0.5, "stall_steps": 3}
    trainer = make_trainer(growing(), steps=8, experts=still, optimizer={"lr": 1e-9})
    found = [metrics["step"] for metrics in trainer.steps() if "experts" in metrics]
    assert found == [6]  # as soon as there are twice stall_steps
    falling = make_trainer(growing(), steps=8, experts={**still, "stall_below": 0.0}, optimizer={"lr": 1e-2})
    list(falling.steps())
    assert sizes(falling) == [4, 4]


def test_a_memory_budget_drops_the_least_loaded():
    whole = make_trainer(growing())
    n_bytes = 16 * sum(p.numel() for p in whole.model.parameters())
    expert = 16 * (3 * 8 * 16 + 16)  # three matrices and a router row
    trainer = make_trainer(growing(), steps=4, experts={"memory_bytes": n_bytes - expert - 1, "every": 2})
    list(trainer.steps())
    assert sum(sizes(trainer)) == 6
    assert 16 * sum(p.numel() for p in trainer.model.parameters()) <= n_bytes - expert - 1
    least = make_trainer(growing(), steps=4, experts={"memory_bytes": 1, "every": 4})
    said = [text for metrics in least.steps() for text in metrics.get("experts", [])]
    assert sizes(least) == [2, 2]  # top_k stay
    assert "over train.experts.memory_bytes" in said[-1]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"grow_to": 8}, "grow_to needs at, stall_below or split_above"),
        ({"at": 0.5}, "grow_to must be given"),
        ({"revive_after": 5, "drop_after": 5}, "drop_after must be null with revive_after"),
    ],
)
def test_configurations_that_cannot_be(fields, message):
    with pytest.raises(ConfigError, match=message):
        DynamicExpertsConfig.from_dict(fields)


@pytest.mark.parametrize(
    ("model", "experts", "message"),
    [
        (decoder(), {"revive_after": 5}, "model.moe.families must be true with train.experts"),
        (
            growing(),
            {"grow_to": 3, "at": 0.5},
            r"train.experts.grow_to must be at least n_experts \(4\); got 3",
        ),
        (
            {**decoder(), "moe": None},
            {"revive_after": 5},
            "train.experts must be null but for a sparse decoder",
        ),
    ],
)
def test_models_that_cannot_change(model, experts, message):
    with pytest.raises(ConfigError, match=message):
        make_trainer(model, experts=experts)
