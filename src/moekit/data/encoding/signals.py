"""Columns of images and of sound."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moekit.config.errors import DataError
from moekit.config.task import AudioInput, FrameStemConfig, ImageInput, PatchStemConfig
from moekit.data.encoding.base import Continuous, Encoded, Encoder, filled, pixels_of, require_value
from moekit.data.examples import Examples


class ImageEncoder(Encoder):
    """Images `[N, H, W, C]` of bytes or numbers, to channels first, standardised by the training images."""

    kind = "image"

    def __init__(
        self, config: ImageInput, shape: Sequence[int], means: Sequence[float], deviations: Sequence[float]
    ) -> None:
        self.config, self.shape = config, tuple(shape)
        self.means, self.deviations = list(means), list(deviations)
        self.mean, self.deviation = np.asarray(means, np.float32), np.asarray(deviations, np.float32)

    @classmethod
    def fit(cls, config: ImageInput, train: Examples) -> ImageEncoder:
        images = stacked_images(train, config.column, None)
        sample = images[:: max(1, len(images) // 5000)].astype(np.float32)
        means = sample.mean(axis=(0, 1, 2))
        deviations = np.maximum(sample.std(axis=(0, 1, 2)), 1e-6)
        return cls(config, images.shape[1:], means.tolist(), deviations.tolist())

    def part(self) -> PatchStemConfig:
        height, width, channels = self.shape
        return PatchStemConfig.from_dict(
            {"channels": channels, "height": height, "width": width, "patch": self.config.patch,
             "convolutions": self.config.convolutions, "pools": self.config.pools}, where="model.stems"
        )  # fmt: skip

    def encode(self, examples: Examples) -> Encoded:
        return _Images(stacked_images(examples, self.config.column, self.shape), self)

    def state(self) -> dict[str, Any]:
        return {"shape": list(self.shape), "means": self.means, "deviations": self.deviations}

    @classmethod
    def from_state(cls, config: ImageInput, state: Mapping[str, Any]) -> ImageEncoder:
        return cls(config, state["shape"], state["means"], state["deviations"])


class _Images(Encoded):
    """Images kept as they came; a batch is standardised, and in training moved and mirrored."""

    def __init__(self, images: np.ndarray, encoder: ImageEncoder) -> None:
        self.images, self.encoder = images, encoder

    def __len__(self) -> int:
        return len(self.images)

    def batch(self, rows: np.ndarray, rng: np.random.Generator | None = None) -> dict[str, Tensor]:
        config = self.encoder.config
        images = self.images[rows]
        if rng is not None and config.shift:
            images = _moved(images, rng, config.shift)
        if rng is not None and config.flip:
            mirrored = rng.random(len(images)) < 0.5
            images = np.where(mirrored[:, None, None, None], images[:, :, ::-1], images)
        pixels = (images.astype(np.float32) - self.encoder.mean) / self.encoder.deviation
        if rng is not None and config.erase:
            pixels[_squares(images.shape, rng, config.erase)] = 0.0
        return {"pixels": torch.from_numpy(np.ascontiguousarray(pixels.transpose(0, 3, 1, 2)))}

    def continuous(self, valid_range: tuple[float, float] | None = None) -> Continuous:
        return pixels_of(self.images, "pixels", self.encoder.mean, self.encoder.deviation, valid_range)


def _moved(images: np.ndarray, rng: np.random.Generator, most: int) -> np.ndarray:
    """Images `[B, H, W, C]`, each moved by up to `most` pixels; what comes in is what stands at the border."""
    n, height, width, _ = images.shape
    padded = np.pad(images, ((0, 0), (most, most), (most, most), (0, 0)), mode="edge")
    down, right = rng.integers(0, 2 * most + 1, size=(2, n))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (height, width), axis=(1, 2))
    return windows[np.arange(n), down, right].transpose(0, 2, 3, 1)


def _squares(shape: tuple[int, ...], rng: np.random.Generator, side: int) -> np.ndarray:
    """`[B, H, W]`: True in a square of each image whose middle lies anywhere (DeVries and Taylor 2017, Cutout)."""
    n, height, width, _ = shape
    tops, lefts = rng.integers(0, height, n) - side // 2, rng.integers(0, width, n) - side // 2
    rows, columns = np.arange(height) - tops[:, None], np.arange(width) - lefts[:, None]
    inside_rows, inside_columns = (rows >= 0) & (rows < side), (columns >= 0) & (columns < side)
    return inside_rows[:, :, None] & inside_columns[:, None, :]


def stacked_images(examples: Examples, column: str, shape: Sequence[int] | None) -> np.ndarray:
    """A column of images as `[N, H, W, C]`. Errors: `DataError` for other shapes, or another than is wanted."""
    values = examples[column]
    if not isinstance(values, np.ndarray) or values.dtype == object:
        values = [np.asarray(value) for value in values]
        for row, value in enumerate(values):
            require_value(value.shape == values[0].shape, column, row, value.shape,
                          f"every image must have the shape of the first one, {values[0].shape}")  # fmt: skip
        values = np.stack(values) if values else np.zeros((0, *(shape or (1, 1, 1))), np.float32)
    if values.ndim == 3:
        values = values[..., None]
    if values.ndim != 4:
        raise DataError(
            f"column {column!r} must hold images [height, width, channels]; got {values.shape[1:]}"
        )
    if shape is not None and len(values) and values.shape[1:] != tuple(shape):
        raise DataError(
            f"column {column!r} must hold images of shape {tuple(shape)}, as in training; got {values.shape[1:]}"
        )
    return values


class AudioEncoder(Encoder):
    """Frames of features `[T, N]` of each example, their changes where wanted, standardised by the training frames.

    N features become (1 + deltas) · N.
    """

    kind = "audio"

    def __init__(self, config: AudioInput, means: Sequence[float], deviations: Sequence[float]) -> None:
        self.config, self.means, self.deviations = config, list(means), list(deviations)
        self.mean, self.deviation = np.asarray(means, np.float32), np.asarray(deviations, np.float32)

    @classmethod
    def fit(cls, config: AudioInput, train: Examples) -> AudioEncoder:
        frames = _frames(train, config.column, None)
        table = np.concatenate([with_deltas(item, config.deltas) for item in frames])
        deviations = np.maximum(table.std(axis=0), 1e-6)
        return cls(config, table.mean(axis=0).tolist(), deviations.tolist())

    def part(self) -> FrameStemConfig:
        return FrameStemConfig(n_features=len(self.means), stride=self.config.stride)

    def encode(self, examples: Examples) -> Encoded:
        config = self.config
        frames = _frames(examples, config.column, len(self.means) // (1 + config.deltas))
        standard = [
            ((with_deltas(item[: config.max_len], config.deltas) - self.mean) / self.deviation).astype(
                np.float32
            )
            for item in frames
        ]
        return _Sounds(standard, config)

    def state(self) -> dict[str, Any]:
        return {"means": self.means, "deviations": self.deviations}

    @classmethod
    def from_state(cls, config: AudioInput, state: Mapping[str, Any]) -> AudioEncoder:
        return cls(config, state["means"], state["deviations"])


def with_deltas(frames: np.ndarray, order: int) -> np.ndarray:
    """Frames `[T, N]` with their slopes over five frames behind them, and with order 2 the slopes of these.

    The slope is that of least squares, as in the Hidden Markov Model Toolkit; frames beyond an end are equal to it.

    >>> with_deltas(np.array([[0.0], [1.0], [2.0], [3.0], [4.0]]), 1)[2].tolist()
    [2.0, 1.0]
    """
    parts = [frames]
    for _ in range(order):
        n = len(frames)
        padded = np.pad(parts[-1], ((2, 2), (0, 0)), mode="edge")
        near, far = padded[3 : n + 3] - padded[1 : n + 1], padded[4 : n + 4] - padded[:n]
        parts.append((near + 2 * far) / 10)
    return np.concatenate(parts, axis=1)


class _Sounds(Encoded):
    """Standardised frames; in training stretched, masked (Park et al. 2019, SpecAugment) and with noise."""

    def __init__(self, frames: list[np.ndarray], config: AudioInput) -> None:
        self.frames, self.config = frames, config
        self.lengths = np.asarray([len(item) for item in frames], dtype=np.int64)

    def __len__(self) -> int:
        return len(self.frames)

    def batch(self, rows: np.ndarray, rng: np.random.Generator | None = None) -> dict[str, Tensor]:
        items = [self.frames[i] for i in rows]
        if rng is not None:
            assert self.lengths is not None
            longest = int(self.lengths.max())
            items = [_altered(item, self.config, longest, rng) for item in items]
        lengths = torch.tensor([len(item) for item in items])
        return {"frames": torch.from_numpy(filled(items, 0.0)), "lengths": lengths}

    def continuous(self, valid_range: tuple[float, float] | None = None) -> Continuous:
        return Continuous("frames", torch.ones(1), lengths="lengths")


def _altered(frames: np.ndarray, config: AudioInput, longest: int, rng: np.random.Generator) -> np.ndarray:
    """Frames `[T, N]` as training sees them, at most `longest`."""
    if config.stretch:
        wanted = len(frames) * np.exp(rng.uniform(-1, 1) * np.log1p(config.stretch))
        places = np.linspace(0, len(frames) - 1, min(max(round(wanted), 1), longest))
        before = places.astype(np.int64)
        share = (places - before)[:, None].astype(np.float32)
        after = np.minimum(before + 1, len(frames) - 1)
        frames = frames[before] * (1 - share) + frames[after] * share
    if config.jitter:
        frames = frames + rng.normal(0.0, config.jitter, frames.shape).astype(np.float32)
    masks = [config.mask_frames, config.mask_features]
    if any(masks):
        frames = frames.copy()
        for axis, most in enumerate(masks):
            size = int(rng.integers(0, min(most, frames.shape[axis] - 1) + 1))
            start = int(rng.integers(0, frames.shape[axis] - size + 1))
            blank = slice(start, start + size)
            frames[(blank, slice(None)) if axis == 0 else (slice(None), blank)] = 0.0
    return frames


def _frames(examples: Examples, column: str, n_features: int | None) -> list[np.ndarray]:
    found: list[np.ndarray] = []
    for row, value in enumerate(examples[column]):
        item = np.asarray(value, dtype=np.float32)
        require_value(
            item.ndim == 2 and len(item) > 0, column, row, item.shape, "must hold frames [time, features]"
        )
        wanted = n_features if n_features is not None else (found[0].shape[1] if found else item.shape[1])
        require_value(
            item.shape[1] == wanted, column, row, item.shape, f"must have {wanted} features in each frame"
        )
        found.append(item)
    if not found:
        raise DataError(f"column {column!r} holds no examples")
    return found
