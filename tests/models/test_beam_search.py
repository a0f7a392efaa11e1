"""The search against every sequence that there is, and greedy as its lower bound."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from moekit.models.beam_search import length_penalty, search

END, V = 0, 4


class Chain:
    """Log-probabilities of the next token from the row's own table, the step and the last token."""

    def __init__(self, tables: Tensor) -> None:
        self.tables, self.rows, self.step = tables, torch.arange(len(tables)), 0

    def read(self, token_ids: Tensor) -> Tensor:
        assert len(token_ids) == len(self.rows)
        found = self.tables[self.rows, self.step, token_ids]
        self.step += 1
        return found

    def keep_rows(self, rows: Tensor) -> None:
        self.rows = self.rows[rows]


def tables(n: int, length: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (3 * torch.randn(n, length, V, V, generator=generator)).log_softmax(dim=-1)


def score_of(table: Tensor, ids: list[int], alpha: float) -> float:
    total, last = 0.0, END
    for step, token in enumerate(ids):
        total += float(table[step, last, token])
        last = token
    return total / length_penalty(len(ids), alpha)


def every_sequence(length: int) -> list[list[int]]:
    found = []
    for n in range(1, length + 1):
        for ids in itertools.product(range(V), repeat=n):
            inner, last = ids[:-1], ids[-1]
            if END not in inner and (last == END or n == length):
                found.append(list(ids))
    return found


def greedy_of(table: Tensor, length: int) -> list[int]:
    ids, last = [], END
    for step in range(length):
        last = int(table[step, last].argmax())
        ids.append(last)
        if last == END:
            break
    return ids


@pytest.mark.parametrize("alpha", [0.0, 0.6, 1.0])
def test_wide_beams_find_the_best_of_all_sequences(alpha):
    length = 4
    made = tables(20, length, 1)
    found, scores = search(Chain(made), 20, first=END, end=END, max_len=length, beams=V**length, alpha=alpha)
    for table, ids, score in zip(made, found, scores, strict=True):
        best = max(every_sequence(length), key=lambda each: score_of(table, each, alpha))
        assert ids == best
        assert score == pytest.approx(score_of(table, best, alpha), rel=1e-5)


def test_one_beam_is_greedy():
    made = tables(30, 6, 2)
    found, scores = search(Chain(made), 30, first=END, end=END, max_len=6, beams=1, alpha=0.7)
    for table, ids, score in zip(made, found, scores, strict=True):
        assert ids == greedy_of(table, 6)
        assert score == pytest.approx(score_of(table, ids, 0.7), rel=1e-5)


@pytest.mark.parametrize("beams", [2, 3, 5])
@pytest.mark.parametrize("alpha", [0.0, 1.0, 2.0])
def test_more_beams_never_score_below_greedy(beams, alpha):
    made = tables(200, 7, 3)
    found, scores = search(Chain(made), 200, first=END, end=END, max_len=7, beams=beams, alpha=alpha)
    better = 0
    for table, ids, score in zip(made, found, scores, strict=True):
        lower = score_of(table, greedy_of(table, 7), alpha)
        assert score == pytest.approx(score_of(table, ids, alpha), rel=1e-5), (
            "the score is that of the sequence"
        )
        assert score >= lower - 1e-5
        better += score > lower + 1e-5
    assert better > 20, "else the beams do nothing"


def test_an_example_gets_the_same_whatever_stands_beside_it():
    made = tables(12, 6, 4)
    together, _ = search(Chain(made), 12, first=END, end=END, max_len=6, beams=3)
    for row in range(12):
        alone, _ = search(Chain(made[row : row + 1]), 1, first=END, end=END, max_len=6, beams=3)
        assert alone[0] == together[row]


def test_a_forbidden_token_never_stands_in_an_answer():
    made = tables(30, 6, 5)
    made[..., 2] = -torch.inf
    found, _ = search(Chain(made), 30, first=END, end=END, max_len=6, beams=6)
    assert all(2 not in ids for ids in found)
    assert all(ids[-1] == END or len(ids) == 6 for ids in found)


def test_the_length_penalty_wants_longer_answers():
    made = tables(100, 7, 6)
    lengths = [
        sum(map(len, search(Chain(made), 100, first=END, end=END, max_len=7, beams=4, alpha=alpha)[0]))
        for alpha in (0.0, 1.0, 3.0)
    ]
    assert lengths[0] < lengths[1] < lengths[2]
