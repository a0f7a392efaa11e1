"""Batches of a task's examples: endless and resumable for training, each example once for evaluation."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moekit.config.errors import ConfigError, DataError, require
from moekit.data.encoding.targets import IGNORED
from moekit.data.encoding.whole import EncodedExamples

# so many batches are sorted by length together: little padding, and still another mix in every epoch
TOGETHER = 16


@dataclass(frozen=True)
class TaskBatch:
    """Some examples.

    Attributes: inputs: the arrays of each stem; targets: of each head, empty where there are none; rows `[B]`: their
        places in the split.
    """

    inputs: Mapping[str, Mapping[str, Tensor]]
    targets: Mapping[str, Tensor]
    rows: Tensor

    def split(self, n: int) -> list[TaskBatch]:
        """`n` batches of equally many examples, in order. Errors: `ConfigError` where they do not divide."""
        require(n >= 1 and len(self.rows) % n == 0, "train.accumulation", n,
                f"must divide the examples of a batch ({len(self.rows)})")  # fmt: skip
        if n == 1:
            return [self]
        parts = torch.arange(len(self.rows)).chunk(n)
        return [
            TaskBatch(
                {
                    name: {key: array[part] for key, array in arrays.items()}
                    for name, arrays in self.inputs.items()
                },
                {name: array[part] for name, array in self.targets.items()},
                self.rows[part],
            )
            for part in parts
        ]

    def to(self, device: torch.device | str) -> TaskBatch:
        """The batch on a device."""
        inputs = {
            name: {key: array.to(device, non_blocking=True) for key, array in arrays.items()}
            for name, arrays in self.inputs.items()
        }
        targets = {name: array.to(device, non_blocking=True) for name, array in self.targets.items()}
        return TaskBatch(inputs, targets, self.rows)

    def arguments(self) -> dict[str, Any]:
        """What the model is called with."""
        return {"inputs": self.inputs, "targets": self.targets or None}

    @property
    def n_targets(self) -> int:
        """Targets that count, as the heads count them: of several heads, those of the one that has most."""
        return max((count_known(array) for array in self.targets.values()), default=len(self.rows))

    @property
    def n_tokens(self) -> int:
        """Examples: what the speed of training counts."""
        return len(self.rows)


def count_known(targets: Tensor) -> int:
    """Numbers of classes, tags or tokens that are not -100; of real numbers, examples with one that is known.

    >>> count_known(torch.tensor([[3, 4, -100], [5, -100, -100]])), count_known(torch.tensor([[1.0], [torch.nan]]))
    (3, 1)
    """
    if targets.is_floating_point():
        return int((~targets.isnan()).reshape(len(targets), -1).any(dim=1).sum())
    return int((targets != IGNORED).sum())


class TaskLoader:
    """Endless batches, every epoch in another order, whose position is two integers.

    Examples of like length stand together. What does not fill a batch at the end of an epoch is left out, other
    examples each time.

    Errors: `DataError` where there are fewer examples than a batch takes.
    """

    def __init__(self, data: EncodedExamples, batch_size: int, seed: int = 0) -> None:
        require(batch_size >= 1, "train.batch_size", batch_size, "must be at least 1")
        if len(data) < batch_size:
            raise DataError(
                f"the training split has {len(data)} examples, a batch takes {batch_size}. "
                "Give more, or lower train.batch_size"
            )
        self.data, self.batch_size, self.seed = data, batch_size, seed
        self.batches_per_epoch = len(data) // batch_size
        self._lengths = data.lengths
        self._epoch, self._position, self._loaded = 0, 0, -1

    @property
    def tokens_per_batch(self) -> int:
        return self.batch_size

    def next_batch(self) -> TaskBatch:
        """The next batch; moves the position on."""
        if self._loaded != self._epoch:
            self._order = self._batches(np.random.Generator(np.random.PCG64([self.seed, self._epoch])))
            self._loaded = self._epoch
        rows = self._order[self._position]
        rng = np.random.Generator(np.random.PCG64([self.seed, self._epoch, self._position + 1]))
        self._position += 1
        if self._position == self.batches_per_epoch:
            self._epoch, self._position = self._epoch + 1, 0
        return batch_of(self.data, rows, rng)

    def _batches(self, rng: np.random.Generator) -> np.ndarray:
        order = rng.permutation(len(self.data))[: self.batches_per_epoch * self.batch_size]
        if self._lengths.any():
            step = TOGETHER * self.batch_size
            parts = [order[start : start + step] for start in range(0, len(order), step)]
            order = np.concatenate([part[np.argsort(self._lengths[part], kind="stable")] for part in parts])
        found = order.reshape(-1, self.batch_size)
        return found[rng.permutation(len(found))]

    def layout(self) -> dict[str, Any]:
        """What a position is bound to, by configuration key."""
        return {"train.batch_size": self.batch_size, "train.seed": self.seed, "data": len(self.data)}

    def state_dict(self) -> dict[str, int]:
        """The position: batches taken in the current epoch, and the epoch."""
        return {"epoch": self._epoch, "position": self._position}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Go to a position that `state_dict` gave. Errors: `ConfigError` for one that does not exist."""
        epoch, position = int(state["epoch"]), int(state["position"])
        if epoch < 0 or not 0 <= position < self.batches_per_epoch:
            raise ConfigError(
                f"data position must lie in {self.batches_per_epoch} batches; got {dict(state)!r}. "
                "Resume with the batch_size of the run"
            )
        self._epoch, self._position = epoch, position


def batch_of(data: EncodedExamples, rows: np.ndarray, rng: np.random.Generator | None = None) -> TaskBatch:
    """The batch of these examples; `rng` in training."""
    inputs, targets = data.arrays(rows, rng)
    return TaskBatch(inputs, targets, torch.from_numpy(rows))


def task_batches(
    data: EncodedExamples, batch_size: int, max_batches: int | None = None
) -> Iterator[TaskBatch]:
    """Every example once, those of like length together; `max_batches` takes an even sample of the batches."""
    order = np.argsort(data.lengths, kind="stable")
    starts = list(range(0, len(order), batch_size))
    if max_batches is not None and len(starts) > max_batches:
        starts = [starts[int(i)] for i in np.linspace(0, len(starts) - 1, max_batches)]
    for start in starts:
        yield batch_of(data, order[start : start + batch_size])
