"""Columns of numbers, categories and entities."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from moekit.config.task import FieldsInput, FieldStemConfig, IdsInput, IdStemConfig
from moekit.data.encoding.base import Arrays, Continuous, Encoded, Encoder, require_value
from moekit.data.examples import Examples


class FieldsEncoder(Encoder):
    """Numbers in standard deviations, NaN where missing; categories as numbers, 0 where rare or unseen.

    With bins, also how far each number has come through each of its ranges.
    """

    kind = "fields"

    def __init__(
        self,
        config: FieldsInput,
        means: Sequence[float],
        deviations: Sequence[float],
        names: Mapping[str, Sequence[str]],
        edges: Sequence[Sequence[float]] = (),
    ) -> None:
        self.edges = [list(one) for one in edges]  # by numeric column, where there are bins
        self.config, self.means, self.deviations = config, list(means), list(deviations)
        self.names = {column: list(values) for column, values in names.items()}

    @classmethod
    def fit(cls, config: FieldsInput, train: Examples) -> FieldsEncoder:
        means, deviations, edges = [], [], []
        for column in config.numbers:
            values = numbers(train, column)
            known = values[~np.isnan(values)]
            if config.bins:
                edges.append(ranges(known, config.bins))
            means.append(float(known.mean()) if len(known) else 0.0)
            spread = float(known.std()) if len(known) else 0.0
            deviations.append(spread if spread > 0 else 1.0)
        names = {}
        for column in config.categories:
            counts = Counter(category(value) for value in train[column])
            names[column] = sorted(name for name, count in counts.items() if count >= config.min_count)
        for column in config.lists:
            counts = Counter(name for row in range(len(train)) for name in listed(train, column, row))
            names[column] = sorted(name for name, count in counts.items() if count >= config.min_count)
        return cls(config, means, deviations, names, edges)

    def part(self) -> FieldStemConfig:
        sizes = tuple(len(self.names[column]) + 1 for column in self.config.categories)
        list_sizes = tuple(len(self.names[column]) for column in self.config.lists)
        return FieldStemConfig(
            n_numbers=len(self.means), sizes=sizes, list_sizes=list_sizes, n_bins=self.config.bins
        )

    def encode(self, examples: Examples) -> Encoded:
        n = len(examples)
        values = np.zeros((n, len(self.means)), dtype=np.float32)
        for place, column in enumerate(self.config.numbers):
            values[:, place] = (numbers(examples, column) - self.means[place]) / self.deviations[place]
        found = np.zeros((n, len(self.config.categories)), dtype=np.int64)
        for place, column in enumerate(self.config.categories):
            known = {name: number for number, name in enumerate(self.names[column], 1)}
            found[:, place] = [known.get(category(value), 0) for value in examples[column]]
        more: dict[str, np.ndarray] = {}
        if self.config.lists:
            more["lists"] = np.concatenate(
                [_shares(examples, column, self.names[column]) for column in self.config.lists], axis=1
            )
        if self.edges:
            filled = more["filled"] = np.zeros((n, len(self.means), self.config.bins), dtype=np.float32)
            for place, column in enumerate(self.config.numbers):
                known_numbers = np.nan_to_num(numbers(examples, column))[:, None]
                low, high = np.asarray(self.edges[place][:-1]), np.asarray(self.edges[place][1:])
                filled[:, place, : len(low)] = np.clip((known_numbers - low) / (high - low), 0, 1)
        return _Fields(numbers=values, categories=found, **more)

    def state(self) -> dict[str, Any]:
        found = {"means": self.means, "deviations": self.deviations, "names": self.names}
        return {**found, "edges": self.edges} if self.edges else found

    @classmethod
    def from_state(cls, config: FieldsInput, state: Mapping[str, Any]) -> FieldsEncoder:
        return cls(config, state["means"], state["deviations"], state["names"], state.get("edges", ()))


class _Fields(Arrays):
    """Columns as arrays; numbers are in standard deviations."""

    def continuous(self, valid_range: tuple[float, float] | None = None) -> Continuous | None:
        # shares of ranges would have to move along with their numbers
        if self.arrays["numbers"].shape[1] == 0 or "filled" in self.arrays:
            return None
        return Continuous("numbers", torch.ones(1))


class IdsEncoder(Encoder):
    """Entities as numbers, 0 where unseen in training."""

    kind = "ids"

    def __init__(self, config: IdsInput, names: Mapping[str, Sequence[str]]) -> None:
        self.config = config
        self.names = {column: list(values) for column, values in names.items()}

    @classmethod
    def fit(cls, config: IdsInput, train: Examples) -> IdsEncoder:
        return cls(
            config,
            {column: sorted({category(value) for value in train[column]}) for column in config.columns},
        )

    def part(self) -> IdStemConfig:
        columns = self.config.columns
        products = tuple((columns.index(one), columns.index(other)) for one, other in self.config.products)
        sizes = tuple(len(self.names[column]) + 1 for column in columns)
        return IdStemConfig(sizes=sizes, products=products, complex=self.config.complex)

    def unseen(self, examples: Examples) -> dict[str, list[str]]:
        """By column, entities that training never saw."""
        return {
            column: sorted({category(value) for value in examples[column]} - set(self.names[column]))
            for column in self.config.columns
        }

    def encode(self, examples: Examples) -> Encoded:
        found = np.zeros((len(examples), len(self.config.columns)), dtype=np.int64)
        for place, column in enumerate(self.config.columns):
            known = {name: number for number, name in enumerate(self.names[column], 1)}
            found[:, place] = [known.get(category(value), 0) for value in examples[column]]
        return Arrays(ids=found)

    def state(self) -> dict[str, Any]:
        return {"names": self.names}

    @classmethod
    def from_state(cls, config: IdsInput, state: Mapping[str, Any]) -> IdsEncoder:
        return cls(config, state["names"])


def listed(examples: Examples, column: str, row: int) -> list[str]:
    """The names in a list, or in a text with spaces between them; none where there is nothing.

    Errors: `DataError` naming example and column for anything else.
    """
    value = examples[column][row]
    if value is None:
        return []
    if isinstance(value, str):
        return value.split()
    require_value(hasattr(value, "__iter__"), column, row, value, "must hold a list of names")
    return [category(item) for item in value]


def _shares(examples: Examples, column: str, names: Sequence[str]) -> np.ndarray:
    """`[N, names]` float32: each name of a list counts 1 / sqrt(how many it has), so that lists weigh the same."""
    numbered = {name: number for number, name in enumerate(names)}
    found = np.zeros((len(examples), len(names)), dtype=np.float32)
    for row in range(len(examples)):
        places = list({numbered[name] for name in listed(examples, column, row) if name in numbered})
        found[row, places] = len(places) ** -0.5 if places else 0
    return found


def category(value: Any) -> str:
    """The name of a category: equal for 1, 1.0 and "1"; empty for what is missing."""
    if value is None or (isinstance(value, float) and value != value):
        return ""
    if isinstance(value, float | np.floating) and float(value).is_integer():
        return str(int(value))
    return str(value).strip()


def ranges(values: np.ndarray, bins: int) -> list[float]:
    """Up to `bins + 1` edges of ranges that hold about equally many values.

    A value counts by the square root of how often it occurs, so that a column of zeros and few large numbers has
    ranges among the large ones too.

    >>> ranges(np.array([0.0] * 9 + [1.0, 2.0, 3.0, 4.0]), 2)
    [0.0, 1.0, 4.0]
    """
    found, counts = np.unique(values, return_counts=True)
    if len(found) < 2:
        return []
    weights = np.cumsum(np.sqrt(counts))
    places = np.searchsorted(weights, np.linspace(0, weights[-1], bins + 1)[1:-1], side="left")
    inner = found[np.clip(places, 1, len(found) - 2)] if len(found) > 2 else found[:0]
    return [float(edge) for edge in np.unique([found[0], *inner, found[-1]])]


def numbers(examples: Examples, column: str) -> np.ndarray:
    """`[N]` float64 of a column; NaN where it holds nothing.

    Errors: `DataError` naming example and column for what is no number.
    """
    values = examples[column]
    if isinstance(values, np.ndarray) and values.dtype != object:
        return values.astype(np.float64)
    found = np.full(len(values), np.nan)
    for row, value in enumerate(values):
        if value is None or (isinstance(value, str) and not value.strip()):
            continue
        try:
            found[row] = float(value)
        except (TypeError, ValueError):
            require_value(False, column, row, value, "must hold a number, or nothing")
    return found
