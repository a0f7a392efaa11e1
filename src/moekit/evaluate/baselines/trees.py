"""Gradient-boosted trees and nearest neighbours."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from typing import Any

import numpy as np

from moekit.config.errors import ConfigError, require
from moekit.config.task import NumberTarget
from moekit.data.examples import Examples
from moekit.evaluate.baselines.base import Answers, Fitted, Problem, numbers, register_baseline
from moekit.evaluate.baselines.labels import agreement, best_of, class_codes, plain
from moekit.evaluate.baselines.matrices import SparseMatrix, TreeMatrix


@register_baseline(
    "boosting",
    "histogram gradient boosting on numbers, categories, ids, pixels and summaries of sound",
    reads=("image", "audio", "fields", "ids"),
    answers=("class", "number"),
    libraries=("scikit-learn",),
)
def boosting(
    problem: Problem,
    rounds: int = 300,
    rate: float = 0.1,
    grid: Sequence[int] = (7, 31),
) -> Fitted:
    """Fit it.

    Args:
        rounds: trees at most (for each class, or each number); the loss on validation says how many are kept. A third
            of them where there is none.
        rate: learning rate.
        grid: of the leaves of a tree, chosen on validation; 31 where there is none.
    """
    _one_label(problem, "boosting")
    matrix = TreeMatrix(problem.inputs, problem.train)
    if isinstance(problem.target, NumberTarget):
        return _boosted_numbers(problem, matrix, rounds, rate, grid)
    from sklearn.ensemble import HistGradientBoostingClassifier

    column = problem.target.column
    labels, y = class_codes(problem.train[column])
    _two_classes(problem, labels)
    x = matrix(problem.train)
    held = matrix(problem.validation) if len(problem.validation) else None

    def make(leaves: int) -> tuple[Any, int, float]:
        model = _booster(HistGradientBoostingClassifier, problem, matrix, rounds, rate, leaves, held is None)
        model.fit(x, y)
        if held is None:
            return model, int(model.n_iter_), 0.0
        # by the loss: of few examples, many numbers of rounds get equally many right, and the first is too early
        losses, right = [], []
        for step in model.staged_predict_proba(held):
            losses.append(_loss(step, labels, problem.validation[column]))
            right.append(agreement(step.argmax(1), labels, problem.validation[column]))
        kept = int(np.argmin(losses))
        return model, kept + 1, right[kept]

    (model, kept, _), chosen = best_of(
        list(grid), make, (lambda made: made[2]) if held is not None else None, 31
    )

    def predict(examples: Examples) -> Answers:
        if len(examples) == 0:
            return Answers([], labels, np.zeros((0, len(labels))), True)
        probs = next(islice(model.staged_predict_proba(matrix(examples)), kept - 1, None))
        return Answers([labels[place] for place in probs.argmax(1)], labels, probs, True)

    return Fitted(predict, {"leaves": chosen.pop("setting"), "rounds": kept, "rate": rate, **chosen})


def _loss(probs: np.ndarray, labels: Sequence[Any], column: Any) -> float:
    """Mean of -log of the probability of each example's label; one that training never saw counts for nothing."""
    places = {label: place for place, label in enumerate(labels)}
    known = [(row, places[plain(value)]) for row, value in enumerate(column) if plain(value) in places]
    rows, columns = np.asarray(known, dtype=np.int64).reshape(-1, 2).T
    return float(-np.log(np.maximum(probs[rows, columns], 1e-12)).mean()) if len(rows) else 0.0


def _boosted_numbers(
    problem: Problem, matrix: TreeMatrix, rounds: int, rate: float, grid: Sequence[int]
) -> Fitted:
    from sklearn.ensemble import HistGradientBoostingRegressor

    x = matrix(problem.train)
    held = matrix(problem.validation) if len(problem.validation) else None
    models, settings = [], {}
    for column in problem.target.columns:
        y = numbers(problem.train[column])
        true = numbers(problem.validation[column]) if held is not None else None

        # the loop's values are bound as defaults: the function lives for one round only, but so it is plain
        def make(leaves: int, y: np.ndarray = y, true: Any = true) -> tuple[Any, int, float]:
            model = _booster(
                HistGradientBoostingRegressor, problem, matrix, rounds, rate, leaves, true is None
            )
            model.fit(x, y)
            if true is None:
                return model, int(model.n_iter_), 0.0
            errors = [float(((step - true) ** 2).mean()) for step in model.staged_predict(held)]
            return model, int(np.argmin(errors)) + 1, -min(errors)

        (model, kept, _), chosen = best_of(
            list(grid), make, (lambda made: made[2]) if held is not None else None, 31
        )
        models.append((model, kept))
        settings[column] = {"leaves": chosen.pop("setting"), "rounds": kept, "rate": rate, **chosen}

    def predict(examples: Examples) -> Answers:
        table = matrix(examples)
        if len(examples) == 0:
            found = np.zeros((0, len(models)))
        else:
            steps = [next(islice(model.staged_predict(table), kept - 1, None)) for model, kept in models]
            found = np.stack(steps, axis=1)
        if problem.target.bounds is not None:
            found = np.clip(found, *problem.target.bounds)
        return Answers(found[:, 0] if len(models) == 1 else found)

    return Fitted(predict, settings)


