"""Two classifiers of sentiment that are known by their names: VADER for English, SnowNLP's for Chinese.

Hutto and Gilbert 2014, "VADER: A Parsimonious Rule-based Model for Sentiment Analysis of Social Media Text",
https://doi.org/10.1609/icwsm.v8i1.14550. SnowNLP: https://pypi.org/project/snownlp/
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from moekit.config.errors import require
from moekit.data.examples import Examples
from moekit.evaluate.baselines.base import Answers, Fitted, Problem, register_baseline
from moekit.evaluate.baselines.labels import agreement, best_of, class_codes

Score = Callable[[str], float]


@register_baseline(
    "vader",
    "VADER's own scores, by a lexicon of English and rules; which of two classes is the positive one, and from which "
    "score, is all that is learnt",
    reads=("text", "bag"),
    answers=("class",),
    libraries=("vaderSentiment",),
)
def vader(problem: Problem, grid: Sequence[float] = (0.05, 0.0, -0.05)) -> Fitted:
    """Fit it.

    Args:
        grid: scores from which a text is positive, chosen on validation, and the first where there is none: the bounds
            of "positive" and "negative" that its authors give, and the middle.
    """
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    known = SentimentIntensityAnalyzer()
    labels, codes, column = _two_classes(problem)

    def score(text: str) -> float:
        return float(known.polarity_scores(text)["compound"])

    of_train = _scores(problem.train[column], score)
    turned = of_train[codes == 0].mean() > of_train[codes == 1].mean()
    of_held = _scores(problem.validation[column], score)

    def codes_from(scores: np.ndarray, border: float) -> np.ndarray:
        return ((scores >= border) != turned).astype(np.int64)

    figure = None
    if len(of_held):
        held = problem.validation[problem.target.column]
        figure = lambda border: agreement(codes_from(of_held, border), labels, held)  # noqa: E731
    border, chosen = best_of(list(grid), lambda value: value, figure, grid[0])

    def predict(examples: Examples) -> Answers:
        scores = _scores(examples[column], score)
        sure = -scores if turned else scores
        found = codes_from(scores, border)
        return Answers([labels[code] for code in found], labels, np.stack([-sure, sure], axis=1))

    settings = {"positive": labels[0 if turned else 1], "from": chosen.pop("setting"), **chosen}
    return Fitted(predict, settings)


@register_baseline(
    "snownlp",
    "SnowNLP's classifier of Chinese, naive Bayes over its own words, trained anew on the training examples",
    reads=("text", "bag"),
    answers=("class",),
    libraries=("snownlp",),
)
def snownlp(problem: Problem) -> Fitted:
    """Fit it; what the package ships was trained on texts that may be among the test's, and is not used."""
    from snownlp.sentiment import Sentiment

    labels, codes, column = _two_classes(problem)
    texts = [_text(value) for value in problem.train[column]]
    model = Sentiment()
    model.train(*([text for text, code in zip(texts, codes, strict=True) if code == kind] for kind in (0, 1)))

    def predict(examples: Examples) -> Answers:
        probs = np.asarray([model.classify(_text(value)) for value in examples[column]])
        values = [labels[int(prob > 0.5)] for prob in probs]
        return Answers(values, labels, np.stack([1 - probs, probs], axis=1), probabilistic=True)

    return Fitted(predict, {"n_texts": len(texts)})


def _two_classes(problem: Problem) -> tuple[tuple[Any, ...], np.ndarray, str]:
    """Labels, the place of each training example's, and the column of the texts."""
    columns = list(dict.fromkeys(given.column for given in problem.inputs.values()))  # type: ignore[union-attr]
    require(len(columns) == 1, "inputs", columns, "must read one column for a baseline of sentiment")
    require(
        not problem.target.multi,
        f"targets.{problem.name}.multi",
        True,
        "must be false for a baseline of sentiment",
    )
    labels, codes = class_codes(problem.train[problem.target.column])
    require(
        len(labels) == 2,
        f"targets.{problem.name}",
        list(labels),
        "must have two classes for a baseline of sentiment",
    )
    return labels, codes, columns[0]


def _text(value: Any) -> str:
    return "" if value is None else value if isinstance(value, str) else " ".join(value)


def _scores(values: Sequence[Any] | np.ndarray, score: Score) -> np.ndarray:
    return np.asarray([score(_text(value)) for value in values], dtype=np.float64)
