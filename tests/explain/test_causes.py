"""Whether a group misses the experts that it asks for: sets, intervals, and verdicts whose answer is known."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from moekit.data.loader import Batch
from moekit.explain.causes import Difference, Resampled, TextLosses, verdict_on
from moekit.explain.specialists import CausalCheck, holding, leads, random_sets, specialists
from moekit.layers.moe import MoE
from moekit.layers.plan import RoutingPlan
from moekit.layers.routing import ROUTERS, Router, register_router


def losses(nats, domains, tokens=None) -> TextLosses:
    n = len(nats)
    return TextLosses(
        np.asarray(nats, float), np.full(n, 10) if tokens is None else np.asarray(tokens), np.asarray(domains),
        np.arange(n),
    )  # fmt: skip


def test_a_difference_by_hand():
    """Group 0 has two texts that lose 2 nats in 10 tokens and 6 in 30, group 1 one that loses 1 in 10, group 2 none."""
    before = losses([5, 5, 5], [0, 0, 1], [10, 30, 10])
    first, second, third = Resampled(before, 3).of(losses([7, 11, 6], [0, 0, 1], [10, 30, 10]))
    assert (first.own, first.others, first.value) == pytest.approx((0.2, 0.1, 0.1))
    assert (first.low, first.high) == pytest.approx((0.1, 0.1)), "both texts say the same"
    assert second.value == pytest.approx(-0.1)
    assert third is None
    alone = Resampled(losses([1, 1], [0, 0]), 1).of(losses([2, 2], [0, 0]))
    assert alone == [None], "there is nothing to compare with"


def test_the_interval_is_of_texts():
    """Of 100 texts each loses 0 or 2 nats in one token: the mean is 1, with a deviation of 0.1."""
    rng = np.random.Generator(np.random.PCG64(1))
    more = np.concatenate([rng.permutation([0.0, 2.0] * 50), np.zeros(100)])
    domains, ones = np.repeat([0, 1], 100), np.ones(200)
    found = Resampled(losses(np.zeros(200), domains, ones), 2).of(losses(more, domains, ones))[0]
    assert found.value == 1
    assert found.low == pytest.approx(1 - 1.96 * 0.1, abs=0.03)
    assert found.high == pytest.approx(1 + 1.96 * 0.1, abs=0.03)


@pytest.mark.parametrize(
    ("low", "high", "null", "ruling"),
    [
        (0.1, 0.3, [0.0, 0.05], "supported"),
        (-0.01, 0.41, [0.0, 0.05], "not supported"),  # not beyond its interval
        (0.1, 0.3, [0.0, 0.5], "not supported"),  # random experts do as much
        (-0.3, -0.1, [0.0, 0.05], "contrary"),
        (-0.3, -0.1, [-0.5, 0.0], "not supported"),
        (0.1, 0.3, [*[0.0] * 9, 0.21], "not supported"),  # one of ten does
        (0.1, 0.3, [*[0.0] * 19, 0.21], "supported"),  # one of twenty
        (0.1, 0.3, [], "supported"),
    ],
)
def test_three_verdicts(low, high, null, ruling):
    value = (low + high) / 2
    assert verdict_on(Difference(value, 0.0, value, low, high), null) == ruling


def test_which_experts_and_against_which():
    shares = np.array([[0.4, 0.3, 0.2, 0.1], [0.1, 0.1, 0.2, 0.6], [0.1, 0.2, 0.2, 0.5]])
    lead = leads(shares)
    np.testing.assert_allclose(lead[0], [0.3, 0.15, 0.0, -0.45], atol=1e-12)
    assert specialists(lead[0]) == [0, 1]
    assert holding(lead[0]) == [0], "0.3 of 0.45"
    assert holding(lead[0], 0.9) == [0, 1]
    assert holding(np.zeros(4)) == []
    rng = np.random.Generator(np.random.PCG64(0))
    loads = np.array([0.2, 0.2, 0.25, 0.15, 0.1, 0.1])
    sets = random_sets([0, 1], loads, 3, rng)
    assert sets[0] == (2, 3), "0.4 as well"
    assert all(not {0, 1} & set(one) for one in sets)
    assert len(sets) == 3
    few = random_sets([0, 1, 2], np.full(4, 0.25), 8, rng)
    assert sorted(few) == [(0, 1, 3), (0, 2, 3), (1, 2, 3)], "three others are not left, but other threes are"
    many = random_sets(list(range(4)), np.full(64, 1 / 64), 5, rng)
    assert len(set(many)) == 5


class ByIdRouter(Router):
    """Expert = id; the next best one is the one behind it."""

    def forward(self, tokens, context):
        ids = context.token_ids
        probs = torch.full((len(ids), self.n_experts), 0.01)
        probs[torch.arange(len(ids)), (ids + 1) % self.n_experts] = 0.3
        probs[torch.arange(len(ids)), ids] = 0.6
        return RoutingPlan.from_choices(
            ids[:, None], torch.ones(len(ids), 1), self.n_experts, context, router_probs=probs
        )


@pytest.fixture(autouse=True)
def by_id():
    """The router has its name while a test of this file runs, and not in those of others."""
    before = dict(ROUTERS)
    register_router("test_by_id")(ByIdRouter)
    yield
    ROUTERS.clear()
    ROUTERS.update(before)


class Expert(nn.Module):
    """Says 1 for tokens of the groups that it knows."""

    def __init__(self, groups: list[int]) -> None:
        super().__init__()
        self.groups = groups

    def forward(self, x):
        return sum((x[:, group : group + 1] for group in self.groups), torch.zeros(len(x), 1))


class KnowsGroups(nn.Module):
    """A token's loss is 2 less what its expert says; tokens are vectors that name their group."""

    def __init__(self, known: list[list[int]]) -> None:
        super().__init__()
        layer = MoE(2, experts=[Expert(groups) for groups in known], top_k=1, d_out=1, router="test_by_id")
        self.moe_layers = nn.ModuleList([layer])

    def forward(self, token_ids, *, segment_ids, **other):
        group = torch.nn.functional.one_hot(segment_ids % 2, 2).float()
        out = self.moe_layers[0](group, token_ids=token_ids)
        return SimpleNamespace(token_losses=2 - out.hidden_states[..., 0])


