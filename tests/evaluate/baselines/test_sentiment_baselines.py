"""VADER and SnowNLP answer in the classes of the data, and learn no more than they say."""

from __future__ import annotations

import numpy as np
import pytest

from moekit.config.errors import ConfigError
from moekit.config.task import BagInput, ClassTarget, TextInput
from moekit.data.examples import Examples
from moekit.evaluate.baselines.base import fit_baseline

TEXT, LABEL = {"text": TextInput()}, {"label": ClassTarget()}
GOOD = ["A great film, I love it.", "Wonderful and happy!", "The best, simply brilliant.", "Nice, good fun."]
BAD = ["A terrible film, I hate it.", "Awful and sad!", "The worst, simply horrible.", "Bad, boring, a pity."]
好 = ["这本书很好,我喜欢", "酒店干净,服务很好", "喜欢,很满意,推荐", "质量很好,非常满意"]
差 = ["这本书很差,不值得", "酒店脏,服务太差", "失望,很糟糕,后悔", "质量太差,非常失望"]


def reviews(good: list[str], bad: list[str], names: tuple[str, str] = ("neg", "pos")) -> Examples:
    """Both kinds in turns; `names` of the bad and the good ones."""
    texts = [text for pair in zip(good, bad, strict=True) for text in pair]
    return Examples({"text": texts, "label": [names[1], names[0]] * len(good)})


@pytest.mark.parametrize("names", [("neg", "pos"), ("z-bad", "a-good"), (0, 4)])
def test_vader_learns_which_class_is_the_positive_one(names):
    pytest.importorskip("vaderSentiment")
    data = reviews(GOOD, BAD, names)
    fitted = fit_baseline("vader", data.rows(range(4)), data.rows(range(4, 6)), TEXT, LABEL)
    answers = fitted.predict(data.rows(range(6, 8)))["label"]
    assert list(answers.values) == [names[1], names[0]]
    assert answers.labels == tuple(sorted(names))
    assert [answers.labels[place] for place in answers.class_scores.argmax(axis=1)] == list(answers.values)
    assert fitted.settings["label"]["positive"] == names[1]
    assert fitted.report()["libraries"].keys() == {"vaderSentiment"}
    # turned labels are answered turned: it is the data, not the lexicon, that says what a class is
    turned = fit_baseline("vader", reviews(GOOD, BAD, names[::-1]), data.rows([]), TEXT, LABEL)
    assert list(turned.predict(data)["label"].values) == list(reviews(GOOD, BAD, names[::-1])["label"])


def test_vader_chooses_on_validation_from_which_score_a_text_is_positive():
    pytest.importorskip("vaderSentiment")
    train = reviews(GOOD, BAD)
    # not a word of the lexicon: a score of 0, between the bounds of the grid
    flat = {"text": ["A table and a chair.", "Four of them."]}
    neutral = Examples({"text": ["It is a door."], "label": ["pos"]})
    for label in ("pos", "neg"):
        held = Examples({**flat, "label": [label] * 2})
        fitted = fit_baseline("vader", train, held, TEXT, LABEL)
        assert list(fitted.predict(neutral)["label"].values) == [label]
        assert (fitted.settings["label"]["from"] <= 0) == (label == "pos")
    none = fit_baseline("vader", train, train.rows([]), TEXT, LABEL)
    assert none.settings["label"]["from"] == 0.05


def test_snownlp_learns_from_the_training_texts_alone():
    pytest.importorskip("snownlp")
    data, none = reviews(好, 差), reviews([], [])
    fitted = fit_baseline("snownlp", data.rows(range(6)), none, TEXT, LABEL)
    answers = fitted.predict(data.rows(range(6, 8)))["label"]
    assert list(answers.values) == ["pos", "neg"]
    assert answers.probabilistic
    np.testing.assert_allclose(answers.class_scores.sum(axis=1), 1)
    # were its own texts in it, the words of praise would still be praise
    turned = fit_baseline("snownlp", reviews(好, 差, ("pos", "neg")), none, TEXT, LABEL)
    assert list(turned.predict(data.rows(range(6, 8)))["label"].values) == ["neg", "pos"]
    empty = fitted.predict(none)["label"]
    assert list(empty.values) == []
    assert empty.class_scores.shape == (0, 2)


@pytest.mark.parametrize(("name", "library"), [("vader", "vaderSentiment"), ("snownlp", "snownlp")])
def test_what_they_cannot_answer_is_said(name, library):
    pytest.importorskip(library)
    data = reviews(GOOD, BAD)
    none = data.rows([])
    three = Examples({"text": GOOD[:3], "label": ["a", "b", "c"]})
    with pytest.raises(ConfigError, match=r"targets\.label must have two classes.*'c'"):
        fit_baseline(name, three, none, TEXT, LABEL)
    with pytest.raises(ConfigError, match=r"targets\.label\.multi must be false"):
        fit_baseline(name, data, none, TEXT, {"label": ClassTarget(multi=True)})
    two = {"text": TextInput(), "bag": BagInput(column="title")}
    with pytest.raises(ConfigError, match=r"inputs must read one column.*title"):
        fit_baseline(name, data, none, two, LABEL)
