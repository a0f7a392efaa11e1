"""Inputs of a task as one matrix, the way classical methods read them.

Texts become TF-IDF, numbers are standardised with a column that marks the missing ones, categories and ids become a
column each, images their pixels, frames of sound their means and deviations over the whole and over each third.
Everything that is learnt of the data (words, means, categories) is learnt from the training examples.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np

from moekit.config.errors import DataError
from moekit.config.task import AnyInput, AudioInput, BagInput, FieldsInput, IdsInput, ImageInput, TextInput
from moekit.data.encoding.fields import listed
from moekit.data.examples import Examples, Values
from moekit.evaluate.baselines.base import numbers
from moekit.evaluate.baselines.words import WORD_PATTERN


def text_vectorizer(analyzer: str, ngrams: tuple[int, int], max_features: int | None, min_count: int) -> Any:
    """TF-IDF with the logarithm of counts, rows of length 1."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    return TfidfVectorizer(
        analyzer=analyzer,
        ngram_range=tuple(ngrams),
        max_features=max_features,
        min_df=min_count,
        sublinear_tf=True,
        token_pattern=WORD_PATTERN if analyzer == "word" else None,
        dtype=np.float32,
    )


class SparseMatrix:
    """The inputs as a sparse matrix `[n, features]`, for linear models and neighbours.

    Args: vectorizer: for the columns of text; each gets a copy of its own.
    """

    def __init__(self, inputs: Mapping[str, AnyInput], vectorizer: Any | None, train: Examples):
        self.parts: list[tuple[str, str, Any]] = []  # how, column, what was learnt
        for given in inputs.values():
            if isinstance(given, TextInput | BagInput):
                self._learn_text(given.column, vectorizer, train)
            elif isinstance(given, FieldsInput):
                for column in given.numbers:
                    self._learn_scale("numbers", column, train)
                for column in given.categories:
                    self._learn_categories(column, given.min_count, train)
                for column in given.lists:
                    self.parts.append(("lists", column, _learn_lists(column, given.min_count, train)))
            elif isinstance(given, IdsInput):
                for column in given.columns:
                    self._learn_categories(column, 1, train)
            elif isinstance(given, ImageInput):
                self._learn_scale("pixels", given.column, train)
            elif isinstance(given, AudioInput):
                self._learn_scale("frames", given.column, train)
        self.width = self(train.rows([0])).shape[1]

    def __call__(self, examples: Examples) -> Any:
        from scipy import sparse

        if len(examples) == 0:
            return sparse.csr_matrix((0, self.width), dtype=np.float32)
        blocks = []
        for how, column, learnt in self.parts:
            if how == "text":
                blocks.append(learnt.transform(_texts(examples[column])))
            elif how == "categories":
                blocks.append(learnt.transform(_names(examples[column])))
            elif how == "lists":
                blocks.append(sparse.csr_matrix(_lists(examples, column, learnt)))
            else:
                table = dense_columns(how, examples[column])
                means, deviations, marked = learnt
                missing = np.isnan(table)
                table = np.where(missing, 0.0, (table - means) / deviations)
                blocks.append(sparse.csr_matrix(np.concatenate([table, missing[:, marked]], axis=1)))
        return sparse.hstack(blocks, format="csr", dtype=np.float32)

    def _learn_text(self, column: str, vectorizer: Any | None, train: Examples) -> None:
        from sklearn.base import clone

        made = text_vectorizer("word", (1, 2), 100_000, 1) if vectorizer is None else clone(vectorizer)
        try:
            made.fit(_texts(train[column]))
        except ValueError as error:
            raise DataError(f"column {column!r} gives no words to learn from: {error}") from None
        self.parts.append(("text", column, made))

    def _learn_scale(self, how: str, column: str, train: Examples) -> None:
        table = dense_columns(how, train[column])
        seen = ~np.isnan(table)
        count = np.maximum(seen.sum(0), 1)
        means = np.where(seen, table, 0.0).sum(0) / count
        deviations = np.sqrt(np.where(seen, (table - means) ** 2, 0.0).sum(0) / count)
        if how == "pixels":  # a pixel that hardly ever changes would be blown up by its own deviation
            deviations = np.full_like(deviations, deviations.max())
        marked = np.flatnonzero(~seen.all(0))
        self.parts.append((how, column, (means, np.where(deviations > 0, deviations, 1.0), marked)))

    def _learn_categories(self, column: str, min_count: int, train: Examples) -> None:
        from sklearn.preprocessing import OneHotEncoder

        rare = min_count if min_count > 1 else None
        encoder = OneHotEncoder(handle_unknown="infrequent_if_exist", min_frequency=rare, dtype=np.float32)
        self.parts.append(("categories", column, encoder.fit(_names(train[column]))))


