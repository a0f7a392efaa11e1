"""Boxes and masks against values worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest

from moekit.config.errors import ConfigError
from moekit.evaluate.task_metrics import metrics, score

pytest.importorskip("sklearn")


def box(y: float, label: str, value: float | None = None, height: float = 10) -> dict:
    found = {"box": [y, 0, height, 10], "label": label}
    return found if value is None else {**found, "score": value}


def test_average_precision_by_hand():
    # three true cats; found: right (.9), wrong (.8), right (.7), a second one on the first (.6)
    true = [[box(0, "cat"), box(100, "cat")], [box(0, "cat")]]
    said = [[box(1, "cat", 0.9), box(50, "cat", 0.8), box(0, "cat", 0.6)], [box(0, "cat", 0.7)]]
    # recall 1/3 at precision 1, 2/3 at 2/3 (the best from there on), never 3/3
    assert score("mean_average_precision", said, true) == pytest.approx(1 / 3 * 1 + 1 / 3 * 2 / 3)
    # one on the third, far below: recall 1 at precision 3/5
    said[0].append(box(100, "cat", 0.1))
    assert score("mean_average_precision", said, true) == pytest.approx(1 / 3 + 2 / 9 + 1 / 3 * 3 / 5)


def test_the_mean_is_over_the_classes_that_are_there():
    true = [[box(0, "cat"), box(30, "dog")]]
    assert score("mean_average_precision", [[box(0, "cat", 0.5)]], true) == 0.5
    assert score("mean_average_precision", [[box(0, "cat", 0.5), box(0, "cow", 0.9)]], true) == 0.5
    assert score("mean_average_precision", [[]], true) == 0.0
    # the right place under another name is wrong
    assert score("mean_average_precision", [[box(0, "dog", 0.5)]], [[box(0, "cat")]]) == 0.0


def test_the_overlap_decides():
    true = [[box(0, "cat")]]
    near, far = [[box(0, "cat", 0.5, height=5)]], [[box(0, "cat", 0.5, height=4.9)]]
    assert score("mean_average_precision", near, true) == 1.0
    assert score("mean_average_precision", far, true) == 0.0
    assert score("mean_average_precision", near, true, iou=0.75) == 0.0


def test_what_a_better_box_took_is_taken_and_the_next_best_is_looked_at():
    true = [[box(0, "cat"), box(3, "cat")]]
    # both lie best on the first; the second box may still have the other one (it shares 8 of 12)
    said = [[box(0, "cat", 0.9), box(1, "cat", 0.8)]]
    assert score("mean_average_precision", said, true) == 1.0


def test_boxes_that_cannot_be_measured():
    with pytest.raises(ConfigError, match="no target holds a box"):
        score("mean_average_precision", [[]], [[]])
    with pytest.raises(ConfigError, match="a prediction needs a score"):
        score("mean_average_precision", [[box(0, "cat")]], [[box(0, "cat")]])


def test_masks_by_hand():
    true = np.array([[[0, 0], [1, 1]], [[0, 0], [0, 2]]])
    said = np.array([[[0, 1], [1, 1]], [[0, 0], [0, 0]]])
    # class 0: 4 of 6; class 1: 2 of 3; class 2: none of 1
    assert score("mean_iou", said, true) == pytest.approx((4 / 6 + 2 / 3 + 0) / 3)
    assert score("pixel_accuracy", said, true) == pytest.approx(6 / 8)
    unknown = true.copy()
    unknown[1, 1, 1] = -1
    assert score("pixel_accuracy", said, unknown) == pytest.approx(6 / 7)
    assert score("mean_iou", said.tolist(), unknown.tolist()) == pytest.approx((4 / 5 + 2 / 3) / 2)
    with pytest.raises(ConfigError, match="mean_iou: masks must hold whole numbers, equally many"):
        score("mean_iou", said[:, :1], true)
    with pytest.raises(ConfigError, match="pixel_accuracy: masks must hold whole numbers"):
        score("pixel_accuracy", said / 2, true)


def test_they_are_registered():
    found = metrics()
    assert {found[name].library for name in ("mean_iou", "pixel_accuracy")} == {"scikit-learn"}
    assert found["mean_average_precision"].options == ("iou",)
