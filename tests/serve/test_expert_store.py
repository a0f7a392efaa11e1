"""The store by itself: what is counted, what leaves, what two threads may do, and how it ends."""

from __future__ import annotations

import random
import threading
import time

import pytest
import torch

from moekit.config.errors import ConfigError, DataError
from moekit.kernels.expert_weights import ExpertWeights
from moekit.serve import expert_store
from moekit.serve.eviction import LeastRecent
from moekit.serve.expert_store import ExpertStore, Shelf

BYTES = 100


class Files:
    """Fills a slot with the number of its expert, 10 * layer + expert, and keeps a list of what was read."""

    def __init__(self, seconds: float = 0.0) -> None:
        self.read: list = []
        self.broken: set = set()
        self.seconds = seconds
        self.gate: threading.Event | None = None

    def __call__(self, key, weights, slot):
        if self.gate is not None:
            assert self.gate.wait(10)
        time.sleep(self.seconds)
        self.read.append(key)
        if key in self.broken:
            raise DataError(f"{key} is broken")
        weights.w_in[slot] = 10 * key[0] + key[1]
        return BYTES


def make(slots=3, layers=2, experts=6, files=None, at_once=None, **options):
    weights = ExpertWeights(torch.zeros(slots, 1, 1), torch.zeros(slots, 1, 1))
    shelf = Shelf(weights, dict.fromkeys(range(layers), experts), at_once or slots, LeastRecent())
    files = files or Files()
    return ExpertStore([shelf], files, **{"read_ahead": False, **options}), files


def values(store, keys):
    with store.held(keys) as slots:
        return [int(store.shelves[0].weights.w_in[slot]) for slot in slots]


@pytest.fixture
def ahead():
    store, files = make(read_ahead=True)
    yield store, files
    store.close()


class TestWithoutReadingAhead:
    def test_counts_and_contents(self):
        store, files = make()
        assert values(store, [(0, 1), (1, 2)]) == [1, 12]
        assert values(store, [(0, 1), (0, 3)]) == [1, 3]
        assert values(store, [(1, 5)]) == [15]  # (1, 2) leaves, the least recent one
        assert values(store, [(0, 1)]) == [1]
        assert files.read == [(0, 1), (1, 2), (0, 3), (1, 5)]
        counts = store.counts
        assert (counts.needed, counts.hits, counts.misses, counts.late) == (6, 2, 4, 0)
        assert counts.bytes_read == 4 * BYTES
        assert counts.hit_rate == 2 / 6

    def test_what_computes_stays(self):
        store, files = make()
        with store.held([(0, 0), (0, 1)]) as held:
            for expert in range(6):
                assert values(store, [(1, expert)]) == [10 + expert]
            assert [int(store.shelves[0].weights.w_in[slot]) for slot in held] == [0, 1]
        assert files.read.count((0, 0)) == 1

    def test_more_than_the_slots_at_once_is_refused(self):
        store, _ = make(slots=2)
        with pytest.raises(ConfigError, match=r"experts must fit the slots \(2\); got 3"):
            values(store, [(0, 0), (0, 1), (0, 2)])

    def test_a_file_that_breaks_leaves_the_store_whole(self):
        store, files = make()
        files.broken = {(0, 1)}
        with pytest.raises(DataError, match="broken"):
            values(store, [(0, 0), (0, 1), (0, 2)])
        assert store.shelves[0].slot_of.keys() == {(0, 0)}
        files.broken = set()
        assert values(store, [(0, 1), (0, 2), (1, 0)]) == [1, 2, 10]

    def test_preload_fills_what_is_free_and_counts_nothing(self):
        store, files = make(slots=2)
        store.preload([(0, 0), (0, 1), (0, 2)])
        assert files.read == [(0, 0), (0, 1)]
        assert store.counts.needed == 0
        store.reset()
        assert values(store, [(0, 0)]) == [0]
        assert store.counts.hits == 1

    def test_clear_and_trace(self):
        store, files = make(trace=True)
        values(store, [(0, 0), (0, 1)])
        store.clear()
        values(store, [(0, 0)])
        assert files.read == [(0, 0), (0, 1), (0, 0)]
        assert store.trace == [((0, 0), (0, 1)), ((0, 0),)]


