"""What comes with scikit-learn is checked against its hash, and its absence names the command."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import numpy as np
import pytest

from moekit.config.errors import DataError, MissingExtraError
from moekit.data.task_sources.base import TASK_SOURCES, Fetcher, load_source, task_sources


@pytest.mark.parametrize("name", ["digits", "breast-cancer"])
def test_without_scikit_learn_the_error_names_the_command(name, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'moekit\[tasks\]'"):
        load_source(name, {}, Fetcher())


def test_other_numbers_are_refused(monkeypatch) -> None:
    changed = SimpleNamespace(load_digits=lambda: {"data": np.zeros((4, 64)), "target": np.arange(4)})
    monkeypatch.setitem(sys.modules, "sklearn.datasets", changed)
    monkeypatch.setitem(sys.modules, "sklearn", SimpleNamespace(__version__="9.9"))
    with pytest.raises(DataError, match=r"load_digits of scikit-learn 9.9 does not match its recorded hash"):
        load_source("digits", {}, Fetcher())


def test_digits_and_tumours_as_scikit_learn_has_them() -> None:
    datasets = pytest.importorskip("sklearn.datasets")
    digits = load_source("digits", {}, Fetcher())
    assert (len(digits.train), len(digits.validation), len(digits.test)) == (1437, 0, 360)
    assert digits.train["image"].shape == (1437, 8, 8, 1)
    original = datasets.load_digits()
    # the first of all is a 0 and stands in training; 17 levels from 0 to 255
    assert np.array_equal(np.rint(digits.train["image"][0, ..., 0] * (16 / 255)), original.images[0])
    assert len(np.unique(digits.train["image"])) == 17
    assert digits.train["image"].max() == 255
    tumours = load_source("breast-cancer", {}, Fetcher())
    assert (len(tumours.train), len(tumours.test)) == (455, 114)
    assert sorted(tumours.test["label"]).count("malignant") == 42
    assert tumours.train["mean radius"][0] == 17.99
    assert set(tumours.train.columns) == set(task_sources()["breast-cancer"].columns)
    assert TASK_SOURCES["breast-cancer"].options == {}
