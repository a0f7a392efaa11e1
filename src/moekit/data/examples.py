"""Examples of a task: columns of equal length, in three splits."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from moekit.config.errors import ConfigError, DataError, nearest, require
from moekit.data.documents import SourceInfo

# a list of texts, labels, lists of words, or None where unknown; or an array whose first axis counts the examples
Values = Sequence[Any] | np.ndarray


@dataclass(frozen=True)
class Examples:
    """Columns by name, equally long.

    Attributes: columns; origins: where each example stands in the user's file, such as `mine.csv:12`, for errors;
        None for examples that came from elsewhere. names: the user's names of columns that are called otherwise here.

    >>> examples = Examples({"text": ["good", "bad", "so so"], "label": ["+", "-", None]})
    >>> len(examples), examples.rows([2, 0])["text"]
    (3, ['so so', 'good'])
    """

    columns: Mapping[str, Values]
    origins: Sequence[str] | None = None
    names: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        sizes = {name: len(values) for name, values in self.columns.items()}
        require(len(set(sizes.values())) <= 1, "columns", sizes, "must be equally long")

    def __len__(self) -> int:
        return len(next(iter(self.columns.values()))) if self.columns else 0

    def __getitem__(self, name: str) -> Values:
        if name not in self.columns:
            raise ConfigError(f"column {name!r} is not in the examples: {nearest(name, list(self.columns))}")
        return self.columns[name]

    def rows(self, index: Iterable[int] | np.ndarray) -> Examples:
        """The examples at these places, in that order."""
        places = np.asarray(list(index) if not isinstance(index, np.ndarray) else index, dtype=np.int64)
        return Examples(
            {
                name: values[places] if isinstance(values, np.ndarray) else [values[i] for i in places]
                for name, values in self.columns.items()
            },
            None if self.origins is None else [self.origins[i] for i in places],
            self.names,
        )

    def update(self, hasher: Any) -> None:
        """Feed all of it to a hash."""
        for name in sorted(self.columns):
            values = self.columns[name]
            hasher.update(name.encode())
            if isinstance(values, np.ndarray) and values.dtype != object:
                hasher.update(str((values.dtype, values.shape)).encode())
                hasher.update(np.ascontiguousarray(values).tobytes())
            else:
                for value in values:
                    plain = value.tobytes() if isinstance(value, np.ndarray) else json.dumps(value).encode()
                    hasher.update(plain + b"\0")


@dataclass(frozen=True)
class TaskData:
    """Examples in three splits, no example in two of them.

    Attributes: validation may be empty where a source brings none; `split_off` makes it then. sources: origin and
        licence. given_test: whether the source itself says what is tested on, so that figures can be compared.
    """

    train: Examples
    validation: Examples
    test: Examples
    sources: list[SourceInfo] = field(default_factory=list)
    given_test: bool = False

    def fingerprint(self) -> str:
        """sha256 over all splits."""
        hasher = hashlib.sha256()
        for part in (self.train, self.validation, self.test):
            part.update(hasher)
        return hasher.hexdigest()


def split_examples(
    examples: Examples, shares: Sequence[float], seed: int, by: str | None = None, together: str | None = None
) -> list[Examples]:
    """Parts of the examples by share, the rest first: `[rest, *parts]`.

    Args:
        examples: to be split.
        shares: of the parts; together below 1.
        seed: of the order.
        by: a column whose values have about the same shares in every part (classes).
        together: a column whose equal values never stand in two parts (speakers, documents).

    Errors: `DataError` where a part would be empty.

    >>> parts = split_examples(Examples({"x": list(range(10))}), [0.2], seed=0)
    >>> [len(part) for part in parts], sorted([*parts[0]["x"], *parts[1]["x"]]) == list(range(10))
    ([8, 2], True)
    """
    rng = np.random.Generator(np.random.PCG64([seed, 5]))
    groups = _groups(examples, together)
    order = rng.permutation(len(groups))
    if by is not None:
        # sorted by class, then dealt evenly: each stretch of the order has the classes' shares
        labels = [json.dumps(examples[by][int(groups[i][0])], default=str) for i in order]
        order = order[np.argsort(np.asarray(labels), kind="stable")]
        order = order[np.argsort(_even(labels), kind="stable")]
    sizes = np.asarray([len(groups[i]) for i in order])
    ends = np.cumsum(sizes) / max(int(sizes.sum()), 1)
    bounds = np.cumsum([1 - sum(shares), *shares])
    parts = []
    low = 0.0
    for number, high in enumerate(bounds):
        inside = [i for i, end in zip(order, ends, strict=True) if low < end <= high + 1e-9]
        if number == len(bounds) - 1:
            inside = [i for i, end in zip(order, ends, strict=True) if low < end]
        parts.append(
            np.sort(np.concatenate([groups[i] for i in inside])) if inside else np.array([], np.int64)
        )
        low = high + 1e-9
    for share, part in zip([1.0, *shares], parts, strict=True):
        if share > 0 and len(part) == 0:
            raise DataError(
                f"{len(examples)} examples are too few for a part of {share:.0%}. Give more, or a larger share"
            )
    return [examples.rows(part) for part in parts]


def _groups(examples: Examples, together: str | None) -> list[np.ndarray]:
    if together is None:
        return [np.array([i]) for i in range(len(examples))]
    found: dict[Any, list[int]] = {}
    for i, value in enumerate(examples[together]):
        found.setdefault(value, []).append(i)
    return [np.asarray(rows) for rows in found.values()]


def _even(labels: list[str]) -> np.ndarray:
    """For labels sorted by class, where each stands as a share of its class: sorting by it mixes them evenly."""
    ordered = sorted(labels)
    places: dict[str, int] = {}
    counts = {label: ordered.count(label) for label in set(ordered)} if len(set(ordered)) < 5000 else {}
    found = []
    for label in ordered:
        places[label] = places.get(label, 0) + 1
        found.append((places[label] - 0.5) / counts.get(label, 1))
    return np.asarray(found)
