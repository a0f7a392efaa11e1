"""Which expert leaves when another needs its place: policies, and what each would have reached on a recorded text.

A key is (layer, expert). Policies see keys and nothing else: a sequence of keys is all a test or a forecast needs.

LRU is what Eliseev and Mazur (2023, arXiv 2312.17238) keep Mixtral's experts with. Frequencies that age follow
MoE-Infinity (Xue et al. 2024, arXiv 2401.14361): a text uses some experts again and again, not the latest ones again.
Belady's rule (1966) looks ahead and bounds what any rule without prefetch can reach.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict, defaultdict
from collections.abc import Container, Hashable, Iterable, Mapping, Sequence
from typing import Any, Protocol

from moekit.config.errors import ConfigError, nearest

Key = Hashable


class Policy(Protocol):
    """Keeps account of the keys that are in the cache."""

    def add(self, key: Key) -> None:
        """The key came into the cache."""
        ...

    def use(self, key: Key) -> None:
        """The key, in the cache, was needed."""
        ...

    def remove(self, key: Key) -> None:
        """The key left."""
        ...

    def victim(self, kept: Container[Key]) -> Key | None:
        """The key to leave next, none of `kept`; None where all are kept."""
        ...


class LeastRecent:
    """The key leaves that was not needed for the longest time.

    >>> policy = LeastRecent()
    >>> for key in ("a", "b", "c"):
    ...     policy.add(key)
    >>> policy.use("a")
    >>> policy.victim(()), policy.victim({"b"})
    ('b', 'c')
    """

    def __init__(self) -> None:
        self._order: OrderedDict[Key, None] = OrderedDict()

    def add(self, key: Key) -> None:
        self._order[key] = None

    def use(self, key: Key) -> None:
        self._order.move_to_end(key)

    def remove(self, key: Key) -> None:
        del self._order[key]

    def victim(self, kept: Container[Key]) -> Key | None:
        return next((key for key in self._order if key not in kept), None)


class AgedFrequency:
    """The key leaves that was needed least often, where a use counts half after `half_life` further uses of any key.

    Keys are remembered after they left: one that comes back often is soon kept. Equal ones leave in the order in which
    they were last needed.

    >>> policy = AgedFrequency(half_life=100)
    >>> for key in ("a", "b", "a", "c"):
    ...     policy.add(key)
    ...     policy.use(key)
    >>> policy.victim(()), policy.victim({"b"})    # a twice; b longer ago than c
    ('b', 'c')
    """

    def __init__(self, half_life: float, counts: Mapping[Key, float] | None = None) -> None:
        self._growth, self._weight = 2.0 ** (1 / half_life), 1.0
        self._score: dict[Key, float] = defaultdict(float, counts or {})
        self._held: set[Key] = set()
        # (score, when, key), the score possibly of before the last uses: a lower bound
        self._heap: list[tuple[float, int, Any]] = []
        self._queued: set[Key] = set()  # keys with an entry there, held or not
        self._last: dict[Key, int] = defaultdict(int)
        self._now = 0

    def add(self, key: Key) -> None:
        self._held.add(key)
        if key not in self._queued:
            self._queued.add(key)
            heapq.heappush(self._heap, (self._score[key], self._last[key], key))

    def use(self, key: Key) -> None:
        self._now += 1
        self._last[key] = self._now
        self._weight *= self._growth
        self._score[key] += self._weight
        if self._weight > 1e100:
            self._rescale()

    def remove(self, key: Key) -> None:
        self._held.discard(key)

    def victim(self, kept: Container[Key]) -> Key | None:
        passed: list[tuple[float, int, Any]] = []
        found = None
        while self._heap:
            entry = heapq.heappop(self._heap)
            key = entry[2]
            now = (self._score[key], self._last[key], key)
            if key not in self._held:
                self._queued.discard(key)
                continue
            if entry != now:
                heapq.heappush(self._heap, now)
                continue
            passed.append(entry)
            if key not in kept:
                found = key
                break
        for entry in passed:
            heapq.heappush(self._heap, entry)
        return found

    def _rescale(self) -> None:
        """The same order in smaller numbers."""
        for key in self._score:
            self._score[key] /= self._weight
        self._weight = 1.0
        self._heap = [(self._score[key], self._last[key], key) for key in self._held]
        heapq.heapify(self._heap)
        self._queued = set(self._held)


POLICIES = ("aged", "lru")
HALF_LIFE_TOKENS = 16  # after so many tokens a use counts half; 16 and 32 hold most of quickstart texts


def make_policy(name: str, uses_per_token: int, counts: Mapping[Key, float] | None = None) -> Policy:
    """The policy called `name`; `counts` are uses that were seen before, which "aged" begins with.

    Errors: `ConfigError` for an unknown name.
    """
    if name == "lru":
        return LeastRecent()
    if name == "aged":
        return AgedFrequency(HALF_LIFE_TOKENS * max(uses_per_token, 1), counts)
    raise ConfigError(f"policy must be one of {', '.join(POLICIES)}; got {name!r}. {nearest(name, POLICIES)}")


def hits_of(trace: Iterable[Sequence[Key]], slots: int, policy: Policy) -> tuple[int, int]:
    """Keys of a trace that a cache holds when they are needed, and all; without prefetch.

    `trace` is a list of groups that are needed at the same time; none of a group leaves for another of it. Of a group
    that is larger than the cache the keys come one by one.

    >>> hits_of([["a"], ["b"], ["a"], ["c"], ["b"]], 2, LeastRecent())
    (1, 5)
    """
    held: set[Key] = set()
    hits = needed = 0
    for group in trace:
        kept = group if len(group) <= slots else ()
        for key in group:
            needed += 1
            if key in held:
                hits += 1
            else:
                if len(held) == slots:
                    leaving = policy.victim(kept)
                    assert leaving is not None
                    policy.remove(leaving)
                    held.remove(leaving)
                policy.add(key)
                held.add(key)
            policy.use(key)
    return hits, needed


def belady_hits(trace: Iterable[Sequence[Key]], slots: int) -> tuple[int, int]:
    """As `hits_of` where the key leaves that is needed again last: no rule without prefetch has more hits.

    >>> belady_hits([["a"], ["b"], ["a"], ["c"], ["b"]], 2)
    (2, 5)
    """
    flat = [key for group in trace for key in group]
    following = [len(flat)] * len(flat)
    seen: dict[Key, int] = {}
    for place in range(len(flat) - 1, -1, -1):
        following[place] = seen.get(flat[place], len(flat))
        seen[flat[place]] = place
    next_use: dict[Key, int] = {}
    heap: list[tuple[int, Any]] = []
    hits = 0
    for place, key in enumerate(flat):
        if key in next_use:
            hits += 1
        elif len(next_use) == slots:
            while True:
                when, leaving = heapq.heappop(heap)
                if next_use.get(leaving) == -when:
                    del next_use[leaving]
                    break
        next_use[key] = following[place]
        heapq.heappush(heap, (-following[place], key))
    return hits, len(flat)
