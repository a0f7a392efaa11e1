"""Labels along a sequence whose times nobody knows: connectionist temporal classification, and its decoding.

Graves et al. 2006, "Connectionist temporal classification". The blank is 0, labels are 1 to C.

Shape legend: B examples, T tokens of one stem, C labels, L labels of the longest target.
"""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moekit.config.task_transcript import CtcHeadConfig
from moekit.models.task_heads import Head, Hidden, register_head

BLANK = 0
# a logit that no label overcomes, and that stays finite in sums
_NEVER = -1e4


@register_head("ctc")
class CtcHead(Head):
    """Logits `[B, T, 1 + C]`, the blank's first; targets `[B, L]` of numbers from 1, anything below behind the last.

    Padding says "blank" with certainty: it adds nothing to a path's probability and nothing to what is decoded, so
    nobody needs to know how long an example was.
    """

    reads_pooled = False

    def __init__(self, config: CtcHeadConfig, d_model: int) -> None:
        super().__init__()
        self.config = config
        self.map = nn.Linear(d_model, 1 + len(config.labels))

    def answer(self, hidden: Hidden) -> Tensor:
        place = hidden.places[self.config.stem]
        logits: Tensor = self.map(hidden.x[:, place]).float()
        if hidden.mask is None:
            return logits
        silence = torch.full_like(logits[0, 0], _NEVER)
        silence[BLANK] = 0.0
        return torch.where(hidden.mask[:, place, None], logits, silence)

    def loss(self, answer: Tensor, targets: Tensor) -> tuple[Tensor, int]:
        """Mean over all labels of the batch."""
        lengths = (targets > 0).sum(dim=1)
        times = torch.full_like(lengths, answer.shape[1])
        # a target that does not fit into its frames has no path: it counts 0 instead of infinity
        each = F.ctc_loss(
            answer.log_softmax(dim=-1).transpose(0, 1), targets.clamp(min=0), times, lengths,
            blank=BLANK, reduction="none", zero_infinity=True,
        )  # fmt: skip
        known = int(lengths.sum())
        return each.sum() / max(known, 1), known


def best_path(logits: np.ndarray) -> list[int]:
    """Labels of the likeliest path of `[T, 1 + C]` logits: repeats become one, then blanks go.

    >>> best_path(np.eye(3)[[1, 1, 0, 1, 2, 0]])
    [1, 1, 2]
    """
    best = np.asarray(logits).argmax(axis=-1)
    starts = np.concatenate([[True], best[1:] != best[:-1]])
    return [int(label) for label in best[starts] if label != BLANK]


def prefix_beam(logits: np.ndarray, beam: int) -> list[int]:
    """The likeliest labels of `[T, 1 + C]` logits, all paths that lead to them added up, among `beam` kept at a time.

    Prefix search (Graves 2006, section 3.2), with a beam as in Hannun et al. 2014, arXiv:1408.2873.

    >>> unsure = np.log([[0.6, 0.4], [0.6, 0.4]])       # blank twice: 0.36; the label once, on three paths: 0.64
    >>> best_path(unsure), prefix_beam(unsure, 4)
    ([], [1])
    """
    scores = np.asarray(logits, dtype=np.float64)
    scores = scores - np.logaddexp.reduce(scores, axis=-1, keepdims=True)
    # of each prefix: log-probability of its paths that end in a blank, and of those that end in its last label
    held: dict[tuple[int, ...], tuple[float, float]] = {(): (0.0, -math.inf)}
    for row in scores.tolist():
        grown: dict[tuple[int, ...], tuple[float, float]] = {}
        # what is far below the best label of a frame is in no sequence that is kept
        least = max(row) - 12.0
        likely = [label for label, value in enumerate(row) if value > least and label != BLANK]
        for prefix, (blank, label) in held.items():
            both = _sum(blank, label)
            here = grown.get(prefix, _NOTHING)
            again = label + row[prefix[-1]] if prefix else -math.inf
            grown[prefix] = _sum(here[0], both + row[BLANK]), _sum(here[1], again)
            for number in likely:
                # a label twice in a row is two only where a blank stood between
                before = blank if prefix and prefix[-1] == number else both
                longer = (*prefix, number)
                there = grown.get(longer, _NOTHING)
                grown[longer] = there[0], _sum(there[1], before + row[number])
        held = dict(sorted(grown.items(), key=lambda item: -_sum(*item[1]))[:beam])
    return list(max(held.items(), key=lambda item: _sum(*item[1]))[0])


_NOTHING = (-math.inf, -math.inf)


def _sum(one: float, other: float) -> float:
    """log(exp(one) + exp(other))."""
    high = max(one, other)
    return high if high == -math.inf else high + math.log1p(math.exp(min(one, other) - high))
