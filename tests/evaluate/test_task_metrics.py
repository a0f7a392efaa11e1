"""Metrics against values worked out by hand, and errors that say what was handed in."""

from __future__ import annotations

import importlib.metadata
import json
import math

import numpy as np
import pytest

from moekit.config.errors import ConfigError, MissingExtraError
from moekit.evaluate import task_metrics
from moekit.evaluate.ranking_metrics import filtered_ranks
from moekit.evaluate.task_metrics import metrics, score

pytest.importorskip("sklearn")

NAMES = {
    "accuracy", "macro_f1", "micro_f1", "roc_auc", "rmse", "mae", "r2", "entity_f1", "tag_accuracy", "bleu", "chrf",
    "wer", "cer", "mrr_filtered", "hits_at_k", "ndcg_at_k", "recall_at_k",
}  # fmt: skip


def test_the_registry_says_direction_range_library_and_version():
    assert set(metrics()) >= NAMES
    lower = {name for name, metric in metrics().items() if not metric.higher_is_better}
    assert lower == {"rmse", "mae", "wer", "cer"}
    report = json.loads(json.dumps(metrics()["rmse"].report()))
    assert report == {"metric": "rmse", "higher_is_better": False, "range": [0, None], "library": "scikit-learn",
                      "version": importlib.metadata.version("scikit-learn")}  # fmt: skip
    assert metrics()["rmse"].better(1.0, 2.0)
    assert not metrics()["r2"].better(1.0, 1.0)


def test_classes():
    said, true = ["a", "a", "b", "c"], ["a", "b", "b", "b"]
    assert score("accuracy", said, true) == 0.5
    # a: precision 1/2, recall 1 -> 2/3; b: precision 1, recall 1/3 -> 1/2; c: 0
    assert score("macro_f1", said, true) == pytest.approx((2 / 3 + 1 / 2 + 0) / 3)
    assert score("macro_f1", said, true, labels=["a", "b", "c", "d"]) == pytest.approx((2 / 3 + 1 / 2) / 4)
    assert score("micro_f1", said, true) == pytest.approx(0.5)
    assert score("accuracy", np.array([1, 2]), [1, 3]) == 0.5  # numpy's numbers are Python's
    assert score("accuracy", [True, "True"], ["True", "True"]) == 0.5  # types count


def test_several_labels_at_once():
    said, true = [["a"], ["a", "b"], []], [["a"], ["b"], ["b"]]
    assert score("accuracy", said, true) == pytest.approx(1 / 3)
    # 2 hits, 3 said, 3 true; a: 1 of 2 said, 1 of 1 true -> 2/3; b: 1 of 1, 1 of 2 -> 2/3
    assert score("micro_f1", said, true) == pytest.approx(2 / 3)
    assert score("macro_f1", said, true) == pytest.approx(2 / 3)
    assert score("accuracy", [[], []], [[], []]) == 1.0


def test_roc_auc():
    # of the four pairs (no, yes) three are in order
    assert score("roc_auc", [0.1, 0.4, 0.35, 0.8], [False, False, True, True]) == pytest.approx(0.75)
    table = [[0.9, 0.1], [0.6, 0.4], [0.65, 0.35], [0.2, 0.8]]
    assert score("roc_auc", table, ["no", "no", "yes", "yes"], labels=["no", "yes"]) == pytest.approx(0.75)
    three = [[0.8, 0.1, 0.1], [0.3, 0.4, 0.3], [0.2, 0.5, 0.3], [0.1, 0.3, 0.6]]
    # x: 1 of 1 order; y against the rest: its 0.4 beats 0.1, 0.3 and loses to 0.5; z: values 0.3, 0.6 against 0.1, 0.3
    expected = (1 + 2 / 3 + (1 + 0.5 + 1 + 1) / 4) / 3
    assert score("roc_auc", three, list("xyzz"), labels=list("xyz")) == pytest.approx(expected)
    assert score("roc_auc", [[0.9, 0.2], [0.1, 0.7]], [["x"], ["y"]], labels=["x", "y"]) == 1.0
    with pytest.raises(ConfigError, match=r"roc_auc is not defined: all or none of the targets are True"):
        score("roc_auc", [0.1, 0.2], [True, True])
    with pytest.raises(ConfigError, match=r"label 'z' is not one of \['x', 'y'\]"):
        score("roc_auc", [0.1, 0.2], ["x", "z"], labels=["x", "y"])
    with pytest.raises(ConfigError, match=r"3 columns of predictions need as many labels"):
        score("roc_auc", three, list("xyzz"))


