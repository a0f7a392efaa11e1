"""Linear models: TF-IDF with a support vector machine or logistic regression, and the same over any other inputs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from moekit.config.errors import ConfigError, require
from moekit.config.task import NumberTarget
from moekit.data.examples import Examples
from moekit.evaluate.baselines.base import Answers, Fitted, Problem, numbers, register_baseline
from moekit.evaluate.baselines.labels import (
    agreement,
    best_of,
    class_codes,
    indicator,
    labels_where,
    micro_f1,
    two_sided,
)
from moekit.evaluate.baselines.matrices import SparseMatrix, text_vectorizer

_LIBRARIES = ("scikit-learn",)
Model = Literal["svm", "logistic"]


@register_baseline(
    "tfidf-svm",
    "TF-IDF of words and word pairs with a linear support vector machine (classes) or ridge regression (numbers)",
    reads=("text", "bag"),
    answers=("class", "number"),
    libraries=_LIBRARIES,
)
def tfidf_svm(
    problem: Problem,
    analyzer: str = "word",
    ngrams: Sequence[int] = (1, 2),
    max_features: int | None = None,
    min_count: int = 1,
    grid: Sequence[float] = (0.3, 1.0, 3.0, 10.0),
    refit: bool = False,
) -> Fitted:
    """Fit it.

    Args:
        analyzer: "word" (a Chinese character is a word), "char_wb" (runs of characters inside words) or "char".
        ngrams: shortest and longest run.
        max_features: the most frequent ones that are kept; all where None.
        min_count: a term in fewer texts than this is left out.
        grid: of C, chosen on validation; 1 where there is none. For numbers, 1/C is the ridge penalty.
        refit: fit once more on training and validation examples together when C has been chosen.
    """
    return _text(problem, "svm", analyzer, ngrams, max_features, min_count, grid, refit)


@register_baseline(
    "tfidf-logistic",
    "TF-IDF of words and word pairs with logistic regression: probabilities",
    reads=("text", "bag"),
    answers=("class",),
    libraries=_LIBRARIES,
)
def tfidf_logistic(
    problem: Problem,
    analyzer: str = "word",
    ngrams: Sequence[int] = (1, 2),
    max_features: int | None = 100_000,
    min_count: int = 1,
    grid: Sequence[float] = (1.0, 10.0, 100.0),
    refit: bool = False,
) -> Fitted:
    """Fit it; arguments as of `tfidf_svm`."""
    return _text(problem, "logistic", analyzer, ngrams, max_features, min_count, grid, refit)


@register_baseline(
    "tfidf-char-svm",
    "TF-IDF of runs of 2 to 5 characters inside words with a linear support vector machine",
    reads=("text", "bag"),
    answers=("class", "number"),
    libraries=_LIBRARIES,
)
def tfidf_char_svm(
    problem: Problem,
    ngrams: Sequence[int] = (2, 5),
    max_features: int | None = 300_000,
    min_count: int = 2,
    grid: Sequence[float] = (0.3, 1.0, 3.0, 10.0),
    refit: bool = False,
) -> Fitted:
    """Fit it; arguments as of `tfidf_svm`."""
    return _text(problem, "svm", "char_wb", ngrams, max_features, min_count, grid, refit)


@register_baseline(
    "linear",
    "logistic regression (classes) or ridge regression (numbers) on standardised numbers, categories, ids, pixels, "
    "summaries of sound and TF-IDF",
    reads=("text", "bag", "image", "audio", "fields", "ids"),
    answers=("class", "number"),
    libraries=_LIBRARIES,
)
def linear(problem: Problem, grid: Sequence[float] = (0.01, 0.1, 1.0, 10.0), refit: bool = False) -> Fitted:
    """Fit it; arguments as of `tfidf_svm`."""
    return _fit(problem, "logistic", None, grid, refit, {})


def _text(
    problem: Problem,
    model: Model,
    analyzer: str,
    ngrams: Sequence[int],
    max_features: int | None,
    min_count: int,
    grid: Sequence[float],
    refit: bool,
) -> Fitted:
    require(analyzer in ("word", "char_wb", "char"), "analyzer", analyzer, "must be word, char_wb or char")
    require(len(ngrams) == 2 and 1 <= ngrams[0] <= ngrams[1], "ngrams", list(ngrams),
            "must be two numbers, the shortest and the longest run")  # fmt: skip
    problem = _one_input_a_column(problem)
    vectorizer = text_vectorizer(analyzer, (ngrams[0], ngrams[1]), max_features, min_count)
    told = {"analyzer": analyzer, "ngrams": list(ngrams), "model": model}
    return _fit(problem, model, vectorizer, grid, refit, told)


def _one_input_a_column(problem: Problem) -> Problem:
    """A column that is both text and bag, for a model with a wide path, counts once."""
    columns: dict[str, str] = {}
    for name, given in problem.inputs.items():
        columns.setdefault(given.column, name)  # type: ignore[union-attr]
    kept = {name: problem.inputs[name] for name in columns.values()}
    return Problem(problem.train, problem.validation, kept, problem.name, problem.target, problem.seed)


def _fit(
    problem: Problem,
    model: Model,
    vectorizer: Any | None,
    grid: Sequence[float],
    refit: bool,
    told: dict[str, Any],
) -> Fitted:
    require(all(c > 0 for c in grid), "grid", list(grid), "must hold values above 0")
    make_matrix = SparseMatrix(problem.inputs, vectorizer, problem.train)
    x = make_matrix(problem.train)
    answer: _Answer = (
        _Numbers(problem) if isinstance(problem.target, NumberTarget)
        else _ClassSets(problem, model) if problem.target.multi
        else _Classes(problem, model)
    )  # fmt: skip
    figure = None
    if len(problem.validation):
        held = make_matrix(problem.validation)
        figure = lambda made: answer.figure(made, held)  # noqa: E731
    made, chosen = best_of(list(grid), lambda c: answer.fit(x, answer.y, c), figure, 1.0)
    settings = {**told, "C": chosen.pop("setting"), **chosen, "features": int(x.shape[1])}
    if refit and len(problem.validation):
        both = _joined(problem)
        make_matrix = SparseMatrix(both.inputs, vectorizer, both.train)
        again = type(answer)(both, model)
        made = again.fit(make_matrix(both.train), again.y, settings["C"])
        answer, settings["refit"] = again, True
    return Fitted(lambda examples: answer.answers(made, make_matrix(examples)), settings)


def _joined(problem: Problem) -> Problem:
    columns: dict[str, Any] = {}
    for name, values in problem.train.columns.items():
        more = problem.validation[name]
        arrays = isinstance(values, np.ndarray) and isinstance(more, np.ndarray)
        columns[name] = np.concatenate([values, more]) if arrays else [*values, *more]
    empty = problem.validation.rows([])
    return Problem(Examples(columns), empty, problem.inputs, problem.name, problem.target, problem.seed)


class _Classes:
    """One class of several."""

    def __init__(self, problem: Problem, model: Model = "logistic"):
        self.problem, self.model = problem, model
        self.labels, self.y = class_codes(problem.train[problem.target.column])
        if len(self.labels) < 2:
            raise ConfigError(
                f"targets.{problem.name} has one class ({self.labels[0]!r}) in training; a linear model needs two"
            )

    def fit(self, x: Any, y: np.ndarray, c: float) -> Any:
        return linear_classifier(self.model, c, self.problem.seed).fit(x, y)

    def figure(self, made: Any, x: Any) -> float:
        return agreement(made.predict(x), self.labels, self.problem.validation[self.problem.target.column])

    def answers(self, made: Any, x: Any) -> Answers:
        if x.shape[0] == 0:
            return Answers([], self.labels, np.zeros((0, len(self.labels))), self.model == "logistic")
        if self.model == "logistic":
            found = made.predict_proba(x)
        else:
            found = two_sided(made.decision_function(x))
        values = [self.labels[place] for place in found.argmax(1)]
        return Answers(values, self.labels, found, self.model == "logistic")


class _ClassSets:
    """Any number of classes: a model for each."""

    def __init__(self, problem: Problem, model: Model = "logistic"):
        self.problem, self.model = problem, model
        self.labels, self.y = indicator(problem.train[problem.target.column])
        require(self.labels, f"targets.{problem.name}", [], "must have a class in some training example")

    def fit(self, x: Any, y: np.ndarray, c: float) -> Any:
        from sklearn.dummy import DummyClassifier

        made = []
        for column in y.T:  # a class that all or no examples have is answered as it is
            constant = len(np.unique(column)) == 1
            one = DummyClassifier() if constant else linear_classifier(self.model, c, self.problem.seed)
            made.append(one.fit(x, column))
        return made

    def figure(self, made: Any, x: Any) -> float:
        true = indicator(self.problem.validation[self.problem.target.column], self.labels)[1]
        return micro_f1(np.stack([one.predict(x) for one in made], axis=1), true)

    def answers(self, made: Any, x: Any) -> Answers:
        if x.shape[0] == 0:
            return Answers([], self.labels, np.zeros((0, len(self.labels))), self.model == "logistic")
        chosen = np.stack([one.predict(x) for one in made], axis=1)
        columns = []
        for one, column in zip(made, chosen.T, strict=True):
            if len(one.classes_) < 2:
                columns.append(column.astype(np.float64))
            elif self.model == "logistic":
                columns.append(one.predict_proba(x)[:, 1])
            else:
                columns.append(one.decision_function(x))
        found = np.stack(columns, axis=1)
        return Answers(labels_where(chosen == 1, self.labels), self.labels, found, self.model == "logistic")


class _Numbers:
    """One or several numbers, by ridge regression."""

    def __init__(self, problem: Problem, model: Model = "logistic"):
        self.problem = problem
        self.y = self._table(problem.train)

    def _table(self, examples: Examples) -> np.ndarray:
        return np.stack([numbers(examples[column]) for column in self.problem.target.columns], axis=1)

    def fit(self, x: Any, y: np.ndarray, c: float) -> Any:
        from sklearn.linear_model import Ridge

        # lsqr reads sparse matrices with an intercept and draws nothing at random
        return Ridge(alpha=1 / c, solver="lsqr").fit(x, y)

    def _numbers(self, made: Any, x: Any) -> np.ndarray:
        if x.shape[0] == 0:
            return np.zeros((0, self.y.shape[1]))
        found = made.predict(x).reshape(x.shape[0], -1)
        return found if self.problem.target.bounds is None else np.clip(found, *self.problem.target.bounds)

    def figure(self, made: Any, x: Any) -> float:
        errors = (self._numbers(made, x) - self._table(self.problem.validation)) / np.maximum(
            self.y.std(0), 1e-12
        )
        return -float((errors**2).mean())

    def answers(self, made: Any, x: Any) -> Answers:
        found = self._numbers(made, x)
        return Answers(found[:, 0] if found.shape[1] == 1 else found)


_Answer = _Classes | _ClassSets | _Numbers


def linear_classifier(model: Model, c: float, seed: int) -> Any:
    """A linear classifier of scikit-learn, not fitted yet."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.svm import LinearSVC

    if model == "svm":
        return LinearSVC(C=c, dual="auto", random_state=seed)
    return LogisticRegression(C=c, max_iter=1000)