def _booster(
    kind: Any, problem: Problem, matrix: TreeMatrix, rounds: int, rate: float, leaves: int, blind: bool
) -> Any:
    """A booster that makes all its rounds: how many count is chosen on validation, not on a part of training."""
    require(rounds >= 1, "rounds", rounds, "must be at least 1")
    return kind(
        max_iter=max(rounds // 3, 1) if blind else rounds,
        learning_rate=rate,
        max_leaf_nodes=leaves,
        categorical_features=matrix.categorical,
        early_stopping=False,
        random_state=problem.seed,
    )


@register_baseline(
    "nearest",
    "the k nearest training examples in the space of the linear baseline",
    reads=("text", "bag", "image", "audio", "fields", "ids"),
    answers=("class", "number"),
    libraries=("scikit-learn",),
)
def nearest_neighbours(problem: Problem, grid: Sequence[int] = (1, 3, 5, 10, 20)) -> Fitted:
    """Fit it: `grid` of k, chosen on validation, 5 where there is none; nearer ones weigh more."""
    from sklearn.neighbors import KNeighborsClassifier, KNeighborsRegressor

    _one_label(problem, "nearest")
    matrix = SparseMatrix(problem.inputs, None, problem.train)
    x = matrix(problem.train)
    held = matrix(problem.validation) if len(problem.validation) else None
    target = problem.target
    fits = [k for k in grid if k <= len(problem.train)] or [1]
    default = min(5, len(problem.train))
    if isinstance(target, NumberTarget):
        table = np.stack([numbers(problem.train[column]) for column in target.columns], axis=1)

        def error(made: Any) -> float:
            true = np.stack([numbers(problem.validation[column]) for column in target.columns], axis=1)
            return -float((((made.predict(held) - true) / np.maximum(table.std(0), 1e-12)) ** 2).mean())

        made, chosen = best_of(
            fits, lambda k: KNeighborsRegressor(k, weights="distance").fit(x, table),
            error if held is not None else None, default,
        )  # fmt: skip

        def predict_numbers(examples: Examples) -> Answers:
            found = made.predict(matrix(examples)) if len(examples) else np.zeros((0, table.shape[1]))
            if target.bounds is not None:
                found = np.clip(found, *target.bounds)
            return Answers(found[:, 0] if table.shape[1] == 1 else found)

        return Fitted(predict_numbers, {"k": chosen.pop("setting"), **chosen})

    labels, y = class_codes(problem.train[target.column])
    made, chosen = best_of(
        fits, lambda k: KNeighborsClassifier(k, weights="distance").fit(x, y),
        (lambda made: agreement(made.predict(held), labels, problem.validation[target.column]))
        if held is not None else None,
        default,
    )  # fmt: skip

    def predict(examples: Examples) -> Answers:
        if len(examples) == 0:
            return Answers([], labels, np.zeros((0, len(labels))), True)
        probs = made.predict_proba(matrix(examples))
        return Answers([labels[place] for place in probs.argmax(1)], labels, probs, True)

    return Fitted(predict, {"k": chosen.pop("setting"), **chosen})


def _one_label(problem: Problem, name: str) -> None:
    if not isinstance(problem.target, NumberTarget) and problem.target.multi:
        raise ConfigError(
            f"baseline {name!r} answers one class; targets.{problem.name}.multi is true. Take 'linear' or 'tfidf-svm'"
        )


def _two_classes(problem: Problem, labels: Sequence[Any]) -> None:
    if len(labels) < 2:
        raise ConfigError(
            f"targets.{problem.name} has one class ({labels[0]!r}) in training; boosting needs two"
        )
