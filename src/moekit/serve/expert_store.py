"""Experts of all layers in a bounded number of slots: read when needed, kept while they are, foreseen by a thread.

    needed ─► in a slot: hit │ being read: late │ else: a slot is free or its expert leaves, read: miss
    foreseen ─► the thread reads them into slots of experts that neither compute nor are foreseen

Layers whose experts have the same form share slots; the stack of them is what the kernels read, so an expert is copied
once, from the file to its slot.
"""

from __future__ import annotations

import statistics
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from moekit.config.errors import ConfigError, MoekitError, require
from moekit.kernels.expert_weights import ExpertWeights
from moekit.serve.eviction import Policy

ExpertKey = tuple[int, int]  # sparse layer, expert
# Foreseeing a layer and handing its experts to a thread takes time as well: experts that are read faster than this are
# better waited for (benchmarks/disk_experts.py)
PAYING_SECONDS, DECIDING_READS = 1e-3, 32
Fill = Callable[[ExpertKey, ExpertWeights, int], int]  # reads an expert into a slot; bytes that were read


@dataclass
class StoreCounts:
    """What a store did since it was opened, or since `reset`.

    Attributes:
        needed: experts that were asked for, once for each part of a call.
        hits: of these, in a slot already; `foreseen` of them because the thread had just read them.
        late: being read by the thread when they were asked for.
        misses: read while the model waited.
        read_ahead: experts that the thread read. unused: of these, those that left without being asked for.
        bytes_read: by both.
        seconds_waited: of the model, for misses and late ones.
    """

    needed: int = 0
    hits: int = 0
    foreseen: int = 0
    late: int = 0
    misses: int = 0
    read_ahead: int = 0
    unused: int = 0
    bytes_read: int = 0
    seconds_waited: float = 0.0

    @property
    def hit_rate(self) -> float:
        return self.hits / self.needed if self.needed else 1.0

    def report(self) -> dict[str, Any]:
        """JSON-ready."""
        return {**asdict(self), "hit_rate": self.hit_rate}


class Shelf:
    """Slots of one form of experts.

    Args:
        weights: the stacks, with a place for each slot.
        layers: experts of each layer that shares them, by its number.
        at_once: slots that a call may fill at the same time.
        policy: chooses what leaves.
    """

    def __init__(
        self, weights: ExpertWeights, layers: Mapping[int, int], at_once: int, policy: Policy
    ) -> None:
        self.weights, self.layers, self.at_once, self.policy = weights, dict(layers), at_once, policy
        self.slot_of: dict[ExpertKey, int] = {}
        self.free = list(range(weights.n_stacked - 1, -1, -1))

    @property
    def n_slots(self) -> int:
        return self.weights.n_stacked


