"""What every encoder of a column has in common.

Shape legend: B examples of a batch, S tokens.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from moekit.config.base import StrictConfig
from moekit.config.errors import DataError
from moekit.data.examples import Examples


@dataclass(frozen=True)
class Continuous:
    """The array of an input whose numbers can be moved a little and still mean something.

    Attributes: array: its name. unit: what an epsilon of 1 is in its numbers; low, high: the smallest and largest that
        are valid, or None; all three broadcast to an example. lengths: the array that says how many rows are real.
    """

    array: str
    unit: Tensor
    low: Tensor | None = None
    high: Tensor | None = None
    lengths: str | None = None


class Encoded(ABC):
    """One input or target of all examples of a split, ready to be cut into batches."""

    # tokens of each example, by which examples are put together in batches; None where all are equal
    lengths: np.ndarray | None = None

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def batch(self, rows: np.ndarray, rng: np.random.Generator | None = None) -> dict[str, Tensor]:
        """The arrays of some examples; `rng` is given in training, for what is changed at random there."""

    def continuous(self, valid_range: tuple[float, float] | None = None) -> Continuous | None:
        """What can be moved a little, or None: ids cannot. `valid_range` is that of a pixel as it was given."""
        return None


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


def pixels_of(
    values: np.ndarray,
    array: str,
    mean: np.ndarray,
    deviation: np.ndarray,
    valid_range: tuple[float, float] | None,
) -> Continuous:
    """Standardised pixels `[..., C, H, W]` of `values` `[..., H, W, C]`: the unit is from black to white.

    Errors: `DataError` where all pixels are equal and nothing else says what is valid.
    """
    if valid_range is None:
        valid_range = (0.0, 255.0) if values.dtype == np.uint8 else (float(values.min()), float(values.max()))
    low, high = valid_range
    if not low < high:
        raise DataError(
            f"all pixels are {low:g}: they do not say what is valid. Set valid_range, as in valid_range=[0,1]"
        )
    unit, floor, ceiling = (
        torch.from_numpy(np.asarray(each, np.float32)).reshape(-1, 1, 1)
        for each in ((high - low) / deviation, (low - mean) / deviation, (high - mean) / deviation)
    )
    return Continuous(array, unit, floor, ceiling)


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