def test_numbers():
    said, true = [1.0, 2.0, 6.0], [1.0, 4.0, 4.0]
    assert score("rmse", said, true) == pytest.approx(math.sqrt(8 / 3))
    assert score("mae", said, true) == pytest.approx(4 / 3)
    assert score("r2", said, true) == pytest.approx(1 - 8 / 6)  # the variance sums to 4 + 1 + 1
    assert score("rmse", [[1, 0], [1, 0]], [[0, 0], [0, 0]]) == pytest.approx(math.sqrt(1 / 2))
    with pytest.raises(ConfigError, match=r"predictions have shape \(2,\), targets \(2, 1\)"):
        score("rmse", [1, 2], [[1], [2]])
    with pytest.raises(ConfigError, match=r"rmse: all numbers must be finite; got nan at \[1\]"):
        score("rmse", [1, float("nan")], [1, 2])
    with pytest.raises(ConfigError, match="r2 needs at least two"):
        score("r2", [1], [1])
    with pytest.raises(ConfigError, match=r"mae: numbers \[n\]"):
        score("mae", ["x"], [1])


def test_tags_and_entities():
    pytest.importorskip("nervaluate")
    true = [["B-PER", "I-PER", "O", "B-LOC"], ["O", "B-LOC"]]
    said = [["B-PER", "I-PER", "O", "B-ORG"], ["B-LOC", "I-LOC"]]
    assert score("tag_accuracy", said, true) == pytest.approx(3 / 6)
    # of three said one is right whole, of three true one is found
    assert score("entity_f1", said, true) == pytest.approx(1 / 3)
    assert score("entity_f1", true, true) == 1.0
    # B after an entity of its type begins another; I without a beginning begins one; a change of type cuts
    assert score("entity_f1", [["B-X", "I-X"]], [["B-X", "B-X"]]) == 0.0
    assert score("entity_f1", [["O", "I-X", "I-X"]], [["O", "B-X", "I-X"]]) == 1.0
    assert score("entity_f1", [["B-X", "I-Y"]], [["B-X", "B-Y"]]) == 1.0
    # two said of which one right, one true: 2 * 1 / (2 + 1)
    assert score("entity_f1", [["B-X", "O", "B-X"]], [["B-X", "O", "O"]]) == pytest.approx(2 / 3)
    assert score("entity_f1", [["O"]], [["O"]]) == 1.0
    assert score("entity_f1", [["O"]], [["B-X"]]) == 0.0
    with pytest.raises(ConfigError, match=r"a tag must be O, B-TYPE or I-TYPE; got 'NN'"):
        score("entity_f1", [["NN"]], [["O"]])
    with pytest.raises(ConfigError, match=r"text 1 has 1 predicted tags, but 2 true ones"):
        score("tag_accuracy", [["O"], ["O"]], [["O"], ["O", "O"]])
    with pytest.raises(ConfigError, match="lists of lists of tags"):
        score("tag_accuracy", ["O"], ["O"])


def test_text():
    pytest.importorskip("sacrebleu")
    said, true = ["the cat sat on the mat"], ["the cat sat on a mat"]
    # runs of 1..4 words: 5 of 6, 3 of 5, 2 of 4, 1 of 3; equally long, so no penalty
    assert score("bleu", said, true) == pytest.approx(100 * (5 / 6 * 3 / 5 * 2 / 4 * 1 / 3) ** 0.25, abs=1e-6)
    assert score("bleu", said, [["the cat sat on a mat", "the cat sat on the mat"]]) == pytest.approx(100)
    assert score("bleu", ["我 喜欢 猫咪 们"], ["我喜欢猫咪们"], tokenize="zh") == pytest.approx(100)
    assert score("bleu", ["我喜欢猫咪们"], ["我 喜欢 猫咪 们"], tokenize="13a") < 1
    assert score("bleu", ["我喜欢猫咪们"], ["我 喜欢 猫咪 们"]) == pytest.approx(100), "found out by itself"
    assert score("bleu", ["un gato, ¿no?"], ["un gato ¿no?"]) == score(
        "bleu", ["un gato, ¿no?"], ["un gato ¿no?"], tokenize="13a"
    )
    assert score("chrf", said, said) == pytest.approx(100)
    # "ab" for "ac": of one character a is right (1/2); of two, none (0/1): mean over orders 1/4
    assert score("chrf", ["ab"], ["ac"]) == pytest.approx(25)
    with pytest.raises(ConfigError, match=r"tokenize 'zhh' is unknown: did you mean 'zh'"):
        score("bleu", said, true, tokenize="zhh")
    with pytest.raises(ConfigError, match=r"bleu: predictions\[0\] must be a text; got list"):
        score("bleu", [["a"]], ["a"])
    with pytest.raises(ConfigError, match="equally many texts"):
        score("chrf", ["a", "b"], [["a"], ["b", "c"]])


def test_error_rates():
    pytest.importorskip("jiwer")
    # one word changed, one left out, one too many: 3 changes over 4 + 2 words
    assert score("wer", ["a x c", "e f g"], ["a b c d", "e f"]) == pytest.approx(3 / 6)
    assert score("cer", ["你们好"], ["你好"]) == pytest.approx(1 / 2)
    with pytest.raises(ConfigError, match="target 1 is empty"):
        score("wer", ["a", "b"], ["a", " "])


