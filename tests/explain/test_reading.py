"""Records of a trained task: read again by class or column, and written by `moekit predict`."""

import csv
import json
import random

import numpy as np
import pytest
import torch

from moekit.cli.main import main
from moekit.config.errors import ConfigError
from moekit.config.task import ClassTarget, NumberTarget, TagsTarget
from moekit.config.task_run import TaskRunConfig
from moekit.data.encoding.targets import ClassEncoder, NumberEncoder, TagsEncoder
from moekit.data.examples import Examples
from moekit.explain.edits import Off, edited
from moekit.explain.reading import record_examples, record_run
from moekit.explain.task_predictions import _numbers
from moekit.observe.record import RoutingRecord
from moekit.train.run import load_task_run, train_run

WORDS = {"low": ["ant", "bee", "cat"], "high": ["owl", "pig", "rat"]}


def write_table(path, n, seed):
    chance = random.Random(seed)
    with open(path, "w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["text", "label", "desk"])
        for row in range(n):
            label = ["low", "high"][row % 2]
            text = " ".join([*chance.choices(WORDS[label], k=4), str(row)])
            table.writerow([text, label, "abc"[row % 3]])
    return path


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("task")
    config = TaskRunConfig.from_dict({
        "name": "words", "runs_dir": str(folder / "runs"),
        "inputs": {"text": {"kind": "text", "column": "text", "vocab_size": 280}},
        "targets": {"label": {"kind": "class", "column": "label"}},
        "data": {"path": str(write_table(folder / "train.csv", 48, 0)),
                 "validation_path": str(write_table(folder / "held.csv", 18, 1)),
                 "test_path": str(write_table(folder / "test.csv", 6, 2))},
        "model": {"d_model": 16, "n_layers": 2, "n_heads": 2, "moe": {"n_experts": 4, "top_k": 2, "d_expert": 8},
                  "task_experts": {"kind": "mmoe", "n_experts": 3, "d_expert": 8}},
        "train": {"steps": 2, "batch_size": 8, "device": "cpu", "precision": "float32",
                  "schedule": {"warmup_steps": 1}},
    })  # fmt: skip
    return train_run(config, quiet=True).folder


def test_groups_are_the_classes(run):
    record = record_run(run)
    assert (record.source, record.groups) == ("evaluation", ("high", "low"))
    assert record.n_token_rows == record.n_tokens
    # 18 held examples, 9 of each class, three experts of the mixture for each of them
    np.testing.assert_array_equal(record.of(2, "counts"), np.full((2, 3), 9))
    np.testing.assert_array_equal(record.of(0, "counts").sum(axis=1), 2 * record.arrays["tokens"])
    assert set(record.arrays["token/text"].tolist()) == set(range(18))
    # the group of a token is that of its example
    texts, groups = record.arrays["token/text"], record.arrays["token/group"]
    np.testing.assert_array_equal(groups, 1 - texts % 2)


def test_groups_are_the_values_of_a_column(run):
    with open(run.parent.parent / "held.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    held = Examples({name: [row[name] for row in rows] for name in ("text", "label", "desk")})
    record = record_examples(load_task_run(run), held, by="desk")
    assert record.groups == ("a", "b", "c")
    np.testing.assert_array_equal(record.arrays["token/group"], record.arrays["token/text"] % 3)
    assert record.of(2, "counts").tolist() == [[6, 6, 6]] * 3
    with pytest.raises(ConfigError, match="no such column"):
        record_run(run, by="dusk")


def test_a_sample_of_the_tokens(run):
    record = record_run(run, tokens=10, max_batches=2)
    assert record.n_token_rows == 10 < record.n_tokens
    assert record.info["share_of_tokens"] == pytest.approx(10 / record.n_tokens)


def test_prediction_is_recorded(run, tmp_path, capsys):
    assert main(["predict", str(run), "ant bee ant", "--record", str(tmp_path / "one")]) == 0
    one = RoutingRecord.load(tmp_path / "one")
    assert (one.source, one.groups) == ("prediction", ("all",))
    task = load_task_run(run)
    again = record_examples(task, Examples({"text": ["ant bee ant"]}))
    assert one.n_tokens == again.n_tokens >= 3
    for layer in range(3):
        assert one.counts(layer).tolist() == again.counts(layer).tolist()
    ids = one.arrays["token/id"].tolist()
    assert len(set(ids)) > 1
    assert min(ids) >= 0
    table = run.parent.parent / "held.csv"
    assert main(["predict", str(run), str(table), "--record", str(tmp_path / "all")]) == 0
    every = RoutingRecord.load(tmp_path / "all")
    assert every.n_token_rows == every.n_tokens == int(every.arrays["tokens"][0])
    held = record_run(run)
    assert every.counts(0).tolist() == held.counts(0).tolist()
    capsys.readouterr()


def test_an_answer_is_explained(run, capsys):
    assert main(["explain", str(run), "--text", "ant bee owl", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    text = report["texts"][0]
    assert report["kind"] == "task"
    assert "".join(text["tokens"]) == "ant bee owl"
    probability = text["answers"]["label"]["probability"]
    # the mixture routes the whole text: it says the same of each token
    assert all(row == text["layers"][2]["experts"][0] for row in text["layers"][2]["experts"])
    task = load_task_run(run)
    inputs = task.encoding.encode(Examples({"text": ["ant bee owl"]}), targets=False).arrays(np.array([0]))[0]
    label = task.encoding.targets["label"].labels.index(text["answers"]["label"]["prediction"])
    token, expert = 2, text["layers"][0]["experts"][2][0]
    mask = torch.arange(len(text["tokens"])) == token
    cases = {
        (0, token, 0, "token"): {0: Off([expert], "nothing", mask)},
        (0, token, 0, "text"): {0: Off([expert], "nothing")},
        (2, 0, 0, "token"): {2: Off([text["layers"][2]["experts"][0][0]], "nothing")},
    }
    for (layer, place, rank, scope), edits in cases.items():
        with torch.no_grad(), edited(task.model, edits):
            after = float(task.model(inputs).answers["label"][0].softmax(dim=0)[label])
        found = text["layers"][layer]["effects"][f"{scope}:probability:label"][place][rank]
        assert found == pytest.approx(after - probability, abs=1e-5), (layer, scope)
    assert (run / "explain-text.html").is_file()


def test_examples_of_a_file_are_explained(run, tmp_path, capsys):
    table = write_table(tmp_path / "mine.csv", 10, 3)
    page = tmp_path / "mine.html"
    given = ["explain", str(run), "--input", str(table), "--effects", "text", "--out", str(page)]
    assert main([*given, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert len(report["texts"]) == 8
    assert "Of 10 examples the first 8" in report["notes"][0]
    assert {one["key"] for one in report["measures"]} == {"text:probability:label", "text:odds:label"}
    assert main(given) == 0
    assert "example 8: label:" in capsys.readouterr().out
    assert main(["explain", str(run), "--text", "ant", "--swap", "0:1:2"]) != 0
    assert "is for language models" in capsys.readouterr().err


def test_numbers_that_are_asked_of_answers():
    logits = torch.tensor([[1.0, 3.0, 0.0], [1.0, 1.0, 1.0]])
    odds = 3 - np.log(np.exp(1) + 1)
    single = ClassEncoder(ClassTarget(column="a"), ["x", "y", "z"])
    found = _numbers(single, logits, torch.tensor(1))
    torch.testing.assert_close(found[0], torch.tensor([1 / (1 + np.exp(-odds)), odds], dtype=torch.float32))
    assert found[1].tolist() == pytest.approx([1 / 3, np.log(1 / 2)])
    multi = ClassEncoder(ClassTarget(column="a", multi=True), ["x", "y", "z"])
    assert _numbers(multi, logits, torch.tensor(1))[:, 1].tolist() == [3, 1]
    number = NumberEncoder(NumberTarget(columns=("a", "b")), [10.0, 0.0], [2.0, 1.0])
    assert _numbers(number, torch.tensor([[1.5, 9.0]]), torch.tensor(0)).tolist() == [[13.0]]
    # the words begin at tokens 0 and 2: leads of 2 and 1 the first time, of -1 and 1 the second
    tags = TagsEncoder(TagsTarget(column="a", input="text"), ["N", "V"])
    answer = torch.tensor([[[3.0, 1], [9, 0], [0, 1]], [[0, 1], [0, 9], [0, 1]]])
    assert _numbers(tags, answer, torch.tensor([[0, 0], [2, 1]])).tolist() == [[1.5], [0.0]]
