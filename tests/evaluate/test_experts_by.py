"""Shares of experts by the values of a column, their difference and what chance gives; the page that draws them."""

from __future__ import annotations

import numpy as np
import pytest

from moekit.evaluate.experts_by import OTHERS, experts_by
from moekit.evaluate.page.task import render_task_page


def test_a_case_worked_by_hand():
    """Of all tokens 5/8 go to expert 0; those of a 3/4 (two examples), of b 1/2 (two examples)."""
    shares = [
        np.array([[1.0, 0.0]]),
        np.array([[0.5, 0.5]]),
        np.array([[0.25, 0.75]]),
        np.array([[0.75, 0.25]]),
    ]
    found = experts_by(shares, ["a", "a", "b", "b"])
    assert found["values"] == ["a", "b"]
    assert found["examples"] == [2, 2]
    (layer,) = found["layers"]
    assert layer["shares"] == [[0.75, 0.25], [0.5, 0.5]]
    assert layer["difference"] == pytest.approx(0.125)
    # shuffled values may by luck stand as far apart as 7/8 and 3/8
    assert layer["chance"] == pytest.approx(0.25)


def test_values_that_mean_nothing_are_not_above_chance():
    rng = np.random.default_rng(0)
    shares = list(rng.dirichlet(np.ones(4), size=(400, 2)))
    by_nothing = experts_by(shares, [str(value) for value in rng.integers(0, 3, 400)])
    assert all(layer["difference"] <= 1.5 * layer["chance"] < 0.1 for layer in by_nothing["layers"])
    by_expert = experts_by(shares, [str(row[1].argmax()) for row in shares])
    assert by_expert["layers"][0]["difference"] <= 1.5 * by_expert["layers"][0]["chance"]
    assert by_expert["layers"][1]["difference"] > 3 * by_expert["layers"][1]["chance"]


def test_rare_values_stand_together():
    shares = [np.array([[1.0]])] * 30
    found = experts_by(shares, [*["a"] * 15, *["b"] * 10, "c", "d", "e", "f", "g"], most=3)
    assert found["values"] == ["a", "b", OTHERS]
    assert found["examples"] == [15, 10, 5]
    assert sum(found["examples"]) == 30


def test_the_page_has_names_in_any_script():
    shares = [np.array([[0.9, 0.1]]), np.array([[0.2, 0.8]])] * 15
    table = experts_by(shares, ["体育", "<b>财经"] * 15)
    table["layers"][0] |= {"name": "Sparse layer 0", "names": []}
    page = render_task_page({
        "name": "新闻", "run": "runs/x-1", "step": 7, "examples": 30, "of": "the test split", "sources": ["s"],
        "metrics": {"label.accuracy": 0.9, "label.macro_f1": 0.8, "purity": 0.4}, "active_parameters": 10,
        "total_parameters": 20, "experts_by": [{"column": "类别", **table}],
    })  # fmt: skip
    assert "<h1>新闻: label accuracy 0.900</h1>" in page
    assert "体育 (15)" in page
    assert "&lt;b&gt;财经" in page
    assert "<b>财经" not in page
    assert "in 1 of 1 layers" in page
