"""A conditional random field over the usual features of words, or of characters for writing without spaces."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Sequence

from moekit.config.errors import DataError, require
from moekit.data.examples import Examples
from moekit.evaluate.baselines.base import Answers, Fitted, Problem, register_baseline
from moekit.evaluate.baselines.labels import best_of
from moekit.evaluate.baselines.words import tagged_words, words_of

_START, _END = "<s>", "</s>"


@register_baseline(
    "crf",
    "a linear-chain conditional random field: words with affixes and shape, or characters, in a window of five",
    reads=("text", "words"),
    answers=("tags",),
    libraries=("sklearn-crfsuite",),
)
def crf(
    problem: Problem,
    grid: Sequence[tuple[float, float]] = ((0.1, 0.1), (0.01, 0.01)),
    iterations: int = 100,
    min_count: int = 0,
) -> Fitted:
    """Fit it by L-BFGS.

    Args:
        grid: of (c1, c2), the weights of the absolute and the squared penalty, chosen on validation by the share of
            right tags; (0.1, 0.1) where there is none.
        iterations: of the optimiser, at most.
        min_count: features seen less often are left out.
    """
    import sklearn_crfsuite

    require(all(c1 >= 0 and c2 >= 0 for c1, c2 in grid), "grid", list(grid), "must hold pairs of at least 0")
    column, unit = tagged_words(problem)
    x, y = _tagged(problem.train, column, unit, problem.target.column, "training")
    held, true = _tagged(problem.validation, column, unit, problem.target.column, "validation")

    def make(penalties: tuple[float, float]) -> sklearn_crfsuite.CRF:
        model = sklearn_crfsuite.CRF(
            algorithm="lbfgs", c1=penalties[0], c2=penalties[1], max_iterations=iterations, min_freq=min_count
        )
        return model.fit(x, y)

    def right(model: sklearn_crfsuite.CRF) -> float:
        pairs = [(a, b) for found, tags in zip(model.predict(held), true, strict=True)
                 for a, b in zip(found, tags, strict=True)]  # fmt: skip
        return sum(a == b for a, b in pairs) / max(len(pairs), 1)

    pairs = [(float(c1), float(c2)) for c1, c2 in grid]
    model, chosen = best_of(pairs, make, right if len(held) else None, (0.1, 0.1))

    def predict(examples: Examples) -> Answers:
        texts = [words_of(text, unit) for text in examples[column]]
        return Answers([list(tags) for tags in model.predict([features(text, unit) for text in texts])])

    c1, c2 = chosen.pop("setting")
    return Fitted(predict, {"c1": c1, "c2": c2, "iterations": iterations, **chosen})


def _tagged(
    examples: Examples, column: str, unit: str, answered: str, what: str
) -> tuple[list[list[dict[str, float | bool]]], list[list[str]]]:
    if len(examples) == 0:
        return [], []
    x, y = [], []
    for number, (text, tags) in enumerate(zip(examples[column], examples[answered], strict=True)):
        words = words_of(text, unit)
        if len(words) != len(tags):
            raise DataError(f"{what} example {number}: {len(words)} words, but {len(tags)} tags")
        x.append(features(words, unit))
        y.append([str(tag) for tag in tags])
    return x, y


def features(words: Sequence[str], unit: str = "words") -> list[dict[str, float | bool]]:
    """The features of each word: itself and its two neighbours on either side.

    >>> sorted(features(["Dr", "No"])[1])[:5]
    ['+1:</s>', '-1:dr', '-1:shape=Xx', '-1~0:dr|no', '0:no']
    """
    make = _of_characters if unit == "characters" else _of_words
    return [dict.fromkeys(make(words, place), True) for place in range(len(words))]


def _of_words(words: Sequence[str], place: int) -> Iterator[str]:
    word = words[place]
    low = word.lower()
    yield "bias"
    yield f"0:{low}"
    yield f"shape={shape(word)}"
    for size in (1, 2, 3, 4):
        if len(low) > size:
            yield f"ends={low[-size:]}"
            yield f"begins={low[:size]}"
    if "-" in word[1:-1]:
        yield "hyphen"
    for step in (-2, -1, 1, 2):
        near = _at(words, place + step)
        if near is None:
            if abs(step) == 1:
                yield f"{step:+d}:{_START if step < 0 else _END}"
            continue
        yield f"{step:+d}:{near.lower()}"
        if abs(step) == 1:
            yield f"{step:+d}:shape={shape(near)}"
    before, after = _at(words, place - 1), _at(words, place + 1)
    if before is not None:
        yield f"-1~0:{before.lower()}|{low}"
    if after is not None:
        yield f"0~+1:{low}|{after.lower()}"


def _of_characters(words: Sequence[str], place: int) -> Iterator[str]:
    yield "bias"
    window = {step: _at(words, place + step) or (_START if step < 0 else _END) for step in range(-2, 3)}
    for step, character in window.items():
        yield f"{step:+d}:{character}"
    for step in range(-2, 2):
        yield f"{step:+d}~{step + 1:+d}:{window[step]}{window[step + 1]}"
    yield f"-1~+1:{window[-1]}{window[1]}"
    yield "kinds=" + "".join(_kind(window[step]) for step in (-1, 0, 1))


def _at(words: Sequence[str], place: int) -> str | None:
    return words[place] if 0 <= place < len(words) else None


def shape(word: str) -> str:
    """Capitals as X, small letters as x, digits as d, runs shortened.

    >>> shape("McDonald's"), shape("1998"), shape("U.S.")
    ("XxXx'x", 'd', 'X.X.')
    """
    kinds = ["X" if c.isupper() else "x" if c.isalpha() else "d" if c.isdigit() else c for c in word]
    return "".join(kind for i, kind in enumerate(kinds) if i == 0 or kind != kinds[i - 1])


def _kind(character: str) -> str:
    """Letter, digit, punctuation and the like; edges of the text by themselves."""
    return unicodedata.category(character)[0] if len(character) == 1 else "E"
