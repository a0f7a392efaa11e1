"""What a measure gives where there is nothing to be found: labels permuted, and a router that draws.

A specialisation is real where it lies above both nulls by more than its own uncertainty (a bootstrap over texts, since
tokens of one text are not independent).

Shape legend: N tokens, K choices, G groups, E experts, D texts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from moekit.explain.measures import NONE, chosen_by, counts_by, group_specialisation

ROUNDS = 200


@dataclass(frozen=True)
class Claim:
    """A figure with what it must beat.

    Attributes: value; low, high: its 95 % interval over texts, freed from its bias. permuted, random: 95th percentiles
        of the same figure with groups permuted among texts, and with choices drawn with the layer's load. holds: low
        above both.
    """

    value: float
    low: float
    high: float
    permuted: float
    random: float

    @property
    def holds(self) -> bool:
        """Whether even the lower end of the interval lies above both nulls."""
        return self.low > max(self.permuted, self.random)


def specialisation_claim(
    experts: np.ndarray, groups: np.ndarray, texts: np.ndarray, n_experts: int, n_groups: int,
    *, rounds: int = ROUNDS, seed: int = 0, measure: Callable[[np.ndarray], float] = group_specialisation,
) -> Claim:  # fmt: skip
    """Domain specialisation of one layer against both nulls.

    Args:
        experts: `[N, K]` choices.
        groups: `[N]` group of each token; tokens of one text have one group.
        texts: `[N]` the text of each token.
        n_experts, n_groups: E, G.
        rounds: of permutations, of draws and of the bootstrap.
        seed: of all of them.
        measure: of counts `[G, E]`.

    The figure is biased upwards in small samples; the nulls have the same bias, which is why it is compared with them.
    """
    rng = np.random.Generator(np.random.PCG64(seed))
    known, text = np.unique(texts, return_inverse=True)
    hot = chosen_by(experts, n_experts)
    per_text = counts_by(text, len(known), hot)  # [D, E]
    group_of = np.zeros(len(known), dtype=np.int64)
    group_of[text] = groups

    def table(rows: np.ndarray, labels: np.ndarray) -> np.ndarray:
        return np.asarray(np.eye(n_groups)[:, labels] @ rows)

    value = measure(table(per_text, group_of))
    again = [rng.integers(0, len(known), len(known)) for _ in range(rounds)]
    boot = [measure(table(per_text[rows], group_of[rows])) for rows in again]
    permuted = [measure(table(per_text, rng.permutation(group_of))) for _ in range(rounds)]
    # as many choices as each group has, with the layer's own load; what its texts draw adds up to the same
    n_choices = np.bincount(group_of[text], (experts != NONE).sum(axis=1), minlength=n_groups).astype(
        np.int64
    )
    load = hot.sum(axis=0, dtype=np.float64) / max(hot.sum(dtype=np.float64), 1)
    drawn = [measure(rng.multinomial(n_choices, load)) for _ in range(rounds)]
    # the basic interval: the figure's upward bias in a small sample, which texts drawn from texts have twice, drops
    # out; the quantiles of `boot` themselves may lie above both nulls where a router draws
    high, low = np.clip(2 * value - np.quantile(boot, [0.025, 0.975]), 0.0, None)
    return Claim(
        value, float(low), float(high), float(np.quantile(permuted, 0.95)), float(np.quantile(drawn, 0.95))
    )
