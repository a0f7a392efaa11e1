"""The least that a model must beat: the most frequent class, the mean, the most frequent tag of each word."""

from __future__ import annotations

from collections import Counter, defaultdict
from typing import Any

import numpy as np

from moekit.config.task import ClassTarget, NumberTarget
from moekit.data.examples import Examples
from moekit.evaluate.baselines.base import Answers, Fitted, Problem, numbers, register_baseline
from moekit.evaluate.baselines.labels import class_codes
from moekit.evaluate.baselines.words import tagged_words, words_of

_ALL = ("text", "words", "bag", "image", "audio", "fields", "ids")


@register_baseline(
    "majority",
    "the most frequent class (or set of classes), the mean of the numbers, the most frequent tag of each word",
    reads=_ALL,
    answers=("class", "number", "tags"),
    libraries=("numpy",),
)
def majority(problem: Problem) -> Fitted:
    """Fit it; ties go to the label that sorts first."""
    target = problem.target
    if isinstance(target, ClassTarget):
        return _classes(problem)
    if isinstance(target, NumberTarget):
        means = np.asarray([numbers(problem.train[column]).mean() for column in target.columns])
        if target.bounds is not None:
            means = np.clip(means, *target.bounds)

        def predict(examples: Examples) -> Answers:
            values = np.tile(means, (len(examples), 1))
            return Answers(values[:, 0] if len(means) == 1 else values)

        return Fitted(predict, {"means": means.tolist()})
    return _tags(problem)


def _classes(problem: Problem) -> Fitted:
    column = problem.train[problem.target.column]
    if problem.target.multi:
        sets = Counter(tuple(sorted(set(value), key=str)) for value in column)
        best: list[Any] = list(min(sets, key=lambda labels: (-sets[tuple(labels)], str(labels))))
        return Fitted(lambda examples: Answers([list(best) for _ in range(len(examples))]), {"labels": best})
    labels, codes = class_codes(column)
    shares = np.bincount(codes, minlength=len(labels)) / len(codes)
    label = labels[int(shares.argmax())]

    def predict(examples: Examples) -> Answers:
        rows = np.tile(shares, (len(examples), 1))
        return Answers([label] * len(examples), labels, rows, probabilistic=True)

    return Fitted(predict, {"label": label, "share": float(shares.max())})


def _tags(problem: Problem) -> Fitted:
    column, unit = tagged_words(problem)
    counts: dict[str, Counter[Any]] = defaultdict(Counter)
    overall: Counter[Any] = Counter()
    for text, tags in zip(problem.train[column], problem.train[problem.target.column], strict=True):
        for word, tag in zip(words_of(text, unit), tags, strict=True):
            counts[word][tag] += 1
            overall[tag] += 1
    default = _first(overall)
    best = {word: _first(found) for word, found in counts.items()}

    def predict(examples: Examples) -> Answers:
        return Answers(
            [[best.get(word, default) for word in words_of(text, unit)] for text in examples[column]]
        )

    return Fitted(predict, {"words": len(best), "tag of other words": default})


def _first(counts: Counter[Any]) -> Any:
    return min(counts, key=lambda tag: (-counts[tag], str(tag)))
