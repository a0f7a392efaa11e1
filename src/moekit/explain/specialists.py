"""The experts that a group asks for more than the others do, and whether it is the group that misses them.

A group's specialists are switched off together, since one expert's work is taken over by others that were trained on
much the same: the fewest that hold half of what the group asks for beyond the other groups, and the first 1, 2, 4 and 8
of them. Each set goes in two ways: the router's next best expert takes over, or nothing does.

Shape legend: G groups, E experts of a layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from math import comb

import numpy as np
import torch
from torch import nn

from moekit.data.loader import Batch
from moekit.explain.causes import (
    Difference,
    Resampled,
    TextLosses,
    text_losses,
    verdict_on,
)
from moekit.explain.edits import Instead, Off, edited
from moekit.explain.measures import group_shares, load
from moekit.explain.rulings import CONTRARY, SUPPORTED, Ruling
from moekit.observe.record import RoutingRecord

# what a set of specialists holds of its group's lead; how many are switched off beside; random sets that it must beat
HALF, CURVE, DRAWS = 0.5, (1, 2, 4, 8), 8
WAYS: tuple[Instead, ...] = ("nothing", "next")


@dataclass(frozen=True)
class Verdict:
    """Whether the experts that a group asks for are missed by it.

    Attributes: layer, group: numbers. experts: switched off together, the most particular one first. lead: the share
        that they hold of what the group asks for beyond the others. share: of the group's choices that they have;
        elsewhere: mean of the other groups. load: their share of all choices. instead: see `Off`. own, others, value,
        low, high: as `Difference`. null: the same value for each set of random experts. ruling: what follows. curve:
        the first n of the experts, as mappings of `n` and a `Difference`.
    """

    layer: int
    group: int
    experts: tuple[int, ...]
    lead: float
    share: float
    elsewhere: float
    load: float
    instead: Instead
    own: float
    others: float
    value: float
    low: float
    high: float
    null: tuple[float, ...]
    ruling: Ruling
    curve: tuple[dict[str, float], ...] = field(default=())

    @property
    def supported(self) -> bool:
        return self.ruling == SUPPORTED

    @property
    def contrary(self) -> bool:
        return self.ruling == CONTRARY


def leads(shares: np.ndarray) -> np.ndarray:
    """`[G, E]` how much larger each expert's share of a group's choices is than in the mean of the other groups.

    >>> leads(np.array([[0.5, 0.3, 0.2], [0.1, 0.3, 0.6]])).round(2).tolist()
    [[0.4, 0.0, -0.4], [-0.4, 0.0, 0.4]]
    """
    others = (shares.sum(axis=0) - shares) / (len(shares) - 1)
    return np.asarray(shares - others)


def specialists(lead: np.ndarray) -> list[int]:
    """Experts with a lead `[E]` above zero, the largest first.

    >>> specialists(np.array([0.1, -0.4, 0.3]))
    [2, 0]
    """
    order = np.argsort(-lead, kind="stable")
    return [int(expert) for expert in order if lead[expert] > 0]


def holding(lead: np.ndarray, share: float = HALF) -> list[int]:
    """The fewest specialists that hold a share of the group's whole lead.

    >>> holding(np.array([0.3, 0.15, 0.15, -0.6])), holding(np.array([0.2, 0.2, 0.2, -0.6]))
    ([0], [0, 1])
    """
    order = specialists(lead)
    total = np.cumsum(lead[order])
    n = int(np.searchsorted(total, share * total[-1] - 1e-12)) + 1 if order else 0
    return order[:n]


def random_sets(
    chosen: Sequence[int], loads: np.ndarray, draws: int, rng: np.random.Generator
) -> list[tuple[int, ...]]:
    """Sets of as many experts, none of them chosen, whose loads together are the nearest to those of the chosen.

    Where too few others are left for two different sets, chosen experts may be among them.

    Args: chosen; loads: `[E]` share of all choices; draws: at most so many sets; rng: draws the candidates.

    >>> rng = np.random.Generator(np.random.PCG64(0))
    >>> random_sets([0], np.array([0.3, 0.3, 0.1, 0.29, 0.01]), 2, rng)
    [(1,), (3,)]
    """
    n, n_experts, without = len(chosen), len(loads), tuple(sorted(chosen))
    pool = [expert for expert in range(n_experts) if expert not in without]
    if n == 0 or comb(len(pool), n) < 2:
        pool = list(range(n_experts))
    candidates: set[tuple[int, ...]]
    if comb(len(pool), n) <= 50 * draws:
        candidates = set(combinations(pool, n))
    else:
        candidates = {
            tuple(sorted(int(one) for one in rng.choice(pool, n, replace=False))) for _ in range(50 * draws)
        }
    candidates.discard(without)
    wanted = loads[list(chosen)].sum()
    return sorted(candidates, key=lambda one: (round(abs(loads[list(one)].sum() - wanted), 6), one))[:draws]


@dataclass
class CausalCheck:
    """Switches experts of a model off, and keeps what each set made of the losses: several groups may share one.

    Args:
        model: with sparse layers.
        batches: gives the same batches each time.
        n_groups: G.
        device, dtype: of the evaluation.
        draws: sets of random experts that each set is compared with.
        curve: numbers of specialists that are switched off beside.
        seed: of random sets and of the bootstrap.
    """

    model: nn.Module
    batches: Callable[[], Iterable[Batch]]
    n_groups: int
    device: torch.device
    dtype: torch.dtype
    draws: int = DRAWS
    curve: Sequence[int] = CURVE
    seed: int = 0
    passes: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        self._bootstrap = Resampled(self._losses(), self.n_groups, seed=self.seed)
        self._known: dict[tuple[int, tuple[int, ...], Instead], list[Difference | None]] = {}

    @property
    def n_texts(self) -> list[int]:
        """Texts of each group that the losses are of."""
        return np.bincount(self._bootstrap.before.domain, minlength=self.n_groups).tolist()

    @property
    def n_tokens(self) -> int:
        """Tokens that are predicted in each pass."""
        return int(self._bootstrap.before.tokens.sum())

    def _losses(self) -> TextLosses:
        self.passes += 1
        return text_losses(self.model, self.batches(), self.device, self.dtype)

    def without(self, layer: int, experts: Sequence[int], instead: Instead) -> list[Difference | None]:
        """For each group how much more it misses the experts of a layer than the others do."""
        key = (layer, tuple(sorted(experts)), instead)
        if key not in self._known:
            with edited(self.model, {layer: Off(key[1], instead)}):
                self._known[key] = self._bootstrap.of(self._losses())
        return self._known[key]

    def layer(
        self, number: int, counts: np.ndarray, requested: np.ndarray, ways: Sequence[Instead] = WAYS,
        *, groups: Sequence[str] = (), progress: Callable[[str], None] = lambda message: None,
    ) -> Iterator[Verdict]:  # fmt: skip
        """The verdict on each group's specialists of a layer, in each way.

        Args:
            number: of the sparse layer.
            counts: `[G, E]` choices. requested: `[E]` of all, see the routing record.
            ways: what takes the experts' place.
            groups: their names, for `progress`, which is called with a line of text.
        """
        shares, loads = group_shares(counts), load(requested)
        lead = leads(shares)
        for group in self._bootstrap.groups:
            chosen, order = holding(lead[group]), specialists(lead[group])
            if not chosen:
                continue
            rng = np.random.Generator(np.random.PCG64([self.seed, number, group]))
            sets = random_sets(chosen, loads, self.draws, rng)
            others = [other for other in self._bootstrap.groups if other != group]
            for instead in ways:
                place = {"nothing": "", "next": ", next best in their place"}.get(instead, f", {instead}")
                name = groups[group] if groups else f"group {group}"
                progress(f"layer {number}, {name}: without experts {_listed(chosen)}{place}")
                found = self.without(number, chosen, instead)[group]
                if found is None:
                    continue
                null = [self.without(number, one, instead)[group] for one in sets]
                values = tuple(one.value for one in null if one is not None)
                steps = [
                    (n, self.without(number, order[:n], instead)[group])
                    for n in self.curve
                    if n <= len(order)
                ]
                yield Verdict(
                    number, group, tuple(chosen), float(lead[group, chosen].sum() / lead[group, order].sum()),
                    float(shares[group, chosen].sum()), float(shares[others][:, chosen].sum(axis=1).mean()),
                    float(loads[chosen].sum()), instead, found.own, found.others, found.value, found.low, found.high,
                    values, verdict_on(found, values),
                    tuple({"n": n, **vars(one)} for n, one in steps if one is not None),
                )  # fmt: skip


def ways_of(record: RoutingRecord, layer: int) -> tuple[Instead, ...]:
    """What can take an expert's place in a layer: a router without probabilities has no next best."""
    return WAYS if record.has(layer, "probs") else ("nothing",)


def _listed(experts: Sequence[int]) -> str:
    return ", ".join(map(str, experts))
