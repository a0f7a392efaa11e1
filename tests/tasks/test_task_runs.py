"""A task from examples to a trained run and back: texts, fields, images, sound, tags, several at once."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest
import torch

from moekit.config.errors import CheckpointError, ConfigError
from moekit.config.task_run import TaskRunConfig
from moekit.data.examples import Examples, TaskData
from moekit.evaluate.answers import answers_to
from moekit.evaluate.task import predict, truth
from moekit.train.loop import Trainer
from moekit.train.run import load_task_run, resume_run, train_run

WORDS = {"sport": ["ball", "goal", "team", "run"], "food": ["bread", "soup", "salt", "cook"]}


def texts(n: int = 160, seed: int = 0) -> Examples:
    rng = random.Random(seed)
    labels = [rng.choice(list(WORDS)) for _ in range(n)]
    said = [
        " ".join(rng.choices([*WORDS[label], "the", "a", "of"], k=rng.randint(3, 12))) for label in labels
    ]
    tags = [["X" if word in {"the", "a", "of"} else "N" for word in text.split()] for text in said]
    numbers = np.array([[rng.gauss(0, 1), float(label == "food")] for label in labels])
    images = np.zeros((n, 8, 8, 1), np.uint8)
    for row, label in enumerate(labels):
        images[row, :, : 4 if label == "food" else 8] = rng.randint(100, 255)
    frames = [np.full((rng.randint(4, 9), 3), 1.0 if label == "food" else -1.0, np.float32)
              + 0.3 * np.random.default_rng(row).normal(size=(1, 3)).astype(np.float32)
              for row, label in enumerate(labels)]  # fmt: skip
    return Examples({
        "text": said, "words": [text.split() for text in said], "tags": tags, "label": labels,
        "noise": numbers[:, 0], "signal": numbers[:, 1],
        "shop": [f"s{label[0]}{i % 3}" for i, label in enumerate(labels)],
        "image": images, "audio": frames, "stars": [5.0 if label == "food" else 1.0 for label in labels],
    })  # fmt: skip


DATA = TaskData(texts(), texts(32, 1), texts(64, 2), given_test=True)
INPUTS = {
    "text": {"kind": "text", "tokenizer": "words", "max_len": 16},
    "bag": {"kind": "bag", "ngrams": [1, 1]},
    "fields": {"kind": "fields", "numbers": ["noise", "signal"], "categories": ["shop"]},
    "ids": {"kind": "ids", "columns": ["shop"]},
    "image": {"kind": "image", "patch": 4, "shift": 1, "flip": True},
    "audio": {"kind": "audio", "stride": 2, "jitter": 0.1},
}
TARGETS = {
    "label": {"kind": "class", "column": "label"},
    "stars": {"kind": "number", "columns": ["stars"], "bounds": [1, 5]},
}


def config(tmp_path, inputs: dict, targets: dict, **fields) -> TaskRunConfig:
    moe = {"n_experts": 4, "top_k": 2, "d_expert": 16}
    return TaskRunConfig.from_dict({
        "name": "t", "runs_dir": str(tmp_path), "inputs": inputs, "targets": targets,
        "model": {"d_model": 16, "n_layers": 2, "n_heads": 2, "d_ff": 32, "dropout": 0.1, "moe": moe},
        "train": {"steps": 30, "batch_size": 16, "checkpoint_every": 10, "optimizer": {"lr": 1e-2},
                  "schedule": {"warmup_steps": 3}, "device": "cpu"},
        **fields,
    })  # fmt: skip


@pytest.mark.parametrize("name", INPUTS)
@pytest.mark.parametrize("target", TARGETS)
def test_each_input_learns_each_target(tmp_path, name, target):
    if name == "bag":
        pytest.importorskip("sklearn")
    torch.manual_seed(0)
    result = train_run(
        config(tmp_path, {name: INPUTS[name]}, {target: TARGETS[target]}), data=DATA, quiet=True
    )
    # two equally likely classes: 0.69 nats, or a variance of 1, before anything is learnt
    assert result.final["validation_loss"] < 0.35
    assert result.final["validation_max_violation"] >= 0
    assert json.loads((result.folder / "run.json").read_text())["data_fingerprint"] == DATA.fingerprint()


def test_a_stopped_run_goes_on_bit_for_bit(tmp_path, monkeypatch):
    made = config(tmp_path, {"text": INPUTS["text"], "image": INPUTS["image"]}, {"label": TARGETS["label"]})
    whole = train_run(made, data=DATA, quiet=True)
    steps = Trainer.steps

    def stopped(self):
        for metrics in steps(self):
            yield metrics
            if self.step == 13:
                raise KeyboardInterrupt

    monkeypatch.setattr(Trainer, "steps", stopped)
    with pytest.raises(KeyboardInterrupt):
        train_run(made.replace(name="again"), data=DATA, quiet=True)
    monkeypatch.undo()
    monkeypatch.setattr("moekit.train.material.load_task_data", lambda *_: DATA)
    result = resume_run(tmp_path / "again-1", quiet=True)
    assert result.final["validation_loss"] == whole.final["validation_loss"]
    first, second = (load_task_run(folder).model.state_dict() for folder in (whole.folder, result.folder))
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())


def test_other_data_is_not_resumed_on(tmp_path, monkeypatch):
    result = train_run(
        config(tmp_path, {"text": INPUTS["text"]}, {"label": TARGETS["label"]}), data=DATA, quiet=True
    )
    other = TaskData(texts(seed=9), DATA.validation, DATA.test)
    monkeypatch.setattr("moekit.train.material.load_task_data", lambda *_: other)
    with pytest.raises(CheckpointError, match="has changed since the run began"):
        resume_run(result.folder, overrides=["train.steps=40"], quiet=True)


def test_predictions_are_those_of_the_trained_model(tmp_path):
    made = config(tmp_path, {"text": INPUTS["text"]}, {**TARGETS, "tags": {"kind": "tags", "column": "tags"}})
    made = made.replace(inputs={"text": {**INPUTS["text"], "column": "words", "max_len": 6}}, epochs=8.0)
    result = train_run(made, data=DATA, quiet=True)
    assert result.final["step"] == 80
    loaded = load_task_run(result.folder)
    found = predict(loaded.model, loaded.encoding, DATA.test, with_experts=True, batch_size=7)
    said = truth(loaded.encoding, DATA.test)
    right = [
        answer["prediction"] == label
        for answer, label in zip(found.answers["label"], said["label"], strict=True)
    ]
    assert sum(right) / len(right) > 0.95
    assert found.raw["label"].shape == (64, 2)
    np.testing.assert_allclose(found.raw["label"].sum(axis=1), 1, rtol=1e-5)
    for answer, row in zip(found.answers["label"], found.raw["label"], strict=True):
        assert answer["probability"] == pytest.approx(float(row.max()))
    assert np.abs(found.raw["stars"][:, 0] - np.asarray(DATA.test["stars"])).mean() < 0.8
    assert found.raw["stars"].max() <= 5
    assert found.raw["stars"].min() >= 1
    for words, tags, wanted in zip(DATA.test["words"], found.raw["tags"], said["tags"], strict=True):
        assert len(tags) == len(words), "a word beyond the longest text is tagged too"
        assert tags[:6] == wanted[:6]
    shares = np.stack(found.experts)
    assert shares.shape == (64, 2, 4)
    np.testing.assert_allclose(shares.sum(axis=2), 1, rtol=1e-5)
    # batches of another size and order say the same
    alone = predict(loaded.model, loaded.encoding, DATA.test.rows([5]), with_experts=True)
    assert alone.answers["label"][0]["prediction"] == found.answers["label"][5]["prediction"]
    np.testing.assert_allclose(alone.experts[0], found.experts[5], atol=1e-5)


def test_examples_need_no_answers_to_be_predicted(tmp_path):
    result = train_run(
        config(tmp_path, {"text": INPUTS["text"]}, {"label": TARGETS["label"]}), data=DATA, quiet=True
    )
    loaded = load_task_run(result.folder)
    found = predict(loaded.model, loaded.encoding, Examples({"text": ["goal team", "", "soup ☃ bread"]}))
    assert [answer["prediction"] for answer in found.answers["label"]][::2] == ["sport", "food"]
    (answer,) = answers_to(result.folder, "ball run goal")
    assert answer["answers"]["label"]["prediction"] == "sport"
    assert len(answer["experts"]) == 4
    (tmp_path / "mine.csv").write_text("note\nsoup\ngoal\n")
    found = answers_to(result.folder, str(tmp_path / "mine.csv"), {"text": "note"})
    assert [entry["answers"]["label"]["prediction"] for entry in found] == ["food", "sport"]
    with pytest.raises(ConfigError, match=r"'text'.*is missing"):
        answers_to(result.folder, str(tmp_path / "mine.csv"))


def test_a_class_that_training_never_saw_is_answered_wrongly(tmp_path):
    labels = ["music" if row % 2 else label for row, label in enumerate(DATA.test["label"])]
    data = TaskData(DATA.train, DATA.validation, Examples({**DATA.test.columns, "label": labels}))
    made = config(tmp_path, {"text": INPUTS["text"]}, {"label": TARGETS["label"]})
    loaded = load_task_run(train_run(made, data=data, quiet=True).folder)
    encoder = loaded.encoding.targets["label"]
    assert encoder.unseen(data.test) == ["music"]
    assert truth(loaded.encoding, data.test)["label"] == labels
    targets = encoder.encode(data.test).batch(np.arange(64))["targets"]
    assert targets[1::2].tolist() == [-100] * 32
    assert (targets[::2] >= 0).all()


def test_a_language_model_is_no_task(tmp_path):
    (tmp_path / "config.yaml").write_text("name: x\n")
    with pytest.raises(ConfigError, match="moekit generate"):
        load_task_run(tmp_path)
