"""Search for the likeliest sequence, greedy or with beams, over whatever gives log-probabilities of the next token.

Shape legend: B sequences wanted, K beams, R rows that are computed, V token ids.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class NextToken(Protocol):
    """A model that goes on with several rows at once."""

    def read(self, token_ids: Tensor) -> Tensor:
        """Log-probabilities `[R, V]` float32 of the token behind `token_ids` `[R]`, each row's next one."""
        ...

    def keep_rows(self, rows: Tensor) -> None:
        """Go on with these rows `[R']`, in that order; a row may be taken more than once."""
        ...


@dataclass
class _Found:
    """The best finished sequence of one example, and how many have finished."""

    ids: list[int]
    score: float = -float("inf")
    finished: int = 0

    def offer(self, ids: list[int], score: float) -> None:
        if score > self.score:
            self.ids, self.score = ids, score


def length_penalty(length: int | Tensor, alpha: float) -> float | Tensor:
    """What a sequence's log-probability is divided by (Wu et al. 2016, arXiv 1609.08144, equation 14).

    >>> length_penalty(1, 0.6), length_penalty(7, 1.0), length_penalty(50, 0.0)
    (1.0, 2.0, 1.0)
    """
    return ((5 + length) / 6) ** alpha


def search(
    model: NextToken, n: int, *, first: int, end: int, max_len: int, beams: int = 1, alpha: float = 1.0
) -> tuple[list[list[int]], list[float]]:
    """The likeliest sequences, `end` with them where they have ended, and their penalised log-probabilities.

    The greedy sequence is always among those compared, so that more beams never give a worse score than one.

    Args:
        model: at the beginning of `n` rows.
        n: sequences wanted.
        first: the token that every row begins with.
        end: the token that ends a sequence.
        max_len: tokens of a sequence, its end counted.
        beams: hypotheses that are kept of each.
        alpha: of the length penalty.
    """
    found = [_Found([]) for _ in range(n)]
    owners = list(range(n))  # the example of each group of beams
    width = 1  # all beams of an example begin as one row
    ids = torch.zeros(n, 1, 0, dtype=torch.long)
    scores = torch.zeros(n, 1)
    # whether the first beam is still the greedy sequence
    greedy = torch.ones(n, dtype=torch.bool)
    token = torch.full((n,), first)
    for step in range(1, max_len + 1):
        log_probs = model.read(token).to("cpu", torch.float32).view(len(owners), width, -1)
        chosen = _chosen(log_probs, scores, greedy, beams, end)
        ids = torch.cat(
            [ids.gather(1, chosen.beam[..., None].expand(-1, -1, step - 1)), chosen.token[..., None]], 2
        )
        scores, penalty = chosen.score, float(length_penalty(step, alpha))
        ended = (chosen.token == end) & scores.isfinite()
        _collect(found, owners, ids, scores / penalty, ended)
        greedy = greedy & ~ended[:, 0]
        if step == max_len:
            _collect(found, owners, ids, scores / penalty, ~ended & scores.isfinite())
            break
        scores = scores.masked_fill(ended, -torch.inf)
        live = scores.amax(dim=1)
        # even if it lost nothing more, a hypothesis is compared at the length that it could reach
        bound = live / float(length_penalty(max_len, alpha))
        going = [
            place for place, owner in enumerate(owners)
            if live[place].isfinite() and float(bound[place]) > found[owner].score
            and (found[owner].finished < beams or bool(greedy[place]))
        ]  # fmt: skip
        if not going:
            break
        kept = torch.tensor(going)
        owners = [owners[place] for place in going]
        ids, scores, greedy = ids[kept], scores[kept], greedy[kept]
        model.keep_rows((kept[:, None] * width + chosen.beam[kept]).flatten())
        token, width = ids[:, :, -1].flatten(), ids.shape[1]
    return [each.ids for each in found], [each.score for each in found]


@dataclass
class _Chosen:
    """`[B, K]`: from which beam each comes, its new token, and its log-probability."""

    beam: Tensor
    token: Tensor
    score: Tensor


def _chosen(log_probs: Tensor, scores: Tensor, greedy: Tensor, beams: int, end: int) -> _Chosen:
    """The best `beams` continuations of each example, one that has ended counted among them."""
    n, _, size = log_probs.shape
    every = (scores[..., None] + log_probs).flatten(1)  # [B, K V]
    best, place = every.topk(min(beams, every.shape[1]), dim=1)
    if best.shape[1] < beams:  # a vocabulary smaller than the beams: rows without hope fill them up
        missing = beams - best.shape[1]
        best = torch.cat([best, best.new_full((n, missing), -torch.inf)], dim=1)
        place = torch.cat([place, place.new_zeros(n, missing)], dim=1)
    # the greedy one stays first, whatever stands above it
    next_best = log_probs[:, 0].argmax(dim=1)
    same = (place == next_best[:, None]) & (best > -torch.inf)
    where = torch.where(same.any(dim=1), same.int().argmax(dim=1), beams - 1)
    moved = greedy & (where > 0)
    rows = torch.arange(n)
    first_place, first_score = next_best, every[rows, next_best]
    order = torch.arange(beams).expand(n, -1)
    # those before its old place move one down
    shifted = torch.where((order > 0) & (order <= where[:, None]), order - 1, order)
    place = torch.where(moved[:, None], place.gather(1, shifted), place)
    best = torch.where(moved[:, None], best.gather(1, shifted), best)
    place[:, 0] = torch.where(moved, first_place, place[:, 0])
    best[:, 0] = torch.where(moved, first_score, best[:, 0])
    return _Chosen(place // size, place % size, best)


def _collect(found: list[_Found], owners: list[int], ids: Tensor, penalised: Tensor, which: Tensor) -> None:
    for place, beam in torch.nonzero(which).tolist():
        one = found[owners[place]]
        one.finished += 1
        one.offer(ids[place, beam].tolist(), float(penalised[place, beam]))
