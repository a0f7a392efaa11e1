"""Generated texts and spans from examples to a trained run, its answers and back."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from moekit.config.errors import ConfigError
from moekit.config.task_run import TaskRunConfig
from moekit.data.examples import Examples, TaskData
from moekit.data.task_loader import TaskLoader, count_known
from moekit.evaluate.answers import answers_to
from moekit.evaluate.task import predict, truth
from moekit.evaluate.task_metrics import score
from moekit.train.loop import Trainer
from moekit.train.material import TaskMaterial
from moekit.train.run import load_task_run, train_run

WORDS = {"one": "一", "two": "二", "three": "三", "four": "四", "five": "五", "six": "六"}


def counting(n: int, seed: int) -> Examples:
    """English number words, and the same in Chinese."""
    rng = random.Random(seed)
    said = [[rng.choice(list(WORDS)) for _ in range(rng.randint(1, 4))] for _ in range(n)]
    return Examples({
        "source": [" ".join(words) for words in said],
        "target": ["".join(WORDS[word] for word in words) for words in said],
    })  # fmt: skip


def requests(n: int, seed: int) -> Examples:
    rng = random.Random(seed)
    rooms = ["kitchen", "living room", "hall"]
    chosen = [rng.choice([*rooms, ""]) for _ in range(n)]
    opened = [rng.choice(["turn on the light", "stop the music", "open it"]) for _ in range(n)]
    return Examples({
        "text": [f"{what} in the {room} now" if room else what for what, room in zip(opened, chosen, strict=True)],
        "answer": chosen,
    })  # fmt: skip


def config(tmp_path, inputs: dict, targets: dict, **fields) -> TaskRunConfig:
    moe = {"n_experts": 4, "top_k": 2, "d_expert": 32}
    return TaskRunConfig.from_dict({
        "name": "t", "runs_dir": str(tmp_path), "inputs": inputs, "targets": targets,
        "model": {"d_model": 32, "n_layers": 1, "n_heads": 2, "d_ff": 64, "moe": moe},
        "train": {"steps": 150, "batch_size": 32, "checkpoint_every": 0, "optimizer": {"lr": 1e-2},
                  "schedule": {"warmup_steps": 10}, "device": "cpu", **fields.pop("train", {})},
        **fields,
    })  # fmt: skip


def test_a_translation_is_learnt_and_answered(tmp_path):
    data = TaskData(counting(400, 0), counting(32, 1), counting(40, 2), given_test=True)
    inputs = {"text": {"kind": "text", "column": "source", "tokenizer": "words"}}
    targets = {"said": {"kind": "sequence", "tokenizer": "characters", "layers": 1, "smoothing": 0.0}}
    made = config(tmp_path, inputs, targets)
    result = train_run(made, data=data, quiet=True)
    assert result.final["validation_loss"] < 0.3, "1.8 nats a token before anything is learnt"
    loaded = load_task_run(result.folder)
    found = predict(loaded.model, loaded.encoding, data.test, with_experts=True, batch_size=7)
    right = [said == wanted for said, wanted in zip(found.raw["said"], data.test["target"], strict=True)]
    assert np.mean(right) > 0.8
    assert score("chrf", found.raw["said"], truth(loaded.encoding, data.test)["said"]) > 80
    # one layer of the backbone, one of the decoder
    assert found.experts[0].shape == (2, 4)
    np.testing.assert_allclose(found.experts[0].sum(axis=1), 1, rtol=1e-5)
    again = predict(loaded.model, loaded.encoding, data.test)
    assert again.raw["said"] == found.raw["said"]
    (answer,) = answers_to(result.folder, "six one three")
    assert answer["answers"]["said"]["prediction"] == "六一三"
    assert 0.5 < answer["answers"]["said"]["probability"] <= 1
    assert {entry["layer"] for entry in answer["experts"]} == {0, 1}


def test_spans_are_learnt_and_answered(tmp_path):
    data = TaskData(requests(400, 0), requests(32, 1), requests(60, 2), given_test=True)
    inputs = {"text": {"kind": "text", "vocab_size": 400}}
    made = config(tmp_path, inputs, {"room": {"kind": "span"}}, train={"steps": 60})
    result = train_run(made, data=data, quiet=True)
    loaded = load_task_run(result.folder)
    found = predict(loaded.model, loaded.encoding, data.test)
    wanted = truth(loaded.encoding, data.test)["room"]
    assert "" in wanted
    assert score("exact_match", found.raw["room"], wanted) > 0.95
    (answer,) = answers_to(result.folder, "please open it in the living room now")
    said = answer["answers"]["room"]
    assert said["prediction"] == "living room"
    assert "please open it in the living room now"[said["start"] : said["end"]] == "living room"


def test_the_loss_of_a_step_is_the_mean_over_tokens_however_it_is_accumulated(tmp_path):
    """Micro-batches have different numbers of tokens; their gradients add up to that of the whole batch."""
    data = TaskData(counting(64, 0), counting(8, 1), counting(8, 2))
    inputs = {"text": {"kind": "text", "column": "source", "tokenizer": "words"}}
    targets = {"said": {"kind": "sequence", "tokenizer": "characters", "layers": 1}}
    losses, tokens, weights = [], [], []
    for accumulation in (1, 4):
        made = config(tmp_path, inputs, targets, train={"precision": "float32", "accumulation": accumulation})
        material = TaskMaterial.of(made, data)
        torch.manual_seed(0)
        from moekit.models.task_model import TaskModel

        dense = material.config.model.replace(moe=None)
        trainer = Trainer(TaskModel(dense), material.config.train, material.loader())
        batch = TaskLoader(material.train, made.train.batch_size, made.train.seed).next_batch()
        trainer.model.eval()
        with torch.no_grad():
            tokens.append(trainer.model(batch.inputs, batch.targets).loss.item())
        metrics = next(trainer.steps())
        losses.append(metrics["loss"])
        weights.append(trainer.model.state_dict())
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert losses[0] == pytest.approx(tokens[0], rel=0.1), "nats a token, not an example"
    for name, tensor in weights[0].items():
        torch.testing.assert_close(tensor, weights[1][name], rtol=1e-3, atol=1e-4, msg=name)


def test_targets_are_counted_as_heads_count_them(tmp_path):
    data = TaskData(counting(64, 0), counting(8, 1), counting(8, 2))
    inputs = {"text": {"kind": "text", "column": "source"}}
    material = TaskMaterial.of(config(tmp_path, inputs, {"said": {"kind": "sequence"}}), data)
    batch = TaskLoader(material.train, 8).next_batch()
    assert batch.n_targets == count_known(batch.targets["said"]) > 8
    assert count_known(torch.tensor([0, -100, 3])) == 2
    assert count_known(torch.tensor([[1.0, torch.nan], [torch.nan, torch.nan]])) == 1
    assert count_known(torch.tensor([1.0, torch.nan])) == 1


def test_targets_name_inputs_that_are_texts(tmp_path):
    inputs = {"text": {"kind": "text"}, "bag": {"kind": "bag"}}
    with pytest.raises(
        ConfigError, match=r"targets.said.share must be an input of kind text.*did you mean 'text'"
    ):
        config(tmp_path, inputs, {"said": {"kind": "sequence", "share": "texts"}})
    with pytest.raises(ConfigError, match=r"targets.where.input must be an input of kind text"):
        config(tmp_path, inputs, {"where": {"kind": "span", "input": "bag"}})
