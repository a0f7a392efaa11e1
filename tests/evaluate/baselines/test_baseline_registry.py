"""What every baseline has in common: names, kinds, missing targets, reports, errors that name the remedy."""

from __future__ import annotations

import importlib.metadata
import json

import numpy as np
import pytest

from moekit.config.errors import ConfigError, MissingExtraError
from moekit.config.task import (
    BagInput,
    ClassTarget,
    FieldsInput,
    IdsInput,
    NumberTarget,
    TagsTarget,
    TextInput,
)
from moekit.data.examples import Examples
from moekit.evaluate.baselines import base
from moekit.evaluate.baselines.base import baselines, fit_baseline, known_rows, numbers
from moekit.evaluate.baselines.labels import agreement, best_of, class_codes, indicator, micro_f1
from moekit.evaluate.baselines.words import split_words

TEXT, LABEL = {"text": TextInput()}, {"label": ClassTarget()}
NONE = Examples({"text": [], "label": []})


def test_all_baselines_are_found_and_their_kinds_exist():
    found = baselines()
    assert {
        "majority", "tfidf-svm", "tfidf-logistic", "tfidf-char-svm", "linear", "boosting", "nearest", "crf", "bm25",
        "bag-of-embeddings", "factorisation", "svd++", "complex", "popularity", "item-knn", "als",
    } <= set(found)  # fmt: skip
    for baseline in found.values():
        assert set(baseline.reads) <= {
            "text", "words", "bag", "image", "audio", "fields", "ids", "sequence", "profile",
        }  # fmt: skip
        assert set(baseline.answers) <= {
            "class",
            "number",
            "tags",
            "sequence",
            "text",
            "transcript",
            "entity",
        }
        assert baseline.libraries


def test_unknown_names_and_options_get_the_nearest():
    train = Examples({"text": ["a"], "label": ["x"]})
    with pytest.raises(ConfigError, match=r"baseline 'tfidf-svn' is unknown: did you mean 'tfidf-svm'"):
        fit_baseline("tfidf-svn", train, NONE, TEXT, LABEL)
    with pytest.raises(
        ConfigError, match=r"option 'gird' is no option of baseline 'tfidf-svm': did you mean 'grid'"
    ):
        fit_baseline("tfidf-svm", train, NONE, TEXT, LABEL, options={"gird": [1]})


def test_kinds_that_do_not_fit_name_baselines_that_do():
    train = Examples({"text": ["a"], "label": ["x"], "tags": [["O"]]})
    with pytest.raises(
        ConfigError, match=r"reads inputs of kind ids, profile; got text\. For those there are: .*tfidf-svm"
    ):
        fit_baseline("svd++", train, NONE, TEXT, LABEL)
    with pytest.raises(
        ConfigError, match=r"targets\.tags is of kind tags\. For those there are: crf, majority"
    ):
        fit_baseline("tfidf-svm", train, NONE, TEXT, {"tags": TagsTarget()})


