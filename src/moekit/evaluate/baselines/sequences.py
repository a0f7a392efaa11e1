"""Sequences of frames as the field classified them before neural networks: by time warping and by Markov models.

Both through sequentia, which calls dtaidistance and hmmlearn; frames are standardised by the training frames.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from moekit.config.errors import ConfigError, DataError, require
from moekit.data.examples import Examples
from moekit.evaluate.baselines.base import Answers, Fitted, Problem, register_baseline
from moekit.evaluate.baselines.labels import agreement, best_of, class_codes
from moekit.evaluate.baselines.matrices import frames_of

_LIBRARIES = ("sequentia", "dtaidistance", "hmmlearn")


@register_baseline(
    "dtw-nearest",
    "the k nearest training sounds, whose frames may be stretched in time (dynamic time warping)",
    reads=("audio",),
    answers=("class",),
    libraries=_LIBRARIES,
)
def dtw_nearest(problem: Problem, grid: Sequence[int] = (1, 3, 5, 10), window: float = 1.0) -> Fitted:
    """Fit it.

    Args:
        grid: of k, chosen on validation; the first where there is none. Of classes with equally many neighbours the one
            of the nearest wins.
        window: the share of the shorter sound by which frames may be moved.
    """
    from sequentia.models import KNNClassifier

    require(grid and all(k >= 1 for k in grid), "grid", list(grid), "must hold numbers from 1")
    labels, y, frames = _learnt(problem)
    most = min(max(grid), len(problem.train))
    model = KNNClassifier(k=most, window=window, random_state=problem.seed)
    x, lengths = frames(problem.train)
    model.fit(x, y, lengths=lengths)

    def classes_of_neighbours(examples: Examples) -> np.ndarray:
        """`[n, most]`, the nearest one first."""
        found, lengths = frames(examples)
        distances = model.compute_distance_matrix(found, lengths=lengths)
        return y[np.argsort(distances, axis=1, kind="stable")[:, :most]]

    figure = None
    if len(problem.validation):
        held, column = classes_of_neighbours(problem.validation), problem.validation[problem.target.column]
        figure = lambda k: agreement(_most_frequent(held[:, :k]), labels, column)  # noqa: E731
    k, chosen = best_of([k for k in grid if k <= most] or [most], lambda k: k, figure, min(grid[0], most))

    def predict(examples: Examples) -> Answers:
        if len(examples) == 0:
            return Answers([], labels, np.zeros((0, len(labels))), True)
        near = classes_of_neighbours(examples)[:, :k]
        shares = (near[:, :, None] == np.arange(len(labels))).mean(1)
        return Answers([labels[place] for place in _most_frequent(near)], labels, shares, True)

    return Fitted(predict, {"k": chosen.pop("setting"), "window": window, **chosen})


def _most_frequent(near: np.ndarray) -> np.ndarray:
    """`[n]`: the class that each row of `[n, k]` holds most often, of equal ones that which comes first."""
    counts = (near[:, :, None] == near[:, None, :]).sum(2)
    return near[np.arange(len(near)), counts.argmax(1)]


@register_baseline(
    "hmm",
    "a hidden Markov model of each class, from left to right with mixtures of Gaussians, and Bayes' rule",
    reads=("audio",),
    answers=("class",),
    libraries=_LIBRARIES,
)
def hidden_markov_models(problem: Problem, grid: Sequence[int] = (3, 5, 8), components: int = 3) -> Fitted:
    """Fit it.

    Args:
        grid: of the states of each model, chosen on validation; 5 where there is none.
        components: Gaussians of each state, with diagonal covariance.
    """
    from sequentia.models import GaussianMixtureHMM, HMMClassifier

    for name, values in {"grid": grid, "components": [components]}.items():
        require(
            values and all(value >= 1 for value in values), name, list(values), "must hold numbers from 1"
        )
    labels, y, frames = _learnt(problem)
    x, lengths = frames(problem.train)

    def make(states: int) -> Any:
        """A model, with a single Gaussian for a state where there are too few frames for several; None without any."""
        for n in dict.fromkeys((components, 1)):
            settings = {
                "n_states": states, "n_components": n, "covariance": "diag", "random_state": problem.seed,
            }  # fmt: skip
            model = HMMClassifier(variant=GaussianMixtureHMM, model_kwargs=settings, prior="frequency")
            with np.errstate(all="ignore"):  # what did not converge is seen by its numbers
                model.fit(x, y, lengths=lengths)
            if all(_is_finite(one.model) for one in model.models.values()):
                return model
        return None

    figure = None
    if len(problem.validation):
        held, held_lengths = frames(problem.validation)
        column = problem.validation[problem.target.column]
        figure = lambda made: agreement(made.predict(held, lengths=held_lengths), labels, column)  # noqa: E731
    fitted = {states: made for states in (grid if figure else (5,)) if (made := make(states)) is not None}
    if not fitted:
        raise DataError(
            f"{len(y)} sounds of {len(labels)} classes are too few for a hidden Markov model of each: give more, "
            "or take the baseline dtw-nearest"
        )
    model, chosen = best_of(list(fitted), fitted.__getitem__, figure, 5)

    def predict(examples: Examples) -> Answers:
        if len(examples) == 0:
            return Answers([], labels, np.zeros((0, len(labels))), True)
        found, lengths = frames(examples)
        scores = model.predict_scores(found, lengths=lengths)
        return Answers([labels[place] for place in scores.argmax(1)], labels, scores)

    return Fitted(predict, {"states": chosen.pop("setting"), "components": components, **chosen})


def _is_finite(model: Any) -> bool:
    """Whether a fit came to numbers: with few frames, those of a state may run out."""
    parts = (model.startprob_, model.transmat_, model.means_, model.covars_, model.weights_)
    return all(bool(np.isfinite(part).all()) for part in parts)


def _learnt(problem: Problem) -> tuple[tuple[Any, ...], np.ndarray, Any]:
    """The labels, the training examples' places in them, and what makes frames and lengths of examples."""
    columns = [given.column for given in problem.inputs.values()]  # type: ignore[union-attr]
    if len(columns) != 1 or problem.target.multi:
        raise ConfigError(
            f"sequences are classified by one sound into one class; got the columns {', '.join(columns)}"
            f"{', and targets.' + problem.name + '.multi is true' if problem.target.multi else ''}"
        )
    labels, y = class_codes(problem.train[problem.target.column])
    if len(labels) < 2:
        raise ConfigError(f"targets.{problem.name} has one class ({labels[0]!r}) in training; two are needed")
    table = np.concatenate([frames_of(item) for item in problem.train[columns[0]]])
    mean, deviation = table.mean(0), np.maximum(table.std(0), 1e-12)

    def frames(examples: Examples) -> tuple[np.ndarray, np.ndarray]:
        """(all frames `[sum of T, N]`, one sound after the other; the lengths)."""
        items = [(frames_of(item) - mean) / deviation for item in examples[columns[0]]]
        return np.concatenate(items), np.asarray([len(item) for item in items])

    return labels, y, frames
