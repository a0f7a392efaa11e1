"""Measures on cases worked by hand, and where nothing is to be found."""

from __future__ import annotations

import math

import numpy as np
import pytest

from moekit.explain import measures
from moekit.explain.nulls import specialisation_claim


def test_specialisation_of_groups_by_hand():
    """Of 8 tokens the groups have 4 each; expert 0 has 3 of the first, 1 of the second: ln 2 - H(3/4), over ln 2."""
    counts = np.array([[3, 1], [1, 3]])
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert measures.group_specialisation(counts) == pytest.approx((math.log(2) - entropy) / math.log(2))
    assert measures.group_specialisation(np.array([[2, 2], [0, 0]])) == 0.0, "one group tells nothing apart"
    assert measures.group_specialisation(np.zeros((2, 2))) == 0.0


def test_specialisation_of_ids_by_hand():
    """Id 5 goes to expert 0 three times of four, id 6 once of two; expert 0 has 3 + 1 tokens."""
    experts = np.array([[0], [0], [0], [1], [0], [1]])
    ids = np.array([5, 5, 5, 5, 6, 6])
    found = measures.vocabulary_specialisation(experts, ids, 3, least=2)
    assert found[0] == pytest.approx((3 * 0.75 + 1 * 0.5) / 4)
    assert found[1] == pytest.approx((1 * 0.25 + 1 * 0.5) / 2)
    assert math.isnan(found[2])
    only = measures.vocabulary_specialisation(experts, ids, 2, least=3)
    assert only.tolist() == [0.75, 0.25], "id 6 is too rare"
    unknown = np.where(ids == 6, -1, ids)
    assert measures.vocabulary_specialisation(experts, unknown, 2, least=1).tolist() == [0.75, 0.25]


def test_saturation_counts_common_choices():
    final = np.array([[0, 1], [2, -1], [3, 4]])
    assert measures.saturation(final, final) == 1.0
    assert measures.saturation(np.array([[1, 5], [0, -1], [4, 3]]), final) == pytest.approx((0.5 + 0 + 1) / 3)


def test_dead_and_overloaded_experts():
    requested = np.array([100, 0, 40, 20])
    assert measures.dead_experts(requested) == [1]
    assert measures.overloaded_experts(requested) == [0]
    assert measures.max_violation(requested) == pytest.approx(1.5)
    assert measures.load(requested).sum() == 1


def test_stability_of_routes():
    ids = np.tile(np.arange(4), 50)
    by_id = np.stack([ids, (ids + 1) % 4], axis=1)
    same, any_two = measures.route_stability(by_id, ids, 4)
    assert same == 1.0
    assert 0.3 < any_two < 0.7
    rng = np.random.default_rng(0)
    by_chance = rng.integers(0, 4, (200, 1))
    same, any_two = measures.route_stability(by_chance, ids, 4)
    assert abs(same - any_two) < 0.12
    assert math.isnan(measures.route_stability(by_id[:2], ids[:2], 4)[0])


def test_entropy_by_frequency():
    ids = np.array([1, 2, 2, 3, 3, 3, 3, -1])
    entropy = np.array([1.0, 2.0, 4.0, 0.0, 1.0, 2.0, 3.0, 99.0])
    assert measures.entropy_by_frequency(entropy, ids) == [(1, 1, 1.0), (2, 3, 3.0), (4, 7, 1.5)]


def tokens_of(rng, by_group: bool, n_texts: int = 60, length: int = 40):
    """Texts of three groups; choices follow the group in part, or nothing at all."""
    text = np.repeat(np.arange(n_texts), length)
    group = (text % 3).astype(np.int64)
    drawn = rng.integers(0, 6, len(text))
    followed = rng.random(len(text)) < (0.3 if by_group else 0.0)
    return np.where(followed, group * 2, drawn)[:, None], group, text


def test_a_claim_holds_where_experts_follow_groups():
    claim = specialisation_claim(*tokens_of(np.random.default_rng(0), True), 6, 3, rounds=60)
    assert claim.holds
    assert claim.low <= claim.value <= claim.high
    assert claim.value > 5 * max(claim.permuted, claim.random)


@pytest.mark.parametrize("seed", range(5))
def test_a_claim_does_not_hold_where_experts_are_drawn(seed):
    claim = specialisation_claim(*tokens_of(np.random.default_rng(seed), False), 6, 3, rounds=60)
    assert not claim.holds
    assert 0 < claim.value < 3 * claim.random


def test_few_tokens_and_many_experts_make_no_claim():
    """The figure's bias in a small sample is in the nulls once; in texts drawn from texts it is twice."""
    held = 0
    for seed in range(12):
        rng = np.random.default_rng(seed)
        text = np.arange(1500) // 60
        experts = rng.integers(0, 24, (1500, 2))
        held += specialisation_claim(experts, text % 3, text, 24, 3, rounds=60, seed=seed).holds
    assert held == 0


def test_texts_of_one_topic_are_no_specialisation_of_its_group():
    """Every text has an expert of its own choice: groups differ by the texts that they happen to have."""
    rng = np.random.default_rng(1)
    text = np.repeat(np.arange(12), 100)
    experts = rng.integers(0, 6, 12)[text][:, None]
    claim = specialisation_claim(experts, (text % 3).astype(np.int64), text, 6, 3, rounds=100)
    assert claim.value > 10 * claim.random, "a router that draws does not do this"
    assert not claim.holds, "but any other grouping of the texts looks the same"
