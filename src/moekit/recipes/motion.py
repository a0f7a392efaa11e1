"""Only of the recipe motion: what clips tell without a network."""

from __future__ import annotations

import time
from collections import Counter
from typing import Any

import numpy as np

from moekit.config.errors import ConfigError
from moekit.config.task_run import TaskRunConfig
from moekit.data.examples import Examples, TaskData
from moekit.evaluate.task_metrics import score
from moekit.recipes.tasks import Recipe


def baseline(name: str, recipe: Recipe, config: TaskRunConfig, data: TaskData) -> dict[str, Any]:
    """The row of a linear model on the differences of frames, or of phase correlation."""
    ways = {"linear on differences": _linear, "phase correlation": _correlation}
    if name not in ways:
        raise ConfigError(f"recipe {recipe.name} has no baseline {name!r}; known: {', '.join(ways)}")
    (video,) = config.inputs.values()
    (target,) = config.targets.values()
    clips, labels = str(video.column), str(target.column)  # type: ignore[union-attr]
    began = time.perf_counter()
    said = ways[name](data.train, data.test, clips, labels)
    seconds = time.perf_counter() - began
    true = [str(label) for label in data.test[labels]]
    return {
        "scores": {m.key: score(m.metric, said, true, **m.options) for m in recipe.measures},
        "seconds": seconds,
    }


def _linear(train: Examples, test: Examples, clips: str, labels: str) -> list[str]:
    """Logistic regression on the differences of neighbouring frames, pixel by pixel."""
    from sklearn.linear_model import SGDClassifier

    def differences(examples: Examples) -> np.ndarray:
        frames = np.asarray(examples[clips]).astype(np.float32) / 255
        return (frames[:, 1:] - frames[:, :-1]).reshape(len(frames), -1)

    model = SGDClassifier(loss="log_loss", alpha=1e-3, random_state=0)
    model.fit(differences(train), [str(label) for label in train[labels]])
    return [str(label) for label in model.predict(differences(test))]


def _correlation(train: Examples, test: Examples, clips: str, labels: str) -> list[str]:
    """The step between frames by phase correlation, and for each step the label that training has most often.

    Kuglin and Hines 1975. Where what leaves on one side comes in on the other, the step is found exactly; a step
    that training never had gets the label that is most frequent of all.
    """
    seen = [str(label) for label in train[labels]]
    by_step: dict[tuple[int, int], Counter[str]] = {}
    for step, label in zip(steps(np.asarray(train[clips])), seen, strict=True):
        by_step.setdefault(step, Counter())[label] += 1
    most = Counter(seen).most_common(1)[0][0]
    return [
        by_step[step].most_common(1)[0][0] if step in by_step else most
        for step in steps(np.asarray(test[clips]))
    ]


def steps(clips: np.ndarray) -> list[tuple[int, int]]:
    """By how many pixels (down, right) each clip `[N, frames, H, W]` moves from frame to frame.

    >>> frame = np.zeros((8, 8)); frame[1:3, 2:5] = 9
    >>> steps(np.stack([frame, np.roll(frame, (2, -1), (0, 1))])[None])
    [(2, -1)]
    """
    found = []
    for clip in clips:
        spectra = np.fft.fft2(clip.astype(np.float64))
        cross = spectra[1:] * np.conj(spectra[:-1])
        size = np.abs(cross)
        whitened = np.divide(cross, size, out=np.zeros_like(cross), where=size > 1e-9)
        peaks = np.fft.ifft2(whitened).real.sum(axis=0)
        height, width = peaks.shape
        down, right = divmod(int(peaks.argmax()), width)
        found.append((down - height * (down > height // 2), right - width * (right > width // 2)))
    return found
