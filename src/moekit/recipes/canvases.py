"""Only of the recipes detection and segmentation: their classical baseline, and pictures of what was answered."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from moekit.config.errors import MissingExtraError
from moekit.config.task_run import TaskRunConfig
from moekit.data.examples import Examples, TaskData
from moekit.evaluate.drawing import boxes_picture, coloured, in_rows, mask_picture, save_png
from moekit.evaluate.task import predict, truth
from moekit.evaluate.task_metrics import score
from moekit.recipes.tasks import Recipe
from moekit.train.run import LoadedTask

SIDE = 28
SHOWN = 12


def notes(loaded: LoadedTask, data: TaskData) -> str:
    """Draws the first test pictures with the answers to them into the run's folder."""
    some = data.test.rows(range(min(SHOWN, len(data.test))))
    try:
        path = save_png(loaded.folder / "examples.png", answers_picture(loaded, some))
    except MissingExtraError:
        return ""
    return f"The first {len(some)} test pictures with what is true and what was answered: {path}."


def answers_picture(loaded: LoadedTask, examples: Examples) -> np.ndarray:
    """For each example the picture, what is true and what was answered, side by side; four examples a row."""
    (target,) = loaded.config.targets
    encoder: Any = loaded.encoding.targets[target]
    said = predict(loaded.model, loaded.encoding, examples)
    true = truth(loaded.encoding, examples)[target]
    shown: list[np.ndarray] = []
    for row, image in enumerate(np.asarray(examples["image"])):
        if encoder.kind == "boxes":
            answer = said.answers[target][row]["prediction"]
            shown += [boxes_picture(image, boxes, encoder.labels) for boxes in (true[row], answer)]
        else:
            shown += [coloured(image), mask_picture(true[row]), mask_picture(said.raw[target][row])]
    return in_rows(shown, columns=6, scale=1 if encoder.kind == "boxes" else 3)


@dataclass
class Components:
    """Things as connected pixels above 0, each named by a support vector machine on its pixels.

    Attributes: reach: pixels by which parts may lie apart and still be one thing. labels: names of the classes.
    """

    reach: int
    labels: list[str]
    classifier: Any

    def find(self, image: np.ndarray) -> list[tuple[np.ndarray, list[int]]]:
        """The pixels `[H, W]` of each thing in `[H, W]`, and its box."""
        from scipy import ndimage

        there = image > 0
        near = ndimage.binary_dilation(there, np.ones((3, 3)), self.reach) if self.reach else there
        numbers, count = ndimage.label(near, np.ones((3, 3)))
        found = []
        for number in range(1, count + 1):
            pixels = there & (numbers == number)
            rows, columns = np.flatnonzero(pixels.any(axis=1)), np.flatnonzero(pixels.any(axis=0))
            box = [rows[0], columns[0], rows[-1] - rows[0] + 1, columns[-1] - columns[0] + 1]
            found.append((pixels, [int(value) for value in box]))
        return found

    def answer(self, images: np.ndarray) -> tuple[list[list[dict[str, Any]]], np.ndarray]:
        """Boxes with classes and scores of each picture `[N, H, W]`, and masks `[N, H, W]` of class + 1."""
        found = [self.find(image) for image in images]
        crops = [
            centred(image * pixels, box)
            for image, things in zip(images, found, strict=True)
            for pixels, box in things
        ]
        distances = self.classifier.decision_function(np.stack(crops)) if crops else np.zeros((0, 2))
        answers = iter(zip(distances.argmax(axis=1), distances.max(axis=1), strict=True))
        masks = np.zeros(images.shape, np.int64)
        boxes: list[list[dict[str, Any]]] = []
        for mask, things in zip(masks, found, strict=True):
            boxes.append([])
            for pixels, box in things:
                place, value = next(answers)
                mask[pixels] = 1 + place
                boxes[-1].append({"box": box, "label": self.labels[place], "score": float(value)})
        return boxes, masks


def centred(image: np.ndarray, box: Sequence[int]) -> np.ndarray:
    """`[SIDE * SIDE]` of 0 to 1: what is in the box, in the middle of a square; cut off where it is larger."""
    y, x, height, width = box
    crop = image[y : y + height, x : x + width].astype(np.float32) / 255
    top, left = max(0, (height - SIDE) // 2), max(0, (width - SIDE) // 2)
    crop = crop[top : top + SIDE, left : left + SIDE]
    page = np.zeros((SIDE, SIDE), np.float32)
    down, right = (SIDE - crop.shape[0]) // 2, (SIDE - crop.shape[1]) // 2
    page[down : down + crop.shape[0], right : right + crop.shape[1]] = crop
    return page.ravel()


def fit_components(train: Examples, validation: Examples, labels: Sequence[str]) -> Components:
    """The machine learns from the true boxes of training; the reach is the best of three on validation boxes.

    Args:
        train: `image` `[N, H, W, 1]`, `boxes` and `labels`.
        validation: the same; the reach is 1 where it is empty.
        labels: names of the classes in the order of their numbers in masks.
    """
    from sklearn.decomposition import PCA
    from sklearn.pipeline import make_pipeline
    from sklearn.svm import SVC

    crops, names = [], []
    for image, boxes, kinds in zip(
        np.asarray(train["image"])[..., 0], train["boxes"], train["labels"], strict=True
    ):
        crops += [centred(image, box) for box in boxes]
        names += [list(labels).index(kind) for kind in kinds]
    machine = make_pipeline(PCA(min(64, len(crops)), random_state=0), SVC(C=10.0, break_ties=True))
    machine.fit(np.stack(crops), names)
    present = [labels[number] for number in machine.classes_]
    if len(validation) == 0:
        return Components(1, present, machine)
    images = np.asarray(validation["image"])[..., 0]
    true = _true_boxes(validation)

    def quality(reach: int) -> float:
        found = Components(reach, present, machine)
        return score("mean_average_precision", found.answer(images)[0], true)

    return Components(max((0, 1, 2), key=quality), present, machine)


def _true_boxes(examples: Examples) -> list[list[dict[str, Any]]]:
    return [
        [{"box": box, "label": label} for box, label in zip(boxes, labels, strict=True)]
        for boxes, labels in zip(examples["boxes"], examples["labels"], strict=True)
    ]


def baseline(name: str, recipe: Recipe, config: TaskRunConfig, data: TaskData) -> dict[str, Any]:
    """The row of `components`, whose classes stand in masks in Fashion-MNIST's order."""
    from moekit.data.task_sources.images import FASHION_LABELS

    began = time.perf_counter()
    fitted = fit_components(data.train, data.validation, FASHION_LABELS)
    seconds = time.perf_counter() - began
    boxes, masks = fitted.answer(np.asarray(data.test["image"])[..., 0])
    # the machine may know fewer classes than masks have
    numbers = np.asarray([0, *(1 + FASHION_LABELS.index(label) for label in fitted.labels)])
    scores = {}
    for measure in recipe.measures:
        if config.targets[measure.target].kind == "boxes":
            scores[measure.key] = score(measure.metric, boxes, _true_boxes(data.test), **measure.options)
        else:
            true = np.asarray(data.test["mask"]).astype(np.int64)
            scores[measure.key] = score(measure.metric, numbers[masks], true, **measure.options)
    return {"scores": scores, "seconds": seconds, "reach": fitted.reach}
