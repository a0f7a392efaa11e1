"""moekit design and moekit tune: what they are told, and what they say when something is missing."""

from __future__ import annotations

import sys

import pytest


@pytest.mark.parametrize("verb", ["design", "tune"])
def test_without_optuna_the_command_that_installs_it_is_named(moekit_command, monkeypatch, tmp_path, verb):
    monkeypatch.setitem(sys.modules, "optuna", None)
    found = moekit_command(verb, "tumours", "--short", "--out", str(tmp_path / "s"))
    assert found.code == 6
    assert "pip install 'moekit[design]'" in found.err
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["design"], 2, "name a TASK to search, or --report FOLDER"),
        (["design", "tumours", "--report", "x"], 2, "name a TASK to search, or --report FOLDER"),
        (["design", "tumour"], 2, "did you mean 'tumours'"),
        (["design", "control"], 2, "trains by code of its own"),
        (["design", "tumours", "--by", "label.accurcy"], 2, "label.accuracy"),
        (["design", "quickstart", "--by", "label.accuracy"], 2, "--by must be loss"),
        (["design", "tumours", "train.experts={every: 5}"], 2, "train.experts"),
        (["tune", "tumours", "--budget", "active=1M"], 2, "budget.active is no limit"),
        (["design", "tumours", "--budget", "time=5"], 2, "budget.time must be a positive time with its unit"),
        (["design", "--report", "nowhere"], 4, "nowhere is no search"),
    ],
)
def test_what_is_wrong_is_said(moekit_command, tmp_path, monkeypatch, words, code, said):
    if "--budget" in words or "train.experts" in words[-1]:
        pytest.importorskip("optuna")
    monkeypatch.chdir(tmp_path)
    found = moekit_command(*words)
    assert found.code == code
    assert said in found.err


def test_a_task_by_every_name(tmp_path):
    from moekit.recipes.designing import subject_of

    by_name, by_recipe = subject_of("digits:small"), subject_of("recipe:digits:small", ["train.batch_size=7"])
    assert by_name.title == by_recipe.title == "digits:small"
    assert by_recipe.config.train.batch_size == 7
    assert (by_name.key, by_name.higher) == ("label.accuracy", True)
    text = subject_of("quickstart", ["train.steps=5"], short=True)
    assert (text.key, text.higher, text.measures, text.config.train.steps) == ("loss", False, None, 5)