def check(known: list[list[int]], texts: dict[int, list[list[int]]], **more):
    """Verdicts of a model and of texts by group, by way."""
    rows = [(group, ids) for group in (0, 1) for ids in texts[group]]
    numbers = [2 * place + group for place, (group, _) in enumerate(rows)]
    ids = torch.tensor([ids for _, ids in rows])
    segments = torch.tensor(numbers)[:, None].expand_as(ids)
    batch = Batch(ids, ids, segments, segments % 2)
    counts = np.zeros((2, len(known)), dtype=np.int64)
    for group, line in rows:
        np.add.at(counts[group], line, 1)
    one = CausalCheck(KnowsGroups(known), lambda: [batch], 2, torch.device("cpu"), torch.float32, **more)
    return one, {(v.group, v.instead): v for v in one.layer(0, counts, counts.sum(axis=0))}


# expert 0 is asked by group 0, expert 1 by group 1, experts 2 to 5 by both
OF_0, OF_1 = [0, 0, 0, 2, 3, 4, 5, 1], [1, 1, 1, 2, 3, 4, 5, 0]
BOTH = [[0, 1]] * 4


def test_experts_that_their_group_lives_on():
    one, found = check([[0, 1], [0, 1], *BOTH], {0: [OF_0] * 5, 1: [OF_1] * 5})
    mine = found[0, "nothing"]
    assert mine.experts == (0,)
    assert (mine.share, mine.elsewhere) == pytest.approx((3 / 8, 1 / 8))
    # group 0 loses what expert 0 said of 3 of 8 tokens, group 1 of 1 of 8
    assert (mine.own, mine.others, mine.value) == pytest.approx((3 / 8, 1 / 8, 2 / 8))
    assert mine.ruling == "supported"
    assert max(mine.null) <= 0, "the other experts are asked by both, or by the other group"
    assert [step["n"] for step in mine.curve] == [1]
    replaced = found[0, "next"]
    assert replaced.value == pytest.approx(0), "expert 1 knows group 0 as well"
    assert replaced.ruling == "not supported"
    assert one.n_texts == [5, 5]
    passes = one.passes
    one.without(0, [0], "nothing")
    assert one.passes == passes, "what is known is not measured again"


def test_experts_that_the_others_live_on():
    """Group 0 asks for expert 0, but it knows group 1 alone."""
    _, found = check([[1], [0, 1], *BOTH], {0: [OF_0] * 5, 1: [[1, 1, 0, 0, 2, 3, 4, 5]] * 5})
    mine = found[0, "nothing"]
    assert (mine.experts, mine.own, mine.others) == ((0,), 0.0, pytest.approx(2 / 8))
    assert mine.ruling == "contrary"


def test_one_text_of_five_supports_nothing():
    """Expert 0 is asked by a single text of group 0; with other texts drawn the difference would be none."""
    texts = {0: [[0] * 8, *[[2, 3, 5, 5, 2, 3, 2, 1]] * 4], 1: [[2, 3, 5, 5, 2, 3, 1, 0]] * 5}
    _, found = check([[0, 1], [0, 1], *BOTH], texts)
    mine = found[0, "nothing"]
    assert mine.experts == (0,)
    assert mine.value == pytest.approx(8 / 40 - 1 / 8)
    assert mine.low == pytest.approx(-1 / 8)
    assert mine.ruling == "not supported"
