"""Two tasks whose examples come from two collections: training, named experts, and a monitor that reads a stream."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest

from moekit.config.errors import ConfigError
from moekit.config.task_run import TaskRunConfig
from moekit.data.examples import Examples, TaskData
from moekit.evaluate.answers import answers_to
from moekit.recipes import news_monitor
from moekit.recipes.news_monitor import Monitor, follow
from moekit.recipes.running import measured
from moekit.recipes.tasks import Measure
from moekit.train.run import load_task_run, resume_run, train_run

TOPICS = {"oil": ["crude", "barrel", "opec"], "grain": ["wheat", "corn", "harvest"]}
TONES = {"positive": ["great", "happy", "fine"], "negative": ["awful", "sad", "bad"]}


def texts(n: int, seed: int) -> Examples:
    """Half know their topic, the other half their tone."""
    rng = random.Random(seed)
    columns: dict[str, list] = {"text": [], "topic": [], "tone": [], "order": []}
    for row in range(n):
        words = {**TOPICS, **TONES}
        label = rng.choice(list(TOPICS if row % 2 else TONES))
        columns["text"].append(" ".join(rng.choices([*words[label], "the", "said"], k=rng.randint(4, 9))))
        columns["topic"].append(label if row % 2 else None)
        columns["tone"].append(None if row % 2 else label)
        columns["order"].append(n - row)
    return Examples(columns)


DATA = TaskData(texts(240, 0), texts(40, 1), texts(60, 2), given_test=True)
KEYWORDS = {"oil": ["crude", "barrel"], "grain": ["wheat"]}


def config(tmp_path, **model) -> TaskRunConfig:
    moe = {"n_experts": 3, "top_k": 2, "d_expert": 8, "router": {"name": "rule", "scope": "sequence", "teach": 1.0,
           "keywords": KEYWORDS}}  # fmt: skip
    return TaskRunConfig.from_dict({
        "name": "two", "runs_dir": str(tmp_path),
        "inputs": {"bag": {"kind": "bag", "ngrams": [1, 1]}, "text": {"kind": "text", "tokenizer": "words"}},
        "targets": {"topic": {"kind": "class", "column": "topic", "wide": ["bag"]},
                    "tone": {"kind": "class", "column": "tone", "wide": ["bag"]}},
        "model": {"d_model": 16, "n_layers": 1, "n_heads": 2, "moe": moe,
                  "task_experts": {"kind": "ple", "n_experts": 2, "n_own": 1, "d_expert": 8}, **model},
        "train": {"steps": 60, "batch_size": 24, "accumulation": 2, "checkpoint_every": 20, "device": "cpu",
                  "optimizer": {"lr": 1e-2}, "schedule": {"warmup_steps": 3}},
    })  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    pytest.importorskip("sklearn")
    return train_run(config(tmp_path_factory.mktemp("runs")), data=DATA, quiet=True).folder


def test_both_tasks_are_learnt_from_the_examples_that_know_them(folder):
    loaded = load_task_run(folder)
    measures = [
        Measure("topic", "accuracy", {}),
        Measure("tone", "accuracy", {}),
        Measure("tone", "roc_auc", {}),
    ]
    scores = measured(loaded, DATA.test, measures)
    assert scores["topic.accuracy"] > 0.95
    assert scores["tone.accuracy"] > 0.95
    assert scores["tone.roc_auc"] > 0.98


def test_answers_name_the_experts_and_whose_mixture_it_is(folder):
    (answer,) = answers_to(folder, "crude the said barrel")
    by_layer: dict[int, list] = {}
    for one in answer["experts"]:
        by_layer.setdefault(one["layer"], []).append(one)
    assert [(one["name"], one["share"]) for one in by_layer[0]] == [("oil", 1.0)]
    assert "task" not in by_layer[0][0]
    assert {one["task"] for one in by_layer[1]} == {"topic"}
    assert {one["task"] for one in by_layer[2]} == {"tone"}
    assert {one["name"] for one in by_layer[2]} <= {"shared 0", "shared 1", "tone 0"}


def test_an_interrupted_run_goes_on_bit_for_bit(folder, tmp_path, monkeypatch):
    from moekit.train.loop import Trainer

    steps = Trainer.steps

    def stopped(self):
        for metrics in steps(self):
            yield metrics
            if self.step == 33:
                raise KeyboardInterrupt

    monkeypatch.setattr(Trainer, "steps", stopped)
    with pytest.raises(KeyboardInterrupt):
        train_run(config(tmp_path), data=DATA, quiet=True)
    monkeypatch.undo()
    monkeypatch.setattr("moekit.train.material.load_task_data", lambda *_: DATA)
    again = load_task_run(resume_run(tmp_path / "two-1", quiet=True).folder).model.state_dict()
    whole = load_task_run(folder).model.state_dict()
    assert all(np.array_equal(tensor.numpy(), again[name].numpy()) for name, tensor in whole.items())


def test_the_monitor_keeps_a_summary_of_each_topic(folder):
    loaded = load_task_run(folder)
    monitor = Monitor(loaded, half_life=2)
    said = monitor.read("wheat harvest harvest said", truth="grain")
    assert said["topic"] == "grain"
    assert -1 <= said["tone"] <= 1
    for text in ("crude barrel said", "crude opec opec great", "crude crude barrel happy happy"):
        monitor.read(text, truth="grain")
    report = monitor.report()
    assert report["texts"] == 4
    assert report["accuracy"] == 0.25
    assert report["milliseconds"]["p95"] >= report["milliseconds"]["median"] > 0
    oil, grain = report["topics"]
    assert (oil["topic"], oil["texts"]) == ("oil", 3)
    # three texts, the last one in full, the others by a half after two more
    assert oil["recent_share"] == pytest.approx(
        (1 + 0.5**0.5 + 0.5) / (1 + 0.5**0.5 + 0.5 + 0.5**1.5), abs=1e-3
    )
    assert oil["terms"][0] in {"crude", "barrel"}
    assert "said" not in oil["terms"]
    assert "crude" not in grain["terms"]
    assert [item["number"] for item in oil["latest"]] == [4, 3, 2]
    assert oil["central"]["number"] in {2, 4}
    assert grain["central"] == {"number": 1, "text": "wheat harvest harvest said"}
    assert report["experts"] == ["shared 0", "shared 1", "topic 0"]
    assert sum(oil["experts"]) == pytest.approx(1, abs=1e-3)
    assert oil["tone"] > -1


def test_the_stream_comes_in_the_order_of_the_file_and_ends_on_a_page(folder, tmp_path, monkeypatch):
    news = news_monitor.news_of(DATA.test)
    assert len(news) == 30
    assert news["order"] == sorted(news["order"])
    monkeypatch.setattr(news_monitor, "load_task_data", lambda _: DATA)
    assert news_monitor.main([str(folder), "--out", str(tmp_path / "page.html"), "--limit", "25"]) == 0
    report = json.loads((tmp_path / "page.json").read_text())
    assert report["texts"] == 25
    page = (tmp_path / "page.html").read_text()
    assert "<h1>25 texts in 2 topics" in page
    assert "http://" not in page.replace("http://www.w3.org", "")
    table = tmp_path / "mine.csv"
    table.write_text("text\n" + "\n".join(["wheat <b>said</b> great"] * 45) + "\n")
    assert news_monitor.main([str(folder), str(table), "--out", str(tmp_path / "mine.html")]) == 0
    page = (tmp_path / "mine.html").read_text()
    assert "<b>said" not in page
    assert "Topics over the stream" in page
    assert "Share of each expert by topic" in page
    assert news_monitor.main([str(folder), str(table), "--json", "--out", str(tmp_path / "only.html")]) == 0
    assert not (tmp_path / "only.html").exists()
    assert "median ms" in news_monitor.measure(load_task_run(folder), DATA)


def test_a_monitor_needs_topic_tone_and_terms(folder, tmp_path):
    loaded = load_task_run(folder)
    with pytest.raises(ConfigError, match=r"half_life must be above 0"):
        Monitor(loaded, 0)
    del loaded.encoding.targets["tone"]
    with pytest.raises(ConfigError, match=r"must hold tone"):
        Monitor(loaded)
    loaded.encoding.inputs.pop("bag")
    with pytest.raises(ConfigError, match=r"must hold one of kind bag"):
        Monitor(loaded)


def test_an_empty_stream_has_a_page_too(folder, tmp_path):
    report = follow(Monitor(load_task_run(folder)), [])
    news_monitor.write_pages(report, tmp_path / "none.html")
    assert "No text has been read" in (tmp_path / "none.html").read_text()
