"""What else stands in training beside an entity: the other films that a user rated, the others who rated a film."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moekit.config.errors import DataError
from moekit.config.task import ProfileInput, ProfileStemConfig
from moekit.data.encoding.base import Encoded, Encoder, filled
from moekit.data.encoding.fields import category, numbers
from moekit.data.examples import Examples

ROUNDS = 10  # of fitting the means of both columns to each other


class ProfileEncoder(Encoder):
    """The entries of each entity in training, `of` with its value, those of the example itself left out.

    Values count as differences from the mean of their `of` (the film's), in standard deviations of all. The means of
    both columns are fitted to each other in turns and drawn towards 0 (`shrink`), as biases of users and films are. The
    numbers beside the entries are their mean and the logarithm of how many they are.
    """

    kind = "profile"

    def __init__(
        self, config: ProfileInput, names: Mapping[str, list[str]], entries: Mapping[str, list[Any]]
    ) -> None:
        self.config = config
        self.names = {side: list(values) for side, values in names.items()}
        self.by = np.asarray(entries["by"], dtype=np.int64)  # from 1
        self.of = np.asarray(entries["of"], dtype=np.int64)
        self.values = np.asarray(entries["values"], dtype=np.float64)
        self._gather()

    @classmethod
    def fit(cls, config: ProfileInput, train: Examples) -> ProfileEncoder:
        columns = {"by": config.by, "of": config.of}
        found = {side: [category(value) for value in train[column]] for side, column in columns.items()}
        names = {side: sorted(set(values) - {""}) for side, values in found.items()}
        for side, column in columns.items():
            if not names[side]:
                raise DataError(f"column {column!r} must hold entities; all are empty")
        values = np.ones(len(train)) if config.value is None else numbers(train, config.value)
        kept = [
            row
            for row in range(len(train))
            if found["by"][row] and found["of"][row] and values[row] == values[row]
        ]
        entries: dict[str, list[Any]] = {"values": [float(values[row]) for row in kept]}
        for side in columns:
            numbered = {name: number for number, name in enumerate(names[side], 1)}
            entries[side] = [numbered[found[side][row]] for row in kept]
        return cls(config, names, entries)

    def _gather(self) -> None:
        """Sorted by entity, in an order of their own that changes nothing but what a sample holds."""
        shuffled = np.random.Generator(np.random.PCG64(0)).permutation(len(self.by))
        order = shuffled[np.argsort(self.by[shuffled], kind="stable")]
        self._of = self.of[order]
        sizes = np.bincount(self.by, minlength=len(self.names["by"]) + 1)
        self._starts = np.concatenate([[0], np.cumsum(sizes)])
        self._weights = np.zeros(len(order))
        if self.config.value is not None and len(self.values):
            spread = float(self.values.std()) or 1.0
            centred = (self.values - self.values.mean()) / spread
            of_mean, by_mean = np.zeros(len(self.names["of"]) + 1), np.zeros(len(self.names["by"]) + 1)
            for _ in range(ROUNDS):
                of_mean = self._means(self.of, centred - by_mean[self.by], len(of_mean))
                by_mean = self._means(self.by, centred - of_mean[self.of], len(by_mean))
            self._weights = (centred - of_mean[self.of])[order]

    def _means(self, groups: np.ndarray, values: np.ndarray, n: int) -> np.ndarray:
        counts = np.bincount(groups, minlength=n)
        return np.bincount(groups, values, n) / np.maximum(counts + self.config.shrink, 1e-9)

    def part(self) -> ProfileStemConfig:
        return ProfileStemConfig(size=len(self.names["of"]) + 1)

    def encode(self, examples: Examples) -> Encoded:
        found = []
        for side, column in (("by", self.config.by), ("of", self.config.of)):
            known = {name: number for number, name in enumerate(self.names[side], 1)}
            found.append(np.asarray([known.get(category(v), 0) for v in examples[column]], dtype=np.int64))
        return _Profiles(self, *found)

    def entries(self, by: int, own: int) -> tuple[np.ndarray, np.ndarray]:
        """Entities of the entries of `by` that are not of `own`, and their weights."""
        part = slice(self._starts[by], self._starts[by + 1])
        others = self._of[part] != own
        return self._of[part][others], self._weights[part][others]

    def state(self) -> dict[str, Any]:
        entries = {"by": self.by.tolist(), "of": self.of.tolist(), "values": self.values.tolist()}
        return {"names": self.names, "entries": entries}

    @classmethod
    def from_state(cls, config: ProfileInput, state: Mapping[str, Any]) -> ProfileEncoder:
        return cls(config, state["names"], state["entries"])


class _Profiles(Encoded):
    """Profiles of examples by the numbers of their two entities; 0 is unknown, and has no entries."""

    def __init__(self, encoder: ProfileEncoder, by: np.ndarray, of: np.ndarray) -> None:
        self.encoder, self.by, self.of = encoder, by, of

    def __len__(self) -> int:
        return len(self.by)

    def batch(self, rows: np.ndarray, rng: np.random.Generator | None = None) -> dict[str, Tensor]:
        config = self.encoder.config
        most = config.max_len
        ids, weights = [], []
        about, sizes = np.zeros((len(rows), 2), dtype=np.float32), np.zeros(len(rows), dtype=np.float32)
        for place, row in enumerate(rows):
            of, values = self.encoder.entries(self.by[row], self.of[row])
            if rng is not None:
                kept = rng.random(len(of)) < config.keep
                of, values = of[kept], values[kept]
            mean = values.sum() / max(len(values) + config.shrink, 1e-9)
            about[place] = mean, np.log1p(len(values)) / 5
            sizes[place] = len(values)
            if len(of) > most:
                of, values = of[:most], values[:most]  # they stand in a random order
            ids.append(of)
            weights.append((values - mean).astype(np.float32) if config.value else values.astype(np.float32))
        first = ids[0] if len(ids) else np.zeros(0, np.int64)
        longest = max((len(item) for item in ids), default=0)
        if longest == 0:  # a table is read once at least
            ids[0], weights[0] = np.zeros(1, first.dtype), np.zeros(1, np.float32)
        return {
            "ids": torch.from_numpy(filled(ids, 0)),
            "weights": torch.from_numpy(filled(weights, 0)),
            "numbers": torch.from_numpy(about),
            "sizes": torch.from_numpy(sizes),
        }