class TreeMatrix:
    """The inputs as a dense matrix `[n, features]` for trees: missing numbers stay NaN, categories are codes.

    Attributes: categorical: which features are codes.
    """

    def __init__(self, inputs: Mapping[str, AnyInput], train: Examples):
        self.parts: list[tuple[str, str, Any]] = []
        for given in inputs.values():
            if isinstance(given, FieldsInput):
                self.parts += [("numbers", column, None) for column in given.numbers]
                for column in given.categories:
                    self.parts.append(("categories", column, self._codes(column, given.min_count, train)))
                for column in given.lists:
                    self.parts.append(("lists", column, _learn_lists(column, given.min_count, train)))
            elif isinstance(given, IdsInput):
                for column in given.columns:
                    self.parts.append(("categories", column, self._codes(column, 1, train)))
            elif isinstance(given, ImageInput | AudioInput):
                self.parts.append(
                    ("pixels" if isinstance(given, ImageInput) else "frames", given.column, None)
                )
        widths = [1 if how == "categories" else self._block(how, column, learnt, train.rows([0])).shape[1]
                  for how, column, learnt in self.parts]  # fmt: skip
        self.width = sum(widths)
        self.categorical = np.repeat([how == "categories" for how, _, _ in self.parts], widths)

    def __call__(self, examples: Examples) -> np.ndarray:
        if len(examples) == 0:
            return np.zeros((0, self.width))
        blocks = [self._block(how, column, learnt, examples) for how, column, learnt in self.parts]
        return np.concatenate(blocks, axis=1)

    @staticmethod
    def _block(how: str, column: str, learnt: Any, examples: Examples) -> np.ndarray:
        if how == "categories":
            return learnt.transform(_names(examples[column]))
        if how == "lists":
            return _lists(examples, column, learnt)
        return dense_columns(how, examples[column])

    @staticmethod
    def _codes(column: str, min_count: int, train: Examples) -> Any:
        from sklearn.preprocessing import OrdinalEncoder

        # trees take at most 255 categories; the rare ones beyond are one
        encoder = OrdinalEncoder(
            handle_unknown="use_encoded_value", unknown_value=np.nan,
            min_frequency=min_count if min_count > 1 else None, max_categories=254,
        )  # fmt: skip
        return encoder.fit(_names(train[column]))


def dense_columns(how: str, values: Values) -> np.ndarray:
    """A column as `[n, features]` float64: one number, the pixels of an image, or a summary of frames.

    >>> dense_columns("numbers", [1, None]).tolist()
    [[1.0], [nan]]
    """
    if how == "numbers":
        return numbers(values)[:, None]
    if len(values) == 0:
        return np.zeros((0, 0))
    if how == "pixels":
        return np.stack([np.asarray(image, dtype=np.float64).reshape(-1) for image in values])
    return np.stack([_summary(frames) for frames in values])


def frames_of(sound: Any) -> np.ndarray:
    """Frames `[time, features]` float64. Errors: `DataError` for anything else, and for none."""
    table = np.asarray(sound, dtype=np.float64)
    if table.ndim != 2 or len(table) == 0:
        raise DataError(f"sound must be frames [time, features], at least one; got shape {table.shape}")
    return table


def _summary(frames: Any) -> np.ndarray:
    """Means and deviations of frames `[time, features]` over the whole, and their means over each third."""
    table = frames_of(frames)
    thirds = [part.mean(0) if len(part) else table.mean(0) for part in np.array_split(table, 3)]
    return np.concatenate([table.mean(0), table.std(0), *thirds])


def _texts(values: Values) -> list[str]:
    """Texts as strings: lists of words are joined, nothing is an empty text."""
    return ["" if text is None else text if isinstance(text, str) else " ".join(text) for text in values]


def _learn_lists(column: str, min_count: int, train: Examples) -> list[str]:
    counts = Counter(name for row in range(len(train)) for name in listed(train, column, row))
    return sorted(name for name, count in counts.items() if count >= min_count)


def _lists(examples: Examples, column: str, names: list[str]) -> np.ndarray:
    """`[n, names]` zeros and ones."""
    rows = [set(listed(examples, column, row)) for row in range(len(examples))]
    return np.asarray([[float(name in row) for name in names] for row in rows]).reshape(-1, len(names))


def _names(values: Values) -> np.ndarray:
    """Categories as strings `[n, 1]`; a missing one is a category."""
    missing = "\0missing"
    names = [missing if value is None or value != value else str(value) for value in values]
    return np.asarray(names, dtype=object)[:, None]