class ExpertStore:
    """Slots of all shelves, the thread that reads ahead, and the account of both.

    Args:
        shelves: of the layers.
        fill: reads an expert.
        read_ahead: whether a thread reads what is foreseen; None: where reading an expert takes so long that it pays,
            by the first ones that are needed (`PAYING_SECONDS`).
        trace: keep the groups of keys that were asked for in `trace`.

    Any number of threads may use the model at the same time. `close` ends the thread; a store that was closed serves no
    more. Errors of the files come out of the call that needs the expert.
    """

    def __init__(
        self, shelves: Sequence[Shelf], fill: Fill, *, read_ahead: bool | None = None, trace: bool = False
    ) -> None:
        self.shelves, self._fill = list(shelves), fill
        self._shelf_of = {layer: shelf for shelf in self.shelves for layer in shelf.layers}
        self.counts = StoreCounts()
        self.trace: list[tuple[ExpertKey, ...]] | None = [] if trace else None
        self._change = threading.Condition()
        self._reading: set[ExpertKey] = set()
        self._pins: dict[ExpertKey, int] = {}
        self._foreseen: set[ExpertKey] = set()  # nothing that is foreseen leaves for another of them
        self._fresh: set[ExpertKey] = set()  # read ahead, not asked for yet
        self._queue: deque[ExpertKey] = deque()
        self._closed = False
        self._thread: threading.Thread | None = None
        self._undecided = read_ahead is None
        self._first_reads: list[float] = []
        if read_ahead:
            self._start()

    @property
    def reads_ahead(self) -> bool:
        """Whether the thread runs: foreseeing is worth its time."""
        return self._thread is not None

    # --- for the layers

    def places(self, layer: int) -> LayerPlaces:
        """The experts of a layer, as `StoredMLP` asks for them."""
        return LayerPlaces(self, self._shelf_of[layer], layer)

    @contextmanager
    def held(self, keys: Sequence[ExpertKey], then: Sequence[ExpertKey] = ()) -> Iterator[list[int]]:
        """Slots of the experts of one layer, which stay there inside; `then` are read ahead meanwhile."""
        slots = self._take(keys)
        try:
            self.foresee(then)
            yield slots
        finally:
            self._let_go(keys)

    def foresee(self, keys: Sequence[ExpertKey]) -> None:
        """Have the thread read what will probably be needed next, the first one first; drops older wishes."""
        if self._thread is None:
            return
        with self._change:
            self._foreseen = set(keys)
            self._queue = deque(key for key in keys if key not in self._shelf_of[key[0]].slot_of)
            if self._queue:
                self._change.notify_all()

    # --- for the owner

    def preload(self, keys: Sequence[ExpertKey]) -> None:
        """Read experts into free slots, as far as there are any; counts nothing."""
        for key in keys:
            shelf = self._shelf_of[key[0]]
            with self._change:
                if key in shelf.slot_of or not shelf.free:
                    continue
                slot = self._assign(shelf, key)
            self._read(shelf, key, slot)

    def reset(self) -> None:
        """Begin to count anew; what is in the slots stays."""
        with self._change:
            self.counts = StoreCounts()
            self._fresh.clear()
            if self.trace is not None:
                self.trace = []

    def clear(self) -> None:
        """Empty all slots that nothing computes with."""
        with self._change:
            self._queue.clear()
            self._change.wait_for(lambda: not self._reading)
            for shelf in self.shelves:
                for key in [key for key in shelf.slot_of if key not in self._pins]:
                    self._forget(shelf, key)

    def wait(self) -> None:
        """Until the thread has read all that is foreseen; for tests and measurements."""
        with self._change:
            self._change.wait_for(lambda: not self._queue and not self._reading)

    def close(self) -> None:
        """End the thread. A read that is under way is finished."""
        with self._change:
            self._closed = True
            self._queue.clear()
            self._change.notify_all()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()

    # --- inside

    def _start(self) -> None:
        self._thread = threading.Thread(target=self._read_ahead, name="experts", daemon=True)
        self._thread.start()

    def _decide(self, seconds: float) -> None:
        """Take note of how long an expert took that the model waited for."""
        with self._change:
            self._first_reads.append(seconds)
            if len(self._first_reads) == DECIDING_READS:
                self._undecided = False
                if statistics.median(self._first_reads) >= PAYING_SECONDS and not self._closed:
                    self._start()

    def _take(self, keys: Sequence[ExpertKey]) -> list[int]:
        shelf = self._shelf_of[keys[0][0]]
        require(len(keys) <= shelf.n_slots, "experts", len(keys), f"must fit the slots ({shelf.n_slots})")
        began = time.perf_counter()
        missing: list[tuple[ExpertKey, int]] = []
        with self._change:
            self._queue.clear()  # what was foreseen and is not read yet comes too late
            self._change.wait_for(lambda: self._closed or self._room(shelf, keys))
            if self._closed:
                raise ConfigError("the model was closed, and its experts with it. Open it again")
            if self.trace is not None:
                self.trace.append(tuple(keys))
            late = []
            for key in keys:
                self._pins[key] = self._pins.get(key, 0) + 1
            for key in keys:
                if key not in shelf.slot_of:
                    missing.append((key, self._assign(shelf, key)))
                elif key in self._reading:
                    late.append(key)
                else:
                    self.counts.hits += 1
                    self.counts.foreseen += key in self._fresh
                shelf.policy.use(key)
                self._fresh.discard(key)
            self.counts.needed += len(keys)
            self.counts.late += len(late)
            self.counts.misses += len(missing)
        waited = bool(missing or late)
        try:
            while missing:
                started = time.perf_counter()
                self._read(shelf, *missing.pop(0))
                if self._undecided:
                    self._decide(time.perf_counter() - started)
            if late:
                self._wait_for(shelf, late)
        except BaseException:
            with self._change:
                for key, _ in missing:  # given slots, and never read
                    self._reading.discard(key)
                    self._forget(shelf, key)
            self._let_go(keys)
            raise
        if waited:
            self.counts.seconds_waited += time.perf_counter() - began
        return [shelf.slot_of[key] for key in keys]

    def _wait_for(self, shelf: Shelf, late: Sequence[ExpertKey]) -> None:
        for key in late:
            with self._change:
                while key in self._reading or not self._room(shelf, [key]):
                    self._change.wait()
                slot = None if key in shelf.slot_of else self._assign(shelf, key)
            if slot is not None:  # the other thread failed: whatever it was comes out here
                self._read(shelf, key, slot)

    def _let_go(self, keys: Sequence[ExpertKey]) -> None:
        with self._change:
            for key in keys:
                self._pins[key] -= 1
                if not self._pins[key]:
                    del self._pins[key]
            self._change.notify_all()

    def _room(self, shelf: Shelf, keys: Sequence[ExpertKey]) -> bool:
        """Whether all of `keys` find a slot now."""
        missing = sum(key not in shelf.slot_of for key in keys)
        bound = {key for key in (*self._pins, *self._reading, *keys) if key in shelf.slot_of}
        return len(shelf.free) + len(shelf.slot_of) - len(bound) >= missing

    def _assign(self, shelf: Shelf, key: ExpertKey, spare: bool = False) -> int:
        """A slot for an expert that is going to be read; with `spare` -1 where only foreseen ones could leave."""
        if not shelf.free:
            kept = self._pins.keys() | self._reading
            leaving = shelf.policy.victim(kept | self._foreseen)
            if leaving is None and not spare:
                leaving = shelf.policy.victim(kept)
            if leaving is None:
                return -1
            self._forget(shelf, leaving)  # type: ignore[arg-type]
        slot = shelf.free.pop()
        shelf.slot_of[key] = slot
        shelf.policy.add(key)
        self._reading.add(key)
        return slot

    def _forget(self, shelf: Shelf, key: ExpertKey) -> None:
        shelf.policy.remove(key)
        shelf.free.append(shelf.slot_of.pop(key))
        if key in self._fresh:
            self._fresh.discard(key)
            self.counts.unused += 1

    def _read(self, shelf: Shelf, key: ExpertKey, slot: int, ahead: bool = False) -> None:
        n_bytes, done = 0, False
        try:
            n_bytes = self._fill(key, shelf.weights, slot)
            done = True
        finally:
            with self._change:
                self._reading.discard(key)
                self.counts.bytes_read += n_bytes
                if not done:
                    self._forget(shelf, key)
                elif ahead:
                    self.counts.read_ahead += 1
                    if key not in self._pins:
                        self._fresh.add(key)
                self._change.notify_all()

    def _read_ahead(self) -> None:
        while True:
            with self._change:
                self._change.wait_for(lambda: self._queue or self._closed)
                if self._closed:
                    return
                key = self._queue.popleft()
                shelf = self._shelf_of[key[0]]
                slot = -1 if key in shelf.slot_of else self._assign(shelf, key, spare=True)
                if slot < 0:
                    self._change.notify_all()
                    continue
            try:
                self._read(shelf, key, slot, ahead=True)
            except MoekitError:
                continue  # the call that needs the expert reads it again and says what is wrong


class LayerPlaces:
    """One layer's experts in a store; see `moekit.layers.stored_experts.ExpertPlaces`.

    Attributes:
        expected: experts of the layer behind this one that are foreseen; a predictor sets them.
    """

    def __init__(self, store: ExpertStore, shelf: Shelf, layer: int) -> None:
        self.store, self.shelf, self.layer = store, shelf, layer
        self.n_experts = shelf.layers[layer]
        self.expected: Sequence[ExpertKey] = ()

    @property
    def weights(self) -> ExpertWeights:
        return self.shelf.weights

    def parts(self, experts: Sequence[int]) -> list[list[int]]:
        n = self.shelf.at_once
        return [list(experts[first : first + n]) for first in range(0, len(experts), n)]

    @contextmanager
    def held(self, experts: Sequence[int], then: Sequence[int] = ()) -> Iterator[Tensor]:
        keys = [(self.layer, expert) for expert in experts]
        following = [(self.layer, expert) for expert in then] if then else self.expected
        with self.store.held(keys, following) as slots:
            places = torch.full((self.n_experts,), -1, dtype=torch.int64)
            places[list(experts)] = torch.tensor(slots)
            yield places
