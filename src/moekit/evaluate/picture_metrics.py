"""Metrics of answers that lie in pictures: boxes with classes, and a class for each pixel.

Shape legend: N pictures, H and W pixels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from moekit.config.errors import ConfigError
from moekit.evaluate.task_metrics import register_metric
from moekit.models.boxes import pairwise_iou


@register_metric("mean_average_precision", "mean over the classes of the area under precision and recall of boxes",
                 library="moekit")  # fmt: skip
def mean_average_precision(predictions: Any, targets: Any, iou: float = 0.5) -> float:
    """Mean average precision of boxes.

    Args:
        predictions: for each picture a list of `{"box": [y, x, height, width], "label": ..., "score": ...}`; all boxes
            that were found, however low their scores.
        targets: for each picture a list of `{"box": ..., "label": ...}`.
        iou: a box is right where it overlaps a true one of its class by at least so much. Each true box counts once,
            for the best score; a second box on it is wrong.

    The classes are those of the targets. The area is exact, at all recalls (PASCAL VOC from 2010 on, Everingham et al.
    2010, section 4.2); COCO's tool reads the same curve at 101 recalls.

    Errors: `ConfigError` where no target holds a box, or a prediction has no score.
    """
    labels = sorted({box["label"] for boxes in targets for box in boxes})
    if not labels:
        raise ConfigError("mean_average_precision: no target holds a box")
    return float(np.mean([_average_precision(predictions, targets, label, iou) for label in labels]))


def _average_precision(predictions: Any, targets: Any, label: str, least: float) -> float:
    scores: list[float] = []
    right: list[bool] = []
    n_true = 0
    for said, true in zip(predictions, targets, strict=True):
        mine = sorted((box for box in said if box["label"] == label), key=_score, reverse=True)
        wanted = [box["box"] for box in true if box["label"] == label]
        n_true += len(wanted)
        scores += [_score(box) for box in mine]
        right += _matched([box["box"] for box in mine], wanted, least)
    order = np.argsort(-np.asarray(scores), kind="stable")
    hits = np.asarray(right, bool)[order].cumsum() if scores else np.zeros(0)
    recall, precision = hits / n_true, hits / np.arange(1, len(hits) + 1)
    # the best precision that is had at this recall or a higher one
    precision = np.maximum.accumulate(precision[::-1])[::-1]
    return float((np.diff(recall, prepend=0.0) * precision).sum())


def _score(box: Mapping[str, Any]) -> float:
    if "score" not in box:
        raise ConfigError(f"mean_average_precision: a prediction needs a score; got {dict(box)!r}")
    return float(box["score"])


def _matched(boxes: Sequence[Any], wanted: Sequence[Any], least: float) -> list[bool]:
    """Whether each box, best score first, is on a true one that no better box is on."""
    if not wanted or not boxes:
        return [False] * len(boxes)
    overlap = pairwise_iou(np.asarray(boxes), np.asarray(wanted))
    found = []
    for row in overlap:
        best = int(row.argmax())
        found.append(bool(row[best] >= least))
        if found[-1]:
            overlap[:, best] = -1.0
    return found


@register_metric(
    "mean_iou", "mean over the classes of intersection over union of their pixels", library="scikit-learn"
)
def mean_iou(predictions: Any, targets: Any) -> float:
    """Masks `[N, H, W]` of whole numbers, all pictures together; pixels whose target is below 0 count nowhere."""
    from sklearn.metrics import jaccard_score

    true, said = _pixels("mean_iou", predictions, targets)
    return float(jaccard_score(true, said, average="macro", zero_division=0.0))


@register_metric("pixel_accuracy", "share of right pixels", library="scikit-learn")
def pixel_accuracy(predictions: Any, targets: Any) -> float:
    """Masks `[N, H, W]` of whole numbers; pixels whose target is below 0 count nowhere."""
    from sklearn.metrics import accuracy_score

    return float(accuracy_score(*_pixels("pixel_accuracy", predictions, targets)))


def _pixels(name: str, predictions: Any, targets: Any) -> tuple[np.ndarray, np.ndarray]:
    """(targets, predictions) of all known pixels."""
    said, true = (
        np.concatenate([np.asarray(mask).ravel() for mask in masks]) for masks in (predictions, targets)
    )
    if said.shape != true.shape or said.dtype.kind not in "iu" or true.dtype.kind not in "iu":
        raise ConfigError(
            f"{name}: masks must hold whole numbers, equally many; got {said.dtype} {said.shape} and "
            f"{true.dtype} {true.shape}"
        )
    known = true >= 0
    return true[known], said[known]
