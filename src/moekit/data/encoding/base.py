"""What every encoder of a column has in common.

Shape legend: B examples of a batch, S tokens.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from moekit.config.base import StrictConfig
from moekit.config.errors import DataError
from moekit.data.examples import Examples


class Encoded(ABC):
    """One input or target of all examples of a split, ready to be cut into batches."""

    # tokens of each example, by which examples are put together in batches; None where all are equal
    lengths: np.ndarray | None = None

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def batch(self, rows: np.ndarray, rng: np.random.Generator | None = None) -> dict[str, Tensor]:
        """The arrays of some examples; `rng` is given in training, for what is changed at random there."""


class Encoder(ABC):
    """Fitted on the training examples; the same afterwards for every split and for a user's own examples."""

    kind: ClassVar[str]

    @classmethod
    @abstractmethod
    def fit(cls, config: Any, train: Examples) -> Encoder:
        """Learn sizes and statistics."""

    @abstractmethod
    def part(self) -> StrictConfig:
        """Configuration of the stem or head that belongs to it."""

    @abstractmethod
    def encode(self, examples: Examples) -> Encoded:
        """Errors: `DataError` naming example and column where a value cannot be read."""

    @abstractmethod
    def state(self) -> dict[str, Any]:
        """Everything fitted, as JSON."""

    @classmethod
    @abstractmethod
    def from_state(cls, config: Any, state: Mapping[str, Any]) -> Encoder:
        """What `state` gave."""


class Arrays(Encoded):
    """Arrays whose first axis counts the examples."""

    def __init__(self, **arrays: np.ndarray) -> None:
        self.arrays = {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in arrays.items()}

    def __len__(self) -> int:
        return len(next(iter(self.arrays.values())))

    def batch(self, rows: np.ndarray, rng: np.random.Generator | None = None) -> dict[str, Tensor]:
        index = torch.from_numpy(rows)
        return {name: array[index] for name, array in self.arrays.items()}


class Ragged(Encoded):
    """Sequences of different lengths, filled up to the longest of a batch."""

    def __init__(self, fill: float, **sequences: Sequence[np.ndarray]) -> None:
        self.sequences, self.fill = sequences, fill
        self.lengths: np.ndarray | None = np.asarray([len(item) for item in self._first()], dtype=np.int64)

    def _first(self) -> Sequence[np.ndarray]:
        return next(iter(self.sequences.values()))

    def __len__(self) -> int:
        return len(self._first())

    def batch(self, rows: np.ndarray, rng: np.random.Generator | None = None) -> dict[str, Tensor]:
        return {
            name: torch.from_numpy(filled([items[i] for i in rows], self.fill))
            for name, items in self.sequences.items()
        }


def filled(items: Sequence[np.ndarray], fill: float) -> np.ndarray:
    """`[B, S, ...]`: sequences, those that are shorter than the longest filled up behind.

    >>> filled([np.array([1, 2]), np.array([3])], 0).tolist()
    [[1, 2], [3, 0]]
    """
    longest = max((len(item) for item in items), default=0)
    out = np.full((len(items), longest, *items[0].shape[1:]), fill, dtype=items[0].dtype)
    for row, item in enumerate(items):
        out[row, : len(item)] = item
    return out


class ExampleError(DataError):
    """A value that cannot be read: `row` counts the examples that were encoded, from 0."""

    def __init__(self, row: int, column: str, problem: str, where: str | None = None) -> None:
        super().__init__(f"{where or f'example {row + 1}'}, column {column!r}: {problem}")
        self.row, self.column, self.problem = row, column, problem

    def at(self, examples: Examples) -> ExampleError:
        """The same, in the words of the file that the examples came from."""
        if examples.origins is None:
            return self
        column = examples.names.get(self.column, self.column)
        return ExampleError(self.row, column, self.problem, examples.origins[self.row])


@contextmanager
def located(examples: Examples) -> Iterator[None]:
    """Errors inside are said with file and line where the examples came from a file."""
    try:
        yield
    except ExampleError as error:
        raise error.at(examples) from None


def require_value(ok: bool, column: str, row: int, value: Any, rule: str) -> None:
    """Raise `ExampleError` naming the example and the column unless `ok`."""
    if not ok:
        shown = repr(value)
        shown = shown if len(shown) <= 60 else shown[:57] + "..."
        raise ExampleError(row, column, f"{rule}; got {shown}")