def test_ranks_are_filtered_and_ties_gain_nothing():
    table = [[0.9, 0.8, 0.7, 0.1], [0.5, 0.5, 0.5, 0.5], [0.1, 0.2, 0.3, 0.4]]
    assert filtered_ranks(table, [2, 1, 3]).tolist() == [3.0, 2.5, 1.0]
    # the first question has 0 as another right answer; a target among the known ones still counts
    known = [[0, 2], [], [0]]
    assert filtered_ranks(table, [2, 1, 3], known).tolist() == [2.0, 2.5, 1.0]
    assert score("mrr_filtered", table, [2, 1, 3], known=known) == pytest.approx((1 / 2 + 1 / 2.5 + 1) / 3)
    assert score("hits_at_k", table, [2, 1, 3], k=2, known=known) == pytest.approx(2 / 3)
    assert score("hits_at_k", table, [2, 1, 3], k=2) == pytest.approx(1 / 3)
    # filtered candidates are gone, not tied: two known, the target last of the other two
    assert filtered_ranks([[3.0, 2.0, 1.0, 0.0]], [3], [[0, 1]]).tolist() == [2.0]
    assert filtered_ranks([[-np.inf, 0.0, -np.inf]], [0]).tolist() == [2.5]
    with pytest.raises(ConfigError, match=r"mrr_filtered: candidate 4 is not in 0\.\.3"):
        score("mrr_filtered", table, [4, 0, 0])
    with pytest.raises(ConfigError, match=r"known has 1 lists for 3 questions"):
        score("hits_at_k", table, [0, 0, 0], known=[[0]])
    with pytest.raises(ConfigError, match=r"must be \[n, candidates\]; got shape \(3,\)"):
        score("mrr_filtered", [1, 2, 3], [0, 0, 0])
    with pytest.raises(ConfigError, match="NaN or infinity"):
        score("mrr_filtered", [[float("nan"), 0]], [0])
    with pytest.raises(ConfigError, match="whole numbers"):
        score("mrr_filtered", table, [0.5, 1, 2])


def test_recommendations():
    table = [[4.0, 3.0, 2.0, 1.0], [1.0, 2.0, 3.0, 4.0]]
    right = [[0, 3], [0]]
    assert score("recall_at_k", table, right, k=2) == pytest.approx((1 / 2 + 0) / 2)
    # seen in training: 3 and 2 leave the second question's order, so 0 is second
    assert score("recall_at_k", table, right, k=2, known=[[], [3, 2]]) == pytest.approx((1 / 2 + 1) / 2)
    ideal = 1 + 1 / math.log2(3)
    assert score("ndcg_at_k", table, right, k=4) == pytest.approx(
        ((1 + 1 / math.log2(5)) / ideal + 1 / math.log2(5)) / 2
    )
    assert score("ndcg_at_k", table, right, k=2, known=[[], [3, 2]]) == pytest.approx(
        (1 / ideal + 1 / math.log2(3)) / 2
    )
    with pytest.raises(ConfigError, match=r"targets\[1\] must list at least one right candidate"):
        score("recall_at_k", table, [[0], []])
    with pytest.raises(ConfigError, match=r"known\[0\] takes out a candidate that targets\[0\] asks for"):
        score("ndcg_at_k", table, right, known=[[0], []])
    with pytest.raises(ConfigError, match="k must be at least 1; got 0"):
        score("recall_at_k", table, right, k=0)


def test_what_score_refuses():
    with pytest.raises(ConfigError, match=r"metric 'acuracy' is unknown: did you mean 'accuracy'"):
        score("acuracy", [1], [1])
    with pytest.raises(ConfigError, match=r"'kk' is no option of metric 'hits_at_k': did you mean 'k'"):
        score("hits_at_k", [[1.0]], [0], kk=1)
    with pytest.raises(ConfigError, match=r"accuracy: 1 predictions, but 2 targets"):
        score("accuracy", [1], [1, 2])
    with pytest.raises(ConfigError, match="nothing to measure"):
        score("accuracy", [], [])
    with pytest.raises(ConfigError, match=r"accuracy: targets\[0\] is None; leave such examples out"):
        score("accuracy", ["a"], [None])
    with pytest.raises(ConfigError, match="predictions hold lists of labels, the others single ones"):
        score("accuracy", [["a"]], ["a"])
    with pytest.raises(ConfigError, match=r"macro_f1: label 'q' is not one of \['a'\]"):
        score("macro_f1", ["q"], ["a"], labels=["a"])


def test_a_missing_library_names_the_extra(monkeypatch):
    def version(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(task_metrics.importlib.metadata, "version", version)
    with pytest.raises(
        MissingExtraError, match=r"'wer' needs jiwer\. Install it: pip install 'moekit\[tasks\]'"
    ):
        score("wer", ["a"], ["a"])
    assert score("recall_at_k", [[1.0, 0.0]], [[0]], k=1) == 1.0  # needs none
