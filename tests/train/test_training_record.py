"""The routing record of a run: it changes nothing, goes on after a stop, and holds what training did."""

import functools
import json

import numpy as np
import pytest
from training_samples import assert_same_run, at_micro_step, decoder, dense, newest, run_config

from moekit.config.errors import Interrupted
from moekit.config.task_run import TaskRunConfig
from moekit.data.examples import Examples, TaskData
from moekit.explain.measures import saturation
from moekit.observe.record import RoutingRecord
from moekit.train.loop import Trainer
from moekit.train.observing import TrainingRecord
from moekit.train.run import resume_run, train_run
from moekit.train.trackers import read_metrics

RECORD = {"tokens": 12, "every": 4}


def config_in(folder, *arguments, **fields):
    folder.mkdir(parents=True, exist_ok=True)
    return run_config(folder, *arguments, **fields)


def load(run):
    return RoutingRecord.load(run / "routing")


def test_recording_changes_nothing(tmp_path):
    plain = train_run(config_in(tmp_path / "plain"), quiet=True).folder
    recorded = train_run(config_in(tmp_path / "recorded", record=RECORD), quiet=True).folder
    kept, (tensors, state) = load(recorded), newest(recorded)
    assert kept.n_token_rows > 0
    assert state.pop("record")["open"]["steps"] == 2
    assert not (plain / "routing").exists()
    # a noisy router shows best whether random numbers were touched
    noisy = decoder(router="noisy_topk", balance={"importance": 0.1, "load": 0.1})
    lines = []
    for name, record in (("a", None), ("b", RECORD)):
        folder = train_run(config_in(tmp_path / name, noisy, record=record), quiet=True).folder
        lines.append([
            (line["step"], line["kind"], line.get("loss"), line.get("validation_loss"))
            for line in read_metrics(folder / "metrics.jsonl")
        ])  # fmt: skip
    assert lines[0] == lines[1]
    expected, _ = newest(plain)
    assert all(bool((tensors[name] == tensor).all()) for name, tensor in expected.items())


@pytest.fixture(params=[1, 2], ids=["plain", "accumulated"])
def accumulation(request):
    return request.param


def test_history_is_what_the_loop_counted(tmp_path, monkeypatch, accumulation):
    seen = []
    original = Trainer._finish_step

    def finish(self, batch):
        seen.append([stats.requested_per_expert.numpy().copy() for stats in self._stats])
        return original(self, batch)

    monkeypatch.setattr(Trainer, "_finish_step", finish)
    config = run_config(tmp_path, record=RECORD, accumulation=accumulation)
    record = load(train_run(config, quiet=True).folder)
    assert record.source == "training"
    assert record.groups == ("animals", "numbers")
    assert record.arrays["history/step"].tolist() == [4, 8, 10], "the last moment is shorter"
    for layer in range(2):
        of_steps = np.array([counts[layer] for counts in seen])
        expected = [of_steps[:4].sum(axis=0), of_steps[4:8].sum(axis=0), of_steps[8:].sum(axis=0)]
        np.testing.assert_array_equal(record.of(layer, "history"), expected)
        entropy = record.of(layer, "history_entropy")
        assert entropy.shape == (3,)
        assert (entropy > 0).all()
        assert (entropy <= np.log(4)).all()


def test_the_same_tokens_are_read_at_each_validation(tmp_path):
    record = load(train_run(run_config(tmp_path, record=RECORD), quiet=True).folder)
    steps = record.arrays["token/step"]
    assert sorted(set(steps.tolist())) == [4, 8, 10]
    at = {step: steps == step for step in (4, 8, 10)}
    assert {int(rows.sum()) for rows in at.values()} == {12}
    for name in ("id", "target", "group", "text", "position"):
        first = record.arrays[f"token/{name}"][at[4]]
        assert len(set(first.tolist())) > 1 or name in ("group", "text")
        for step in (8, 10):
            np.testing.assert_array_equal(record.arrays[f"token/{name}"][at[step]], first)
    experts = record.of(0, "token/experts")
    assert saturation(experts[at[10]], experts[at[10]]) == 1
    assert 0 < saturation(experts[at[4]], experts[at[10]]) <= 1
    # the sums are those of the last validation: each of its tokens has two choices
    assert record.info["sums_of_step"] == 10
    assert int(record.counts(0).sum()) == 2 * record.n_tokens > 2 * 12


def test_it_is_there_after_each_validation(tmp_path, monkeypatch):
    kept = []
    original = TrainingRecord.save

    def save(self, folder, **info):
        original(self, folder, **info)
        kept.append((load(folder.parent).info["step"], load(folder.parent).info["run"]))

    monkeypatch.setattr(TrainingRecord, "save", save)
    folder = train_run(run_config(tmp_path, record=RECORD, checkpoint_every=0), quiet=True).folder
    assert kept == [(step, folder.name) for step in (4, 8, 10, 10)], "and once more with the checkpoint"


def test_counts_alone(tmp_path):
    config = run_config(tmp_path, record={"tokens": 0, "every": 5})
    record = load(train_run(config, quiet=True).folder)
    assert record.n_token_rows == 0
    assert record.arrays["history/step"].tolist() == [5, 10]
    assert record.n_tokens > 0


