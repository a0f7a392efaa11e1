"""Points of a curve that never grow too many: when they would, neighbours are put together."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

# of neighbours that are put together, these are those of the last one; of all other numbers the mean is taken
PLACES = ("step", "time", "tokens", "seconds")


class Series:
    """Rows of named values; at most twice `most` of them, each of which stands for `stride` rows that were added.

    Attributes:
        generation: changes whenever points that were there before have changed.

    >>> series = Series(most=2)
    >>> for step in range(1, 6):
    ...     series.add({"step": step, "loss": float(step)})
    >>> series.since(0), series.last, series.stride
    ({'step': [2, 4], 'loss': [1.5, 3.5]}, {'step': 5, 'loss': 5.0}, 2)
    """

    def __init__(self, most: int) -> None:
        self.most, self.stride, self.generation = most, 1, 0
        self._rows: list[dict[str, Any]] = []
        self._open: list[dict[str, Any]] = []  # rows of the next point

    def __len__(self) -> int:
        return len(self._rows)

    def add(self, row: Mapping[str, Any]) -> None:
        """One more row."""
        self._open.append(dict(row))
        if len(self._open) < self.stride:
            return
        self._rows.append(together(self._open))
        self._open = []
        if len(self._rows) >= 2 * self.most:
            self._rows = [together(self._rows[place : place + 2]) for place in range(0, len(self._rows), 2)]
            self.stride *= 2
            self.generation += 1

    def clear(self) -> None:
        """Begin anew."""
        self._rows, self._open, self.stride = [], [], 1
        self.generation += 1

    @property
    def last(self) -> dict[str, Any] | None:
        """The point that is not complete yet."""
        return together(self._open) if self._open else None

    def since(self, start: int) -> dict[str, list[Any]]:
        """Values by name of the points from one on, all equally long; None where a point has none."""
        rows = self._rows[start:]
        names = dict.fromkeys(name for row in rows for name in row)
        return {name: [row.get(name) for row in rows] for name in names}


def together(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One row for several.

    >>> together([{"step": 1, "load": [0.0, 1.0]}, {"step": 2, "load": [1.0, 0.0], "note": "a"}])
    {'step': 2, 'load': [0.5, 0.5], 'note': 'a'}
    """
    if len(rows) == 1:
        return dict(rows[0])
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: _mean([row[name] for row in rows if name in row], name in PLACES) for name in names}


def _mean(values: Sequence[Any], is_place: bool) -> Any:
    last = values[-1]
    if is_place:
        return last
    if isinstance(last, Mapping):
        return together([value for value in values if isinstance(value, Mapping)])
    if isinstance(last, list):
        alike = [value for value in values if isinstance(value, list) and len(value) == len(last)]
        return [_mean(column, False) for column in zip(*alike, strict=True)]
    numbers = [value for value in values if isinstance(value, int | float) and not isinstance(value, bool)]
    if not numbers or (last is not None and not isinstance(last, int | float)):
        return last
    return rounded(math.fsum(numbers) / len(numbers))


def rounded(value: Any) -> Any:
    """Numbers with six significant digits: more of them no curve shows, and they would travel each time.

    >>> rounded({"loss": 3.14159265, "load": [0.123456789]})
    {'loss': 3.14159, 'load': [0.123457]}
    """
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, list):
        return [rounded(item) for item in value]
    if isinstance(value, Mapping):
        return {key: rounded(item) for key, item in value.items()}
    return value
