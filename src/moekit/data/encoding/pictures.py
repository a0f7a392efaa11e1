"""Columns of clips, and of answers that lie in pictures: boxes, and a class for each pixel.

Shape legend: N examples, H and W pixels, P patches, C classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moekit.config.base import StrictConfig
from moekit.config.errors import DataError
from moekit.config.task_stems import PatchStemConfig
from moekit.config.task_vision import (
    BoxesTarget,
    DetectHeadConfig,
    MaskTarget,
    SegmentHeadConfig,
    TubeletStemConfig,
    VideoInput,
)
from moekit.data.encoding.base import Arrays, Continuous, Encoded, Encoder, Ragged, pixels_of, require_value
from moekit.data.encoding.targets import IGNORED, TargetEncoder
from moekit.data.examples import Examples
from moekit.models.boxes import kept_boxes

# boxes below this score are not looked at; a metric sees all above it
LEAST_SCORE = 0.01
# boxes of one class that overlap by more than this are the same thing
SAME_THING = 0.5


class VideoEncoder(Encoder):
    """Clips `[N, frames, H, W]` or `[N, frames, H, W, channels]`, to channels before pixels, standardised."""

    kind = "video"

    def __init__(
        self, config: VideoInput, shape: Sequence[int], means: Sequence[float], deviations: Sequence[float]
    ) -> None:
        self.config, self.shape = config, tuple(shape)
        self.means, self.deviations = list(means), list(deviations)

    @classmethod
    def fit(cls, config: VideoInput, train: Examples) -> VideoEncoder:
        clips = _clips(train, config.column, None)
        sample = clips[:: max(1, len(clips) // 1000)].astype(np.float32)
        deviations = np.maximum(sample.std(axis=(0, 1, 2, 3)), 1e-6)
        return cls(config, clips.shape[1:], sample.mean(axis=(0, 1, 2, 3)).tolist(), deviations.tolist())

    def part(self) -> TubeletStemConfig:
        length, height, width, channels = self.shape
        return TubeletStemConfig.from_dict(
            {"channels": channels, "length": length, "height": height, "width": width,
             "patch": self.config.patch, "frames": self.config.frames}, where="model.stems"
        )  # fmt: skip

    def encode(self, examples: Examples) -> Encoded:
        return _Clips(_clips(examples, self.config.column, self.shape), self.means, self.deviations)

    def state(self) -> dict[str, Any]:
        return {"shape": list(self.shape), "means": self.means, "deviations": self.deviations}

    @classmethod
    def from_state(cls, config: VideoInput, state: Mapping[str, Any]) -> VideoEncoder:
        return cls(config, state["shape"], state["means"], state["deviations"])


class _Clips(Encoded):
    """Clips kept as they came; a batch is standardised."""

    def __init__(self, clips: np.ndarray, means: Sequence[float], deviations: Sequence[float]) -> None:
        self.clips = clips
        self.mean, self.deviation = np.asarray(means, np.float32), np.asarray(deviations, np.float32)

    def __len__(self) -> int:
        return len(self.clips)

    def batch(self, rows: np.ndarray, rng: np.random.Generator | None = None) -> dict[str, Tensor]:
        clips = (self.clips[rows].astype(np.float32) - self.mean) / self.deviation
        return {"clips": torch.from_numpy(np.ascontiguousarray(clips.transpose(0, 1, 4, 2, 3)))}

    def continuous(self, valid_range: tuple[float, float] | None = None) -> Continuous:
        return pixels_of(self.clips, "clips", self.mean, self.deviation, valid_range)


def _clips(examples: Examples, column: str, shape: Sequence[int] | None) -> np.ndarray:
    values = examples[column]
    if not isinstance(values, np.ndarray) or values.dtype == object:
        items = [np.asarray(value) for value in values]
        for row, item in enumerate(items):
            require_value(item.shape == items[0].shape, column, row, item.shape,
                          f"every clip must have the shape of the first one, {items[0].shape}")  # fmt: skip
        values = np.stack(items) if items else np.zeros((0, *(shape or (1, 1, 1, 1))), np.float32)
    if values.ndim == 4:
        values = values[..., None]
    if values.ndim != 5:
        raise DataError(
            f"column {column!r} must hold clips [frames, height, width] or [frames, height, width, channels]; "
            f"got {values.shape[1:]}"
        )
    if shape is not None and len(values) and values.shape[1:] != tuple(shape):
        raise DataError(
            f"column {column!r} must hold clips of shape {tuple(shape)}, as in training; got {values.shape[1:]}"
        )
    return values


def _patches(inputs: Mapping[str, Encoder], name: str) -> PatchStemConfig:
    part = inputs[name].part()
    assert isinstance(part, PatchStemConfig)
    return part


class BoxesEncoder(TargetEncoder):
    """Boxes `[y, x, height, width]` in pixels with a class each.

    An answer names the boxes of at least `threshold`; metrics read `raw`, which holds all of them. A box is a
    dictionary `{"box": [y, x, height, width], "label": ..., "score": ...}`; a true one has no score.
    """

    kind = "boxes"

    def __init__(self, config: BoxesTarget, labels: Sequence[str], typical: Sequence[float]) -> None:
        self.config, self.labels, self.typical = config, list(labels), list(typical)
        self._numbers = {label: number for number, label in enumerate(self.labels)}

    @classmethod
    def fit(cls, config: BoxesTarget, train: Examples) -> BoxesEncoder:
        boxes, labels = _boxes(config, train), {label for each in _labels(config, train) for label in each}
        if not labels:
            raise DataError(f"column {config.column!r} holds no boxes to learn")
        sizes = np.concatenate([each[:, 2:] for each in boxes])
        return cls(config, sorted(labels), np.exp(np.log(sizes).mean(axis=0)).tolist())

    def part(self) -> StrictConfig:
        raise TypeError("boxes lie in an input: use `part_beside`")

    def part_beside(self, inputs: Mapping[str, Encoder]) -> StrictConfig:
        grid = _patches(inputs, self.config.input)
        return DetectHeadConfig(
            stem=self.config.input, height=grid.height, width=grid.width, patch=grid.patch, labels=tuple(self.labels),
            typical=(self.typical[0], self.typical[1]), weight=self.config.weight,
        )  # fmt: skip

    def encode(self, examples: Examples) -> Encoded:
        found = []
        for boxes, labels in zip(_boxes(self.config, examples), _labels(self.config, examples), strict=True):
            numbers = [[self._numbers.get(label, IGNORED)] for label in labels]
            found.append(np.concatenate([boxes, np.asarray(numbers, np.float32).reshape(-1, 1)], axis=1))
        return Ragged(0.0, targets=found)

    def answers(self, answer: Tensor, row: int) -> dict[str, Any]:
        found = [box for box in self._found(answer[row]) if box["score"] >= self.config.threshold]
        places = (", ".join(f"{value:.0f}" for value in box["box"]) for box in found)
        named = (
            f"{box['label']} [{place}] ({box['score']:.0%})" for box, place in zip(found, places, strict=True)
        )
        return {"prediction": found, "text": ", ".join(named) or "nothing"}

    def raw(self, answer: Tensor, row: int, said: Mapping[str, Any]) -> Any:
        return self._found(answer[row])

    def _found(self, patches: Tensor) -> list[dict[str, Any]]:
        """Boxes of one example's `[P, 5 + C]`, best first."""
        there = patches[:, 0].sigmoid()
        share, kind = patches[:, 5:].softmax(dim=1).max(dim=1)
        scores = (there * share).numpy()
        places = np.flatnonzero(scores >= LEAST_SCORE)
        boxes, kinds = patches[:, 1:5].numpy()[places], kind.numpy()[places]
        kept = kept_boxes(boxes, scores[places], kinds, SAME_THING)
        return [
            {"box": [round(float(value), 1) for value in boxes[i]], "label": self.labels[int(kinds[i])],
             "score": float(scores[places[i]])}
            for i in kept
        ]  # fmt: skip

    def truth(self, examples: Examples) -> list[list[dict[str, Any]]]:
        return [
            [{"box": box.tolist(), "label": label} for box, label in zip(boxes, labels, strict=True)]
            for boxes, labels in zip(
                _boxes(self.config, examples), _labels(self.config, examples), strict=True
            )
        ]

    def state(self) -> dict[str, Any]:
        return {"labels": self.labels, "typical": self.typical}

    @classmethod
    def from_state(cls, config: BoxesTarget, state: Mapping[str, Any]) -> BoxesEncoder:
        return cls(config, state["labels"], state["typical"])