def test_a_dense_model_has_nothing_to_record(tmp_path):
    folder = train_run(run_config(tmp_path, dense(), record=RECORD), quiet=True).folder
    assert not (folder / "routing").exists()


def same_record(got, expected):
    assert set(got.arrays) == set(expected.arrays)
    for name, array in expected.arrays.items():
        np.testing.assert_array_equal(got.arrays[name], array, err_msg=name)
    assert got.info == expected.info


@functools.cache
def whole_run(folder):
    return train_run(config_in(folder / "whole", record=RECORD, checkpoint_every=2), quiet=True).folder


# killed between checkpoints, so that moments and rows were recorded that the checkpoint knows nothing of
@pytest.mark.parametrize("step", [1, 5, 9])
def test_a_killed_run_goes_on_with_its_record(tmp_path, tmp_path_factory, monkeypatch, step):
    expected = whole_run(tmp_path_factory.getbasetemp())

    def die(trainer):
        raise SystemExit

    with monkeypatch.context() as patched:
        at_micro_step(patched, step, 0, die)
        with pytest.raises(SystemExit):
            train_run(run_config(tmp_path, record=RECORD, checkpoint_every=2), quiet=True)
    folder = tmp_path / "runs" / "tiny-1"
    resume_run(folder, quiet=True)
    assert_same_run(folder, expected)
    same_record(load(folder), load(expected))


def test_a_record_that_is_newer_than_the_checkpoint_is_cut(tmp_path):
    folder = train_run(run_config(tmp_path, record=RECORD, checkpoint_every=3), quiet=True).folder
    expected = load(folder)
    last = folder / "checkpoints" / "step-00000010"
    (last / "state.json").write_text("{")  # damaged: the run goes on from step 9
    (folder / "final.json").unlink()
    with pytest.warns(UserWarning, match="passed over a checkpoint"):
        resume_run(folder, quiet=True)
    same_record(load(folder), expected)


def test_a_lost_record_begins_anew(tmp_path, monkeypatch):
    def stop(trainer):
        trainer.should_stop.signal = 15

    with monkeypatch.context() as patched:
        at_micro_step(patched, 5, 0, stop)
        with pytest.raises(Interrupted):
            train_run(run_config(tmp_path, record=RECORD), quiet=True)
    folder = tmp_path / "runs" / "tiny-1"
    (folder / "routing" / "routing.json").unlink()
    with pytest.warns(UserWarning, match="begins anew at step 6: .* holds no routing record"):
        resume_run(folder, quiet=True)
    assert load(folder).arrays["history/step"].tolist() == [8, 10]


def test_a_record_may_begin_in_the_middle(tmp_path):
    folder = train_run(run_config(tmp_path, steps=4), quiet=True).folder
    resume_run(folder, overrides=["train.steps=8", "train.record.every=2"], quiet=True)
    assert load(folder).arrays["history/step"].tolist() == [6, 8]


def numbers_task(tmp_path, **train):
    """Words of two classes."""
    rng = np.random.default_rng(0)
    words = {"low": ["ant", "bee", "cat"], "high": ["owl", "pig", "rat"]}

    def examples(n):
        labels = [["low", "high"][i % 2] for i in range(n)]
        texts = [" ".join(rng.choice(words[label], size=5)) for label in labels]
        return Examples({"text": texts, "label": labels}, [f"row {i}" for i in range(n)])

    data = TaskData(examples(48), examples(16), examples(8))
    config = TaskRunConfig.from_dict({
        "name": "words", "runs_dir": str(tmp_path / "runs"),
        "inputs": {"text": {"kind": "text", "column": "text", "vocab_size": 280}},
        "targets": {"label": {"kind": "class", "column": "label"}},
        "model": {"d_model": 16, "n_layers": 2, "n_heads": 2, "moe": {"n_experts": 4, "top_k": 2, "d_expert": 8},
                  "task_experts": {"kind": "mmoe", "n_experts": 3, "d_expert": 8}},
        "train": {"steps": 6, "batch_size": 8, "device": "cpu", "precision": "float32", "validate_every": 3,
                  "checkpoint_every": 2, "log_every": 1, "schedule": {"warmup_steps": 2}, **train},
    })  # fmt: skip
    return config, data


def test_a_task_is_recorded_by_class(tmp_path):
    config, data = numbers_task(tmp_path, record={"tokens": 10, "every": 3})
    folder = train_run(config, data=data, quiet=True).folder
    record = load(folder)
    assert record.groups == ("high", "low")
    assert len(record.layers) == 3
    assert record.layers[2].expert_names == ("shared 0", "shared 1", "shared 2")
    tokens = record.arrays["tokens"]
    assert (tokens > 0).all()
    # every token has two choices, every example three in the mixture
    np.testing.assert_array_equal(record.of(0, "counts").sum(axis=1), 2 * tokens)
    np.testing.assert_array_equal(record.of(2, "counts"), np.full((2, 3), 8))
    assert set(record.arrays["token/step"].tolist()) == {3, 6}
    assert (record.arrays["token/id"] >= 0).all()
    assert record.of(2, "token/experts").shape == (record.n_token_rows, 3)
    other, data = numbers_task(tmp_path)
    plain = train_run(other, data=data, quiet=True).folder
    final = [json.loads((run / "final.json").read_text())["validation_loss"] for run in (folder, plain)]
    assert final[0] == final[1]
