"""Policies on sequences that were worked out by hand, and Belady's bound above them all."""

from __future__ import annotations

import random

import pytest

from moekit.config.errors import ConfigError
from moekit.serve.eviction import AgedFrequency, LeastRecent, belady_hits, hits_of, make_policy


def each(keys):
    return [(key,) for key in keys]


class TestLeastRecent:
    def test_by_hand(self):
        # two slots: a b | a hit | c for b | b for a | a for c
        assert hits_of(each("abacba"), 2, LeastRecent()) == (1, 6)

    def test_a_cycle_larger_than_the_cache_never_hits(self):
        assert hits_of(each("abc" * 5), 2, LeastRecent()) == (0, 15)

    def test_what_is_kept_does_not_leave(self):
        policy = LeastRecent()
        for key in "abc":
            policy.add(key)
        assert policy.victim({"a", "b"}) == "c"
        assert policy.victim({"a", "b", "c"}) is None


class TestAgedFrequency:
    def test_by_hand(self):
        # two slots: a b | a a hits (a 3, b 1) | c for b, though b is no older than c would be | b for c | a hit
        assert hits_of(each("abaacba"), 2, AgedFrequency(half_life=1000)) == (3, 7)

    def test_keeps_the_frequent_one_of_a_cycle_where_lru_loses_it(self):
        trace = each("aabc" * 10)
        assert hits_of(trace, 2, AgedFrequency(1000))[0] > hits_of(trace, 2, LeastRecent())[0]

    def test_uses_age(self):
        # a was needed 8 times, long ago by a half-life of one use: two uses of b and c weigh more
        policy = AgedFrequency(half_life=1)
        for key in "aaaaaaaabbcc":
            policy.add(key)
            policy.use(key)
        assert policy.victim(()) == "a"
        steady = AgedFrequency(half_life=1000)
        for key in "aaaaaaaabbcc":
            steady.add(key)
            steady.use(key)
        assert steady.victim(()) == "b"

    def test_is_the_same_after_its_numbers_were_made_smaller(self):
        # 2 ** (1000 / 1) is beyond 1e100 after some hundred uses
        rng = random.Random(0)
        trace = each(rng.choices(range(6), k=2000))
        naive = _naive_aged_hits(trace, 3, half_life=1)
        assert hits_of(trace, 3, AgedFrequency(half_life=1))[0] == naive

    def test_begins_with_counts(self):
        policy = AgedFrequency(1000, {"a": 5.0, "b": 1.0})
        for key in "ab":
            policy.add(key)
        assert policy.victim(()) == "b"

    @pytest.mark.parametrize("seed", range(5))
    def test_heap_equals_a_search_of_all(self, seed):
        rng = random.Random(seed)
        trace = each(rng.choices(range(20), weights=range(1, 21), k=800))
        assert hits_of(trace, 7, AgedFrequency(50))[0] == _naive_aged_hits(trace, 7, 50)


def _naive_aged_hits(trace, slots, half_life):
    uses: dict = {}
    held: set = set()
    hits = 0
    for now, (key,) in enumerate(trace):

        def score(one, now=now):
            return sum(2.0 ** ((when - now) / half_life) for when in uses.get(one, ())), uses.get(one, [0])[
                -1
            ]

        hits += key in held
        if key not in held and len(held) == slots:
            held.remove(min(held, key=score))
        held.add(key)
        uses.setdefault(key, []).append(now)
    return hits


class TestGroups:
    def test_none_of_a_group_leaves_for_another_of_it(self):
        # two slots, a and b needed together: c leaves, not a, though a is the older one
        assert hits_of([("c",), ("a", "b"), ("a", "b")], 2, LeastRecent()) == (2, 5)

    def test_a_group_larger_than_the_cache_comes_one_by_one(self):
        assert hits_of([("a", "b", "c")], 2, LeastRecent()) == (0, 3)


class TestBelady:
    def test_by_hand(self):
        # three slots, the classical example: 7 0 1 2 0 3 0 4 2 3 0 3 2 1 2 0 1 7 0 1 has 9 faults
        trace = each([7, 0, 1, 2, 0, 3, 0, 4, 2, 3, 0, 3, 2, 1, 2, 0, 1, 7, 0, 1])
        assert belady_hits(trace, 3) == (11, 20)

    @pytest.mark.parametrize("seed", range(5))
    def test_is_above_the_policies(self, seed):
        rng = random.Random(seed)
        trace = each(rng.choices(range(12), weights=[3] * 4 + [1] * 8, k=500))
        best = belady_hits(trace, 5)[0]
        assert best > hits_of(trace, 5, LeastRecent())[0]
        assert best > hits_of(trace, 5, AgedFrequency(100))[0]


def test_names():
    assert isinstance(make_policy("lru", 4), LeastRecent)
    assert isinstance(make_policy("aged", 4), AgedFrequency)
    with pytest.raises(ConfigError, match=r"policy must be one of aged, lru; got 'lruu'. did you mean 'lru'"):
        make_policy("lruu", 4)
