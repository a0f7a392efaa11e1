"""Metrics over orders of candidates: link prediction and recommendation.

Predictions are a row of values for each question, `[n, candidates]`, larger for better candidates. Candidates that were
answers in training, or other right answers, are taken out of the order before the rank is read ("filtered", Bordes and
others 2013). A candidate that ties with t others takes the mean of the t + 1 ranks, so that a model that says the same
of all gains nothing (Berrendorf and others 2020, https://arxiv.org/abs/2002.06914). No light library does both;
normalised discounted gain is scikit-learn's.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from moekit.config.errors import ConfigError
from moekit.evaluate.task_metrics import register_metric

Places = Sequence[Iterable[int]]


def filtered_ranks(
    predictions: Any, targets: Any, known: Places | None = None, name: str = "ranks"
) -> np.ndarray:
    """Rank of the target among the candidates, `[n]`, 1 for the first.

    Args:
        predictions: `[n, candidates]`; candidates at minus infinity are last.
        targets: the place of the right candidate, `[n]`.
        known: other right candidates of each question, which do not count; the target itself may stand among them.

    >>> filtered_ranks([[3.0, 2.0, 1.0]], [2]).tolist(), filtered_ranks([[3.0, 2.0, 1.0]], [2], [[0]]).tolist()
    ([3.0], [2.0])
    """
    table = candidates_table(name, predictions)
    true = np.asarray(targets)
    if true.ndim != 1 or true.dtype.kind not in "iu":
        raise ConfigError(
            f"{name}: targets must be places of candidates, whole numbers [n]; got {true.dtype} {true.shape}"
        )
    _check_places(name, [true], table.shape[1])
    mine = table[np.arange(len(table)), true]
    if known is not None:
        table = masked(name, table, known, mine, true)
    others = table != -np.inf
    above = (table > mine[:, None]).sum(1)
    ties = ((table == mine[:, None]) & (others | (mine == -np.inf)[:, None])).sum(1) - 1
    return 1 + above + ties / 2


@register_metric(
    "mrr_filtered", "mean of 1 / rank of the right candidate, other right ones left out", library="moekit"
)
def mrr_filtered(predictions: Any, targets: Any, known: Places | None = None) -> float:
    return float((1 / filtered_ranks(predictions, targets, known, "mrr_filtered")).mean())


@register_metric("hits_at_k", "share of questions whose right candidate is among the first k, filtered",
                 library="moekit")  # fmt: skip
def hits_at_k(predictions: Any, targets: Any, k: int = 10, known: Places | None = None) -> float:
    _check_k("hits_at_k", k)
    return float((filtered_ranks(predictions, targets, known, "hits_at_k") <= k).mean())


@register_metric("recall_at_k", "share of the right candidates that are among the first k, mean over questions",
                 library="moekit")  # fmt: skip
def recall_at_k(predictions: Any, targets: Any, k: int = 10, known: Places | None = None) -> float:
    """Targets: the right candidates of each question, at least one, or its number alone. Ties go to the earlier one."""
    _check_k("recall_at_k", k)
    table, right = _ranking("recall_at_k", predictions, targets, known)
    first = np.argsort(-table, axis=1, kind="stable")[:, :k]
    hits = [len(wanted & set(row.tolist())) / len(wanted) for wanted, row in zip(right, first, strict=True)]
    return float(np.mean(hits))


@register_metric("ndcg_at_k", "normalised discounted gain of the first k candidates, mean over questions",
                 library="scikit-learn")  # fmt: skip
def ndcg_at_k(predictions: Any, targets: Any, k: int = 10, known: Places | None = None) -> float:
    """Targets: the right candidates of each question, at least one, or its number alone; ties share their gain."""
    from sklearn.metrics import ndcg_score

    _check_k("ndcg_at_k", k)
    table, right = _ranking("ndcg_at_k", predictions, targets, known)
    if table.shape[1] < 2:
        raise ConfigError("ndcg_at_k needs at least two candidates; got 1")
    gains = np.zeros(table.shape)
    for row, wanted in enumerate(right):
        gains[row, list(wanted)] = 1
    finite = table[np.isfinite(table)]
    table = np.where(np.isfinite(table), table, (finite.min() if finite.size else 0.0) - 1)
    return float(ndcg_score(gains, table, k=k))


def candidates_table(name: str, predictions: Any) -> np.ndarray:
    """`[n, candidates]` of numbers or minus infinity."""
    try:
        table = np.asarray(predictions, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{name}: predictions must be [n, candidates]: {error}") from None
    if table.ndim != 2 or table.shape[1] == 0:
        raise ConfigError(f"{name}: predictions must be [n, candidates]; got shape {table.shape}")
    if np.isnan(table).any() or (table == np.inf).any():
        raise ConfigError(f"{name}: predictions must be numbers or minus infinity; got NaN or infinity")
    return table


def masked(
    name: str,
    table: np.ndarray,
    known: Places,
    keep: np.ndarray | None = None,
    true: np.ndarray | None = None,
) -> np.ndarray:
    """The table with the known candidates at minus infinity; those of `true` keep their value."""
    if len(known) != len(table):
        raise ConfigError(f"{name}: known has {len(known)} lists for {len(table)} questions")
    table = table.copy()
    for row, places in enumerate(known):
        found = np.asarray(list(places), dtype=np.int64)
        _check_places(name, [found], table.shape[1])
        table[row, found] = -np.inf
    if true is not None and keep is not None:
        table[np.arange(len(table)), true] = keep
    return table


def _ranking(
    name: str, predictions: Any, targets: Any, known: Places | None
) -> tuple[np.ndarray, list[set[int]]]:
    table = candidates_table(name, predictions)
    right: list[set[int]] = []
    for row, places in enumerate(targets):
        places = [places] if isinstance(places, int | np.integer) else places
        if not hasattr(places, "__iter__") or len(wanted := {int(place) for place in places}) == 0:
            raise ConfigError(
                f"{name}: targets[{row}] must list at least one right candidate; got {places!r}"
            )
        right.append(wanted)
    _check_places(name, [list(wanted) for wanted in right], table.shape[1])
    if known is not None:
        both = [
            row
            for row, (wanted, places) in enumerate(zip(right, known, strict=False))
            if wanted & set(places)
        ]
        if both:
            raise ConfigError(
                f"{name}: known[{both[0]}] takes out a candidate that targets[{both[0]}] asks for"
            )
        table = masked(name, table, known)
    return table, right


def _check_places(name: str, lists: Iterable[Any], n_candidates: int) -> None:
    for places in lists:
        for place in places:
            if not 0 <= place < n_candidates:
                raise ConfigError(f"{name}: candidate {place} is not in 0..{n_candidates - 1}")


def _check_k(name: str, k: int) -> None:
    if k < 1:
        raise ConfigError(f"{name}: k must be at least 1; got {k}")