def _boxes(config: BoxesTarget, examples: Examples) -> list[np.ndarray]:
    """`[M, 4]` float32 of each example. Errors: `DataError` for what is no box."""
    found = []
    for row, value in enumerate(examples[config.column]):
        try:
            boxes = np.asarray(value, dtype=np.float32)
            boxes = boxes.reshape(0, 4) if boxes.size == 0 and len(value) == 0 else boxes
        except (TypeError, ValueError):
            boxes = np.zeros((1, 0), np.float32)
        right = (
            boxes.ndim == 2
            and boxes.shape[1] == 4
            and bool(np.isfinite(boxes).all() and (boxes[:, 2:] > 0).all())
        )
        require_value(right, config.column, row, value,
                      "must hold a list of boxes [y, x, height, width], height and width above 0")  # fmt: skip
        found.append(boxes)
    return found


def _labels(config: BoxesTarget, examples: Examples) -> list[list[str]]:
    """Classes of each example's boxes. Errors: `DataError` where there are not as many as boxes."""
    found = []
    pairs = zip(examples[config.label_column], examples[config.column], strict=True)
    for row, (value, boxes) in enumerate(pairs):
        right = not isinstance(value, str) and hasattr(value, "__len__") and len(value) == len(boxes)
        require_value(right, config.label_column, row, value,
                      f"must hold a list of classes, one for each of {len(boxes)} boxes")  # fmt: skip
        found.append([str(label) for label in value])
    return found


