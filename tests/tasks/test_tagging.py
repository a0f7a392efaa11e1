"""Names in sentences, from examples to a trained run and back: each is known by its shape and its neighbours."""

from __future__ import annotations

import random

import pytest

from moekit.config.errors import ConfigError
from moekit.config.task_run import TaskRunConfig
from moekit.data.examples import Examples, TaskData
from moekit.evaluate.answers import answers_to
from moekit.evaluate.task import predict
from moekit.evaluate.task_metrics import score
from moekit.train.run import load_task_run, train_run

WORDS = {"kind": "words", "ngrams": [3, 4], "buckets": 512, "mix": 1, "dropout": 0.05}
CHARACTERS = {
    "kind": "words", "unit": "characters", "ngrams": None, "affixes": 0, "shape": False, "pairs": True,
    "buckets": 512, "mix": 1,
}  # fmt: skip


def sentences(n: int, seed: int, chinese: bool = False) -> Examples:
    """People speak and places are lived in; no name of one split stands in another."""
    rng = random.Random(seed)
    words, tags = [], []
    for _ in range(n):
        if chinese:
            name = [rng.choice("王李张刘"), *rng.choices("明红军丽强芳伟", k=2)]
            said = [("今", "天"), ()][rng.random() < 0.5]
            words.append([*said, *name, "说", "话", "。"])
            tags.append(["O"] * len(said) + ["B-PER", "I-PER", "I-PER", "O", "O", "O"])
            continue
        name = ["".join(rng.choices("aeioubdklmnrst", k=rng.randint(4, 8))).title() for _ in range(2)]
        if rng.random() < 0.5:
            words.append(["Then", *name, "said", "so", "."])
            tags.append(["O", "B-PER", "I-PER", "O", "O", "O"])
        else:
            words.append(["They", "live", "in", *name, "."])
            tags.append(["O", "O", "O", "B-LOC", "I-LOC", "O"])
    return Examples({"words": words, "tags": tags})


def config(tmp_path, words: dict, **fields) -> TaskRunConfig:
    return TaskRunConfig.from_dict({
        "name": "t", "runs_dir": str(tmp_path), "inputs": {"text": words},
        "targets": {"tags": {"kind": "tags", "crf": True}},
        "model": {"d_model": 32, "n_layers": 1, "n_heads": 2, "d_ff": 64, "dropout": 0.1,
                  "moe": {"n_experts": 4, "top_k": 2, "d_expert": 32}},
        "train": {"steps": 100, "batch_size": 16, "checkpoint_every": 0, "optimizer": {"lr": 5e-3},
                  "schedule": {"warmup_steps": 5}, "device": "cpu"},
        **fields,
    })  # fmt: skip


@pytest.mark.parametrize("chinese", [False, True])
def test_names_that_training_never_saw_are_found(tmp_path, chinese):
    data = TaskData(
        sentences(400, 1, chinese), sentences(32, 2, chinese), sentences(60, 3, chinese), given_test=True
    )
    result = train_run(config(tmp_path, CHARACTERS if chinese else WORDS), data=data, quiet=True)
    assert result.final["validation_loss"] < 0.05
    loaded = load_task_run(result.folder)
    assert loaded.model.heads["tags"].chain is not None
    said = predict(loaded.model, loaded.encoding, data.test).raw["tags"]
    assert score("entity_f1", said, data.test["tags"]) > 0.95
    text = "今天王芳伟说话。" if chinese else "They live in Kadrin Solt."
    (answer,) = answers_to(result.folder, text)
    tags = answer["answers"]["tags"]["prediction"]
    if chinese:
        assert answer["words"] == list(text)
        assert tags == ["O", "O", "B-PER", "I-PER", "I-PER", "O", "O", "O"]
    else:
        assert answer["words"] == ["They", "live", "in", "Kadrin", "Solt", "."]
        assert tags == ["O", "O", "O", "B-LOC", "I-LOC", "O"]


def test_tags_are_of_an_input_with_words(tmp_path):
    with pytest.raises(ConfigError, match="must be an input of kind text or words"):
        config(tmp_path, {"kind": "image"})
