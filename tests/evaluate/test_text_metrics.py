"""Exact match and F1 of words, by hand and against another implementation."""

from __future__ import annotations

import random

import pytest

from moekit.config.errors import ConfigError
from moekit.evaluate.task_metrics import score


def test_by_hand():
    said = ["The Kitchen!", "left blind", "", "hall", ""]
    true = ["kitchen", "the left blind of it", "", "", "attic"]
    assert score("exact_match", said, true) == pytest.approx(2 / 5)
    # 1; two of two said and two of four (left blind of it): 2*2/6; empty and right; empty and wrong twice
    assert score("token_f1", said, true) == pytest.approx((1 + 4 / 6 + 1) / 5)
    assert score("token_f1", ["客厅灯"], ["客厅"]) == pytest.approx(2 * 2 / 5)
    assert score("token_f1", ["go go"], ["go"]) == pytest.approx(2 / 3), (
        "a word counts as often as it stands there"
    )
    assert score("exact_match", ["b"], [["a", "b"]]) == 1
    assert score("token_f1", ["b c"], [["a", "b", "c b"]]) == 1
    with pytest.raises(ConfigError, match="a text and its right answers are needed; got 3"):
        score("exact_match", [3], ["3"])
    with pytest.raises(ConfigError, match="right answers are needed"):
        score("token_f1", ["a"], [None])


def test_against_torchmetrics():
    squad = pytest.importorskip("torchmetrics.text").SQuAD()
    rng = random.Random(0)
    words = ["the", "A", "cat's", "sat,", "$5", "(on)", "mat.", "an", "The", "end-to-end"]
    said, true = ([" ".join(rng.choices(words, k=rng.randint(1, 6))) for _ in range(80)] for _ in range(2))
    said[:20] = true[:20]
    expected = squad(
        [{"prediction_text": text, "id": str(i)} for i, text in enumerate(said)],
        [{"answers": {"answer_start": [0], "text": [text]}, "id": str(i)} for i, text in enumerate(true)],
    )
    assert score("exact_match", said, true) == pytest.approx(float(expected["exact_match"]) / 100)
    assert score("token_f1", said, true) == pytest.approx(float(expected["f1"]) / 100)