class TestReadingAhead:
    def test_what_was_foreseen_is_there(self, ahead):
        store, _ = ahead
        store.foresee([(1, 4)])
        store.wait()
        assert values(store, [(1, 4)]) == [14]
        counts = store.counts
        assert (counts.hits, counts.foreseen, counts.misses, counts.read_ahead) == (1, 1, 0, 1)
        assert values(store, [(1, 4)]) == [14]
        assert store.counts.foreseen == 1  # the second time it was there anyway

    def test_what_is_read_at_the_moment_is_waited_for_and_not_read_twice(self, ahead):
        store, files = ahead
        files.gate = threading.Event()
        store.foresee([(1, 4)])
        while (1, 4) not in store.shelves[0].slot_of:
            time.sleep(0.001)
        threading.Timer(0.05, files.gate.set).start()
        assert values(store, [(1, 4)]) == [14]
        assert files.read == [(1, 4)]
        assert (store.counts.late, store.counts.hits, store.counts.misses) == (1, 0, 0)

    def test_a_wrong_guess_that_leaves_is_counted(self, ahead):
        store, _ = ahead
        store.foresee([(1, 4)])
        store.wait()
        for expert in range(3):
            values(store, [(0, expert)])
        assert store.counts.unused == 1

    def test_never_takes_a_slot_that_computes_or_is_foreseen(self, ahead):
        store, files = ahead
        with store.held([(0, 0), (0, 1)], then=[(1, 0), (1, 1), (1, 2)]):
            store.wait()
            assert set(files.read) == {
                (0, 0),
                (0, 1),
                (1, 0),
            }  # one slot was left, and is not taken from (1, 0)

    def test_a_file_that_breaks_is_said_by_the_call_that_needs_it(self, ahead):
        store, files = ahead
        files.broken = {(1, 4)}
        store.foresee([(1, 4)])
        store.wait()
        with pytest.raises(DataError, match="broken"):
            values(store, [(1, 4)])
        files.broken = set()
        assert values(store, [(1, 4)]) == [14]

    def test_late_and_broken_is_read_by_the_call(self, ahead):
        store, files = ahead
        files.gate, files.broken = threading.Event(), {(1, 4)}
        store.foresee([(1, 4)])
        while (1, 4) not in store.shelves[0].slot_of:
            time.sleep(0.001)
        caught = []

        def need():
            try:
                values(store, [(1, 4)])
            except DataError as error:
                caught.append(error)

        thread = threading.Thread(target=need)
        thread.start()
        files.gate.set()
        thread.join(10)
        assert len(caught) == 1

    def test_newer_wishes_replace_older_ones(self, ahead):
        store, files = ahead
        files.gate = threading.Event()
        store.foresee([(0, 0), (0, 1), (0, 2)])
        while not store.shelves[0].slot_of:
            time.sleep(0.001)
        store.foresee([(1, 5)])
        files.gate.set()
        store.wait()
        assert files.read == [(0, 0), (1, 5)]


class TestWhetherItPays:
    def test_slow_files_start_the_thread_and_fast_ones_do_not(self, monkeypatch):
        monkeypatch.setattr(expert_store, "DECIDING_READS", 3)
        monkeypatch.setattr(expert_store, "PAYING_SECONDS", 0.02)
        for seconds, pays in ((0.0, False), (0.03, True)):
            store, _ = make(files=Files(seconds), read_ahead=None)
            assert not store.reads_ahead
            for expert in range(3):
                values(store, [(0, expert)])
            assert store.reads_ahead == pays
            store.close()


class TestManyThreads:
    @pytest.mark.parametrize("read_ahead", [False, True])
    def test_each_gets_its_experts(self, read_ahead):
        store, _ = make(slots=5, layers=3, experts=8, read_ahead=read_ahead)
        wrong, n_threads = [], 4

        def work(seed):
            rng = random.Random(seed)
            for _ in range(150):
                layer = rng.randrange(3)
                keys = [(layer, expert) for expert in rng.sample(range(8), 2)]
                then = [((layer + 1) % 3, rng.randrange(8))]
                with store.held(keys, then) as slots:
                    found = [int(store.shelves[0].weights.w_in[slot]) for slot in slots]
                    time.sleep(0)
                    again = [int(store.shelves[0].weights.w_in[slot]) for slot in slots]
                if found != again or found != [10 * layer + expert for _, expert in keys]:
                    wrong.append((keys, found, again))

        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(n_threads)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert not any(thread.is_alive() for thread in threads)
        assert wrong == []
        counts = store.counts
        assert counts.needed == n_threads * 150 * 2 == counts.hits + counts.late + counts.misses
        store.close()

    def test_one_waits_until_another_lets_go(self):
        store, _ = make(slots=2)
        done = threading.Event()

        def other():
            values(store, [(1, 0), (1, 1)])
            done.set()

        with store.held([(0, 0), (0, 1)]):
            thread = threading.Thread(target=other)
            thread.start()
            assert not done.wait(0.05)
        assert done.wait(10)
        thread.join(10)


class TestTheEnd:
    def test_close_ends_the_thread_also_while_it_reads(self):
        store, files = make(read_ahead=True)
        files.gate = threading.Event()
        store.foresee([(0, 0), (0, 1)])
        while not store.shelves[0].slot_of:
            time.sleep(0.001)
        threading.Timer(0.05, files.gate.set).start()
        store.close()
        assert files.read == [(0, 0)]
        assert "experts" not in {thread.name for thread in threading.enumerate()}
        store.close()  # again

    def test_a_closed_store_says_so(self):
        store, _ = make()
        store.close()
        with pytest.raises(ConfigError, match="closed"):
            values(store, [(0, 0)])
