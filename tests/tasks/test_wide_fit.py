"""Wide maps that a linear solver fits: they are part of the answer, stay as they are, and are saved with the run."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from moekit.config.errors import ConfigError, DataError
from moekit.config.task_run import TaskRunConfig
from moekit.data.encoding.base import Ragged
from moekit.data.encoding.wide import fit_wide
from moekit.data.examples import Examples, TaskData
from moekit.evaluate.task import predict
from moekit.models.task_model import TaskModel
from moekit.train.loop import Trainer
from moekit.train.material import TaskMaterial
from moekit.train.run import load_task_run, resume_run, train_run

pytest.importorskip("sklearn")

WORDS = {
    "earth": ["stone", "clay", "sand"],
    "sea": ["wave", "salt", "boat"],
    "sky": ["cloud", "wind", "bird"],
}


def texts(n: int, seed: int) -> Examples:
    rng = np.random.default_rng(seed)
    labels = [str(rng.choice(list(WORDS))) for _ in range(n)]
    said = [
        " ".join([*rng.choice([*WORDS[label], "the", "of"], 4), str(rng.choice(["a", "an"]))])
        for label in labels
    ]
    return Examples({"text": said, "label": labels})


DATA = TaskData(texts(120, 0), texts(30, 1), texts(40, 2), given_test=True)
INPUTS = {
    "text": {"kind": "text", "tokenizer": "words", "max_len": 8},
    "bag": {"kind": "bag", "ngrams": [1, 1]},
    "chars": {"kind": "bag", "analyzer": "char_wb", "ngrams": [2, 3], "token": False},
}
TARGET = {"kind": "class", "column": "label", "wide": ["bag", "chars"], "wide_fit": "svm", "wide_share": 0.6}


def config(tmp_path, inputs: dict | None = None, train: dict | None = None, **target) -> TaskRunConfig:
    moe = {"n_experts": 4, "top_k": 2, "d_expert": 16}
    return TaskRunConfig.from_dict({
        "name": "w", "runs_dir": str(tmp_path), "inputs": INPUTS if inputs is None else inputs,
        "targets": {"label": {**TARGET, **target}},
        "model": {"d_model": 16, "n_layers": 1, "n_heads": 2, "d_ff": 32, "moe": moe},
        "train": {"steps": 6, "batch_size": 8, "checkpoint_every": 3, "optimizer": {"lr": 1e-3},
                  "schedule": {"warmup_steps": 1}, "device": "cpu", **(train or {})},
    })  # fmt: skip


def log_probabilities(loaded, share: float) -> np.ndarray:
    """Of the test examples, were `share` the weight of the wide map."""
    head = loaded.model.heads["label"]
    head.config = head.config.replace(wide_share=share)
    return np.log(predict(loaded.model, loaded.encoding, DATA.test).raw["label"])


def bags(n: int = 60) -> tuple[dict[str, Ragged], np.ndarray]:
    """A bag whose term 1 + c stands in the examples of class c, beside a term that says nothing."""
    classes = np.arange(n) % 3
    ids = [np.array([1 + c, 4]) for c in classes]
    return {"bag": Ragged(0, ids=ids, weights=[np.array([0.8, 0.6], np.float32)] * n)}, classes


@pytest.mark.parametrize("solver", ["svm", "logistic"])
def test_a_fitted_map_answers_the_classes(solver):
    found, classes = bags()
    fit = fit_wide(solver, 1.0, found, {"bag": 6}, classes, 3)
    logits = fit.tables["bag"][1:4] * 0.8 + fit.tables["bag"][4] * 0.6 + fit.bias
    assert logits.argmax(axis=1).tolist() == [0, 1, 2]
    assert fit.scale > 1, "the classes are known without error: the margins are surer than they say"
    assert not fit.tables["bag"][[0, 5]].any(), "padding, and a term that no example has, weigh nothing"
    again = fit_wide(solver, 1.0, found, {"bag": 6}, classes, 3)
    assert np.array_equal(again.tables["bag"], fit.tables["bag"])
    assert np.array_equal(again.bias, fit.bias)


def test_the_scale_says_how_often_the_map_is_right():
    rng = np.random.default_rng(0)
    classes = rng.integers(0, 2, 4000)
    # the term names the class in three of four examples: no answer may be surer than that
    term = np.where(rng.random(4000) < 0.75, classes, 1 - classes)
    bag = Ragged(0, ids=[np.array([1 + t]) for t in term], weights=[np.ones(1, np.float32)] * 4000)
    fit = fit_wide("svm", 1.0, {"bag": bag}, {"bag": 3}, classes, 2)
    logits = torch.from_numpy(fit.tables["bag"][1:] + fit.bias)
    assert logits.softmax(dim=1).diagonal().tolist() == pytest.approx([0.75, 0.75], abs=0.04)


def test_unknown_classes_and_those_without_examples_are_told_apart():
    found, classes = bags()
    some = np.where(classes == 2, -100, classes)
    fit = fit_wide("svm", 1.0, found, {"bag": 6}, some, 4)
    logits = fit.tables["bag"][1:3] * 0.8 + fit.tables["bag"][4] * 0.6 + fit.bias
    assert logits.argmax(axis=1).tolist() == [0, 1]
    assert not fit.tables["bag"][:, 2:].any()
    assert (logits[:, 2:] < logits.max(axis=1, keepdims=True)).all(), "what no example has is not answered"
    with pytest.raises(DataError, match="at least two classes"):
        fit_wide("svm", 1.0, found, {"bag": 6}, np.where(classes == 0, 0, -100), 3)


def test_the_answer_is_the_weighted_mean_of_both(tmp_path):
    loaded = load_task_run(train_run(config(tmp_path), data=DATA, quiet=True).folder)
    deep, wide = log_probabilities(loaded, 1e-9), log_probabilities(loaded, 1 - 1e-9)
    mixed = 0.4 * deep + 0.6 * wide
    mixed -= np.log(np.exp(mixed).sum(axis=1, keepdims=True))
    np.testing.assert_allclose(log_probabilities(loaded, 0.6), mixed, atol=1e-4)
    assert np.abs(deep - wide).max() > 0.1, "two models that say different things"
    labels = loaded.encoding.targets["label"].labels
    right = [
        labels[place] == label for place, label in zip(wide.argmax(axis=1), DATA.test["label"], strict=True)
    ]
    assert np.mean(right) > 0.9, "a deep part of six steps knows little; the map knows the words"


def test_the_fixed_map_does_not_train_and_is_saved(tmp_path, monkeypatch):
    made = config(tmp_path)
    fit = TaskMaterial.of(made, DATA).wide["label"]
    steps, seen = Trainer.steps, []

    def stopped(self):
        for metrics in steps(self):
            yield metrics
            seen.append([parameter.grad is None for parameter in self.model.heads["label"].wide.values()])
            if self.step == 4:
                raise KeyboardInterrupt

    monkeypatch.setattr(Trainer, "steps", stopped)
    with pytest.raises(KeyboardInterrupt):
        train_run(made, data=DATA, quiet=True)
    monkeypatch.undo()
    assert all(all(none) for none in seen)
    monkeypatch.setattr("moekit.train.material.load_task_data", lambda *_: DATA)
    resumed = load_task_run(resume_run(tmp_path / "w-1", quiet=True).folder)
    whole = load_task_run(train_run(made.replace(name="whole"), data=DATA, quiet=True).folder)
    for loaded in (resumed, whole):
        head = loaded.model.heads["label"]
        assert head.wide.keys() == {"bag", "chars"}
        for name, table in head.wide.items():
            assert np.array_equal(table.detach().numpy(), fit.tables[name])
        assert np.array_equal(head.wide_bias.detach().numpy(), fit.bias)
        assert head.config.wide_share == 0.6
    found, wanted = (predict(one.model, one.encoding, DATA.test).raw["label"] for one in (resumed, whole))
    assert np.array_equal(found, wanted), "a run that was stopped goes on bit for bit"


def test_the_deep_part_learns_by_itself(tmp_path):
    """In training the head answers from the backbone alone, and reads no bag that is no token."""
    material = TaskMaterial.of(config(tmp_path), DATA)
    torch.manual_seed(0)
    model = TaskModel(material.config.model)
    material.begin(model)
    batch = material.loader().next_batch()
    assert batch.inputs.keys() == {"text", "bag"}
    model.train()
    alone = model(batch.inputs, batch.targets).answers["label"]
    with torch.no_grad():
        model.heads["label"].wide_bias.add_(100.0)
    torch.testing.assert_close(model(batch.inputs, batch.targets).answers["label"], alone)
    held = next(iter(material.validation()))
    assert held.inputs.keys() == {"text", "bag", "chars"}
    model.eval()
    with pytest.raises(ConfigError, match=r"inputs must hold chars for the stems and wide maps"):
        model({name: held.inputs[name] for name in ("text", "bag")})


def test_losses_of_balancing_reach_the_routers(tmp_path):
    material = TaskMaterial.of(config(tmp_path), DATA)
    torch.manual_seed(0)
    model = TaskModel(material.config.model).train()
    material.begin(model)
    batch = material.loader().next_batch()
    out = model(batch.inputs, batch.targets)
    assert out.aux_losses
    total = sum(out.aux_losses.values())
    (grad,) = torch.autograd.grad(total, [model.moe_layers[0].router.weight], allow_unused=True)
    assert grad is not None
    assert grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("inputs", "target", "message"),
    [
        (None, {"wide": []}, r"wide_fit needs inputs in wide; got 'svm'"),
        (None, {"multi": True}, r"wide_fit must be jointly with multi: true; got 'svm'"),
        (None, {"wide": ["text"]}, r"targets\.label\.wide must name inputs of kind bag; got 'text'"),
        (None, {"wide": ["bag"]}, r"inputs\.chars\.token must be true: no target names the input in wide"),
        ({"chars": INPUTS["chars"]}, {"wide": ["chars"]}, r"inputs must hold one that the backbone reads"),
        (None, {"wide_share": 1.0}, r"wide_share.*less than 1"),
        (None, {"wide_c": 0.0}, r"wide_c.*greater than 0"),
    ],
)
def test_what_cannot_be_is_said(tmp_path, inputs, target, message):
    with pytest.raises(ConfigError, match=message):
        config(tmp_path, inputs, **target)