class MaskEncoder(TargetEncoder):
    """A class for each pixel, from 0 on; in a picture for training, -1 is unknown.

    An answer says each pixel's class, and which share of the picture each class has.
    """

    kind = "mask"

    def __init__(self, config: MaskTarget, classes: int, shape: Sequence[int]) -> None:
        self.config, self.classes, self.shape = config, classes, tuple(shape)

    @classmethod
    def fit(cls, config: MaskTarget, train: Examples) -> MaskEncoder:
        masks = _masks(config, train, None)
        classes = int(masks.max()) + 1
        if classes < 2:
            raise DataError(
                f"column {config.column!r} must hold at least two classes of pixels; got {classes}"
            )
        return cls(config, classes, masks.shape[1:])

    def part(self) -> StrictConfig:
        raise TypeError("a mask lies on an input: use `part_beside`")

    def part_beside(self, inputs: Mapping[str, Encoder]) -> StrictConfig:
        grid = _patches(inputs, self.config.input)
        if (grid.height, grid.width) != self.shape:
            raise DataError(
                f"column {self.config.column!r} must hold masks of the pictures' size, "
                f"{grid.height} x {grid.width}; got {self.shape[0]} x {self.shape[1]}"
            )
        return SegmentHeadConfig(
            stem=self.config.input, height=grid.height, width=grid.width, patch=grid.patch, classes=self.classes,
            channels=grid.channels, refine=self.config.refine, weight=self.config.weight,
        )  # fmt: skip

    def encode(self, examples: Examples) -> Encoded:
        masks = _masks(self.config, examples, self.shape)
        # a class that training never saw counts nowhere
        known = (masks >= 0) & (masks < self.classes)
        return Arrays(targets=np.where(known, masks, IGNORED).astype(np.int64))

    def answers(self, answer: Tensor, row: int) -> dict[str, Any]:
        best = answer[row].argmax(dim=0)
        shares = torch.bincount(best.flatten(), minlength=self.classes) / best.numel()
        named = {str(number): share for number, share in enumerate(shares.tolist())}
        text = ", ".join(f"class {number} {share:.1%}" for number, share in named.items() if share > 0)
        return {"prediction": best.tolist(), "shares": named, "text": text}

    def raw(self, answer: Tensor, row: int, said: Mapping[str, Any]) -> Any:
        return answer[row].argmax(dim=0).numpy()

    def truth(self, examples: Examples) -> np.ndarray:
        return _masks(self.config, examples, self.shape)

    def state(self) -> dict[str, Any]:
        return {"classes": self.classes, "shape": list(self.shape)}

    @classmethod
    def from_state(cls, config: MaskTarget, state: Mapping[str, Any]) -> MaskEncoder:
        return cls(config, state["classes"], state["shape"])


def _masks(config: MaskTarget, examples: Examples, shape: Sequence[int] | None) -> np.ndarray:
    """`[N, H, W]` int64. Errors: `DataError` for other shapes and for what is no whole number."""
    values = examples[config.column]
    found: list[np.ndarray] = []
    for row, value in enumerate(values):
        try:
            mask = np.asarray(value)
            whole = mask.dtype.kind in "iu" and mask.ndim == 2
        except ValueError:
            mask, whole = np.zeros((0, 0)), False
        require_value(whole, config.column, row, value, "must hold [height, width] of whole numbers")
        wanted = tuple(shape) if shape is not None else (found[0].shape if found else mask.shape)
        require_value(mask.shape == wanted, config.column, row, mask.shape, f"must have the shape {wanted}")
        found.append(mask.astype(np.int64))
    if not found:
        return np.zeros((0, *(shape or (1, 1))), np.int64)
    return np.stack(found)