def test_a_missing_library_names_the_extra(monkeypatch):
    def version(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(base.importlib.metadata, "version", version)
    with pytest.raises(
        MissingExtraError, match=r"needs scikit-learn\. Install it: pip install 'moekit\[tasks\]'"
    ):
        fit_baseline("tfidf-svm", Examples({"text": ["a"], "label": ["x"]}), NONE, TEXT, LABEL)


def test_examples_without_a_target_are_left_out():
    rows = known_rows(Examples({"y": [1.0, None, float("nan"), 4]}), NumberTarget(columns=("y",)))
    assert list(rows["y"]) == [1.0, 4]
    assert list(known_rows(Examples({"label": ["a", None, "b"]}), ClassTarget())["label"]) == ["a", "b"]
    with pytest.raises(ConfigError, match=r"targets\.label is known in no training example"):
        fit_baseline("majority", Examples({"text": ["a"], "label": [None]}), NONE, TEXT, LABEL)
    with pytest.raises(ConfigError, match=r"must hold numbers or nothing: .*'x'"):
        numbers(["x"])


def test_the_report_is_json_and_names_the_version_and_the_time():
    train = Examples({"text": ["a", "b", "b"], "label": ["x", "y", "y"], "n": [1.0, 2.0, 6.0]})
    inputs = {"text": TextInput(), "ids": IdsInput(columns=("text",))}
    targets = {"label": ClassTarget(), "n": NumberTarget(columns=("n",), bounds=(0, 2.5))}
    fitted = fit_baseline("majority", train, train, inputs, targets)
    assert fitted.report()["predict_seconds"] is None
    answers = fitted.predict(Examples({"text": ["q", "r"]}))
    assert answers["label"].values == ["y", "y"]
    assert answers["label"].labels == ("x", "y")
    assert answers["label"].class_scores.tolist() == [[1 / 3, 2 / 3]] * 2
    assert answers["n"].values.tolist() == [2.5, 2.5]  # the mean, 3, clipped
    report = json.loads(json.dumps(fitted.report()))
    assert report["libraries"] == {"numpy": np.__version__}
    assert report["n_train"] == 3
    assert report["inputs"] == ["text", "ids"]
    assert report["fit_seconds"] >= 0
    assert report["predict_seconds"] >= 0


def test_majority_of_sets_and_of_words():
    sets = Examples({"text": ["a", "b", "c"], "label": [["x", "y"], ["y", "x"], ["x"]]})
    fitted = fit_baseline("majority", sets, NONE, TEXT, {"label": ClassTarget(multi=True)})
    assert fitted.predict(Examples({"text": ["q"]}))["label"].values == [["x", "y"]]
    tagged = Examples(
        {"text": [["run", "fast"], ["run"], ["a", "run"]], "tags": [["V", "A"], ["N"], ["D", "N"]]}
    )
    fitted = fit_baseline(
        "majority", tagged, NONE, {"text": TextInput(tokenizer="words")}, {"tags": TagsTarget()}
    )
    # run: N twice, V once; unseen words get the most frequent tag of all
    assert fitted.predict(Examples({"text": [["fast", "run", "zoo"]]}))["tags"].values == [["A", "N", "N"]]


def test_inputs_of_other_kinds_are_passed_over_and_said():
    train = Examples({"text": ["a", "b"], "label": ["x", "y"], "n": [0.0, 1.0]})
    inputs = {"text": TextInput(), "more": FieldsInput(numbers=("n",)), "bag": BagInput()}
    pytest.importorskip("sklearn")
    assert fit_baseline("tfidf-svm", train, NONE, inputs, LABEL).inputs == ("text", "bag")


def test_labels_keep_their_type_and_order():
    assert class_codes(np.array([3, 1, 3]))[0] == (1, 3)
    assert class_codes([True, "a", 2, "b"])[0] == (True, 2, "a", "b")
    labels, table = indicator([["b"], [], ["a", "b"]])
    assert labels == ("a", "b")
    assert table.tolist() == [[0, 1], [0, 0], [1, 1]]
    assert indicator([["c", "a"]], ("a", "b"))[1].tolist() == [[1, 0]]
    # two of three right, one label never seen in training
    assert agreement(np.array([0, 1, 1]), ("a", "b"), ["a", "b", "z"]) == pytest.approx(2 / 3)
    # 2 hits, 3 said, 3 true
    assert micro_f1(np.array([[1, 1], [0, 1]]), np.array([[1, 0], [1, 1]])) == pytest.approx(4 / 6)


def test_the_best_setting_is_the_first_of_equals():
    made, told = best_of([1, 2, 3], lambda c: c * 10, lambda made: {10: 0.5, 20: 0.7, 30: 0.7}[made], 9)
    assert made == 20
    assert told == {"setting": 2, "validation": {"1": 0.5, "2": 0.7, "3": 0.7}}
    assert best_of([1, 2], lambda c: c * 10, None, 9) == (90, {"setting": 9})
    with pytest.raises(ConfigError, match="at least one setting"):
        best_of([], lambda c: c, None, 9)


def test_words_split_where_nothing_is_written_between_them():
    assert split_words("Das 中文 ist 一word，ja! カナ") == [
        "das",
        "中",
        "文",
        "ist",
        "一",
        "word",
        "ja",
        "カ",
        "ナ",
    ]


def test_a_name_is_given_once():
    from moekit.evaluate.baselines.base import register_baseline

    baselines()
    add = register_baseline("hmm", "another", reads=("audio",), answers=("class",), libraries=())
    with pytest.raises(ConfigError, match="hmm"):
        add(lambda problem: None)
