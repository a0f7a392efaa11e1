"""Labels as numbers and back, and answers from decision values."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from moekit.config.errors import ConfigError


def plain(value: Any) -> Any:
    """A label as Python has it: numpy's scalars become int, float, bool or str."""
    return value.item() if isinstance(value, np.generic) else value


def class_codes(column: Iterable[Any]) -> tuple[tuple[Any, ...], np.ndarray]:
    """(labels in order, the place of each example's label).

    >>> class_codes(["b", "a", "b"])
    (('a', 'b'), array([1, 0, 1]))
    """
    values = [plain(value) for value in column]
    try:
        labels = sorted(set(values))
    except TypeError:  # labels of several types
        labels = sorted(set(values), key=lambda label: (type(label).__name__, str(label)))
    places = {label: place for place, label in enumerate(labels)}
    return tuple(labels), np.asarray([places[value] for value in values], dtype=np.int64)


def indicator(
    column: Iterable[Any], labels: Sequence[Any] | None = None
) -> tuple[tuple[Any, ...], np.ndarray]:
    """(labels, `[n, labels]` of 0 and 1) of lists of labels; unknown ones are dropped where `labels` is given.

    >>> indicator([["a"], ["b", "a"], []])[1].tolist()
    [[1, 0], [1, 1], [0, 0]]
    """
    rows = [[plain(value) for value in values] for values in column]
    if labels is None:
        labels = class_codes([value for values in rows for value in values])[0]
    places = {label: place for place, label in enumerate(labels)}
    table = np.zeros((len(rows), len(labels)), dtype=np.int64)
    for row, values in enumerate(rows):
        for value in values:
            if value in places:
                table[row, places[value]] = 1
    return tuple(labels), table


def labels_where(chosen: np.ndarray, labels: Sequence[Any]) -> list[list[Any]]:
    """The lists of labels behind a table of truth values."""
    return [[labels[int(place)] for place in np.flatnonzero(row)] for row in chosen]


def two_sided(decision: np.ndarray) -> np.ndarray:
    """`[n, 2]` of the single column that binary classifiers give; other tables as they are."""
    return np.stack([-decision, decision], axis=1) if decision.ndim == 1 else decision


def best_of(
    candidates: Sequence[Any],
    make: Callable[[Any], Any],
    figure: Callable[[Any], float] | None,
    default: Any,
) -> tuple[Any, dict[str, Any]]:
    """(what the best candidate made, the setting and the figure of each): the largest figure, the first of equals.

    `figure` is None where there is no validation: then the default is made and nothing is chosen.
    """
    if not candidates:
        raise ConfigError("a grid must hold at least one setting; got none")
    if figure is None or len(candidates) == 1:
        setting = default if figure is None else candidates[0]
        return make(setting), {"setting": setting}
    figures: list[float] = []
    best = None
    for candidate in candidates:
        made = make(candidate)
        figures.append(float(figure(made)))
        if figures[-1] > max(figures[:-1], default=-np.inf):
            best = (candidate, made)
    if best is None:
        raise ConfigError("no setting of the grid gave a finite figure on the validation examples")
    tried = {str(candidate): round(value, 6) for candidate, value in zip(candidates, figures, strict=True)}
    return best[1], {"setting": best[0], "validation": tried}


def agreement(predicted: np.ndarray, labels: Sequence[Any], column: Iterable[Any]) -> float:
    """Share of the examples whose predicted place is that of their label; labels unseen in training count as wrong."""
    places = {label: place for place, label in enumerate(labels)}
    true = np.asarray([places.get(plain(value), -1) for value in column], dtype=np.int64)
    return float((predicted == true).mean())


def micro_f1(predicted: np.ndarray, true: np.ndarray) -> float:
    """F1 over all entries of two tables of 0 and 1; 0 where neither has a 1."""
    return float(2 * (predicted * true).sum() / max(predicted.sum() + true.sum(), 1))
