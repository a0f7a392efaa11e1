"""What experts are good for: the loss with and without them, group by group.

That experts are asked by one group more than by others is a correlation. They are a cause of what the model knows there
where the group's loss rises more than that of the others when they are switched off, and more than it does without as
many random experts that do as much work.

Shape legend: G groups (domains), D documents.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from moekit.data.loader import Batch
from moekit.explain.rulings import CONTRARY, NOT_SUPPORTED, SUPPORTED, Ruling
from moekit.train.device import autocast

ROUNDS, CHANCE = 1000, 0.05


@dataclass(frozen=True)
class TextLosses:
    """Losses of documents: `nats` and `tokens` `[D]` of each, its `domain` and its `text` number `[D]`."""

    nats: np.ndarray
    tokens: np.ndarray
    domain: np.ndarray
    text: np.ndarray

    def per_domain(self, n_domains: int) -> np.ndarray:
        """`[G]` nats a token."""
        nats = np.bincount(self.domain, self.nats, n_domains)
        return np.asarray(nats / np.maximum(np.bincount(self.domain, self.tokens, n_domains), 1))


@torch.inference_mode()
def text_losses(
    model: nn.Module, batches: Iterable[Batch], device: torch.device, dtype: torch.dtype
) -> TextLosses:
    """The loss of each document in the batches."""
    model.eval()
    nats: dict[int, float] = {}
    tokens: dict[int, int] = {}
    domains: dict[int, int] = {}
    # a router that draws makes the same draws with an edit as without
    with torch.random.fork_rng([] if device.type == "cpu" else [device]):
        torch.manual_seed(0)
        for batch in batches:
            batch = batch.to(device)
            mask = batch.token_mask
            with autocast(device, dtype):
                out = model(
                    batch.token_ids, targets=batch.targets, segment_ids=batch.segment_ids, return_logits=False,
                    token_mask=None if bool(mask.all()) else mask, return_token_losses=True,
                )  # fmt: skip
            counts = batch.targets.cpu().numpy() >= 0
            each = out.token_losses.float().cpu().numpy()[counts]
            text, domain = batch.segment_ids.cpu().numpy()[counts], batch.domain_ids.cpu().numpy()[counts]
            for number in np.unique(text):
                mine = text == number
                nats[number] = nats.get(number, 0.0) + float(each[mine].sum(dtype=np.float64))
                tokens[number] = tokens.get(number, 0) + int(mine.sum())
                domains[number] = int(domain[mine][0])
    order = sorted(nats)
    return TextLosses(
        np.array([nats[text] for text in order]), np.array([tokens[text] for text in order]),
        np.array([domains[text] for text in order], dtype=np.int64), np.array(order, dtype=np.int64),
    )  # fmt: skip


@dataclass(frozen=True)
class Difference:
    """How much more a group misses experts than the other groups do.

    Attributes: own: rise of the group's loss, nats a token. others: mean rise of the other groups' losses. value: own
        less others. low, high: 95 % interval of value over texts.
    """

    own: float
    others: float
    value: float
    low: float
    high: float


class Resampled:
    """A bootstrap over texts, the same for every edit that it is asked about.

    Args:
        before: losses of the model as it is.
        n_groups: G.
        rounds: times that as many texts of each group are drawn.
        seed: of the draws.
    """

    def __init__(self, before: TextLosses, n_groups: int, *, rounds: int = ROUNDS, seed: int = 0) -> None:
        rng = np.random.Generator(np.random.PCG64(seed))
        self.before, self.n_groups = before, n_groups
        self._texts = [np.flatnonzero(before.domain == group) for group in range(n_groups)]
        # times that each text of a group is drawn, [rounds, D of the group]
        self._drawn = [
            rng.multinomial(len(mine), np.full(len(mine), 1 / len(mine)), rounds) if len(mine) else None
            for mine in self._texts
        ]

    @property
    def groups(self) -> list[int]:
        """The groups that have texts."""
        return [group for group, mine in enumerate(self._texts) if len(mine)]

    def of(self, after: TextLosses) -> list[Difference | None]:
        """For each group the difference that an edit makes; None for a group without texts, or without others.

        Args: after: losses of the same texts with the edit.
        """
        more, tokens = after.nats - self.before.nats, self.before.tokens
        known = self.groups
        rise: dict[int, float] = {}
        drawn: dict[int, np.ndarray] = {}
        for group in known:
            mine, times = self._texts[group], self._drawn[group]
            assert times is not None
            rise[group] = float(more[mine].sum() / tokens[mine].sum())
            drawn[group] = (times @ more[mine]) / (times @ tokens[mine])
        found: list[Difference | None] = []
        for group in range(self.n_groups):
            others = [other for other in known if other != group]
            if group not in known or not others:
                found.append(None)
                continue
            around = drawn[group] - np.mean([drawn[other] for other in others], axis=0)
            low, high = np.quantile(around, [0.025, 0.975])
            own, rest = rise[group], sum(rise[other] for other in others) / len(others)
            found.append(Difference(own, rest, own - rest, float(low), float(high)))
        return found


def verdict_on(test: Difference, null: Sequence[float]) -> Ruling:
    """What an ablation says of the claim that experts belong to a group.

    Args:
        test: of the group's own experts.
        null: the same difference for as many random experts with as much load, several draws.

    "supported": the group misses its experts more than the others do, beyond the interval over texts, and at most 5 %
    of the random draws make as much of it (of fewer than 20 draws none). "contrary": the others miss them more,
    likewise. "not supported": neither.

    >>> verdict_on(Difference(0.3, 0.1, 0.2, 0.1, 0.3), [0.0, 0.05, -0.05])
    'supported'
    >>> verdict_on(Difference(0.3, 0.1, 0.2, 0.1, 0.3), [0.0, 0.05, 0.4])
    'not supported'
    >>> verdict_on(Difference(0.1, 0.3, -0.2, -0.3, -0.1), [0.0, 0.05, -0.05])
    'contrary'
    """
    draws = np.asarray(null)
    if test.low > 0 and (draws >= test.value).sum() <= CHANCE * len(draws):
        return SUPPORTED
    return CONTRARY if test.high < 0 and (draws <= test.value).sum() <= CHANCE * len(draws) else NOT_SUPPORTED
