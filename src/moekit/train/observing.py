"""The routing record of a run that trains: a history of choices, and the same validation tokens at each validation.

The sums of the record (counts, probabilities, pairs...) are those of the last validation. Its rows are of every
validation, told apart by `token/step`; `explain.measures.saturation` compares them. The history is of training itself.

Shape legend: E choices of a layer, S moments.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from moekit.config.errors import DataError
from moekit.config.train import RecordConfig
from moekit.layers.statistics import RoutingStats
from moekit.observe.record import RoutingRecord, joined
from moekit.observe.recorder import Recorder, layers_of

FOLDER = "routing"


class TrainingRecord:
    """Collects the record of one run.

    Args:
        config: what is kept.
        model: with sparse layers.
        groups: of validation.
        validation: gives the batches of a validation; counted once, to draw equally many tokens of each.
    """

    def __init__(
        self, config: RecordConfig, model: nn.Module, groups: Sequence[str], validation: Callable[[], Iterable[Any]]
    ) -> None:  # fmt: skip
        self.config, self.layers, self.groups = config, layers_of(model), tuple(groups)
        n_batches = sum(1 for _ in validation()) if config.tokens else 1
        self._per_batch = math.ceil(config.tokens / max(n_batches, 1))
        self._sums: dict[str, np.ndarray] = {}
        self._rows: dict[str, list[np.ndarray]] = {}
        self._history: list[_Moment] = []
        self._open = _Moment.empty([layer.n_experts for layer in self.layers])
        self._step, self._read_at = 0, 0

    def add(self, step: int, stats: Sequence[RoutingStats]) -> None:
        """The routing of one optimizer step."""
        self._open.add(stats)
        self._step = step
        if step % self.config.every == 0:
            self._close()

    def _close(self) -> None:
        self._open.step = self._step
        self._history.append(self._open)
        self._open = _Moment.empty([layer.n_experts for layer in self.layers])

    def recorder(self) -> Recorder:
        """For one validation; it draws the same tokens each time."""
        return Recorder(
            self.layers, self.groups, source="training", most=self.config.tokens, per_batch=self._per_batch
        )

    def keep(self, recorder: Recorder, step: int) -> None:
        """Take over what a recorder has of the validation at `step`."""
        self._sums = {}
        for name, array in recorder.record().arrays.items():
            if "token/" in name:
                self._rows.setdefault(name, []).append(array)
            else:
                self._sums[name] = array
        self._step = self._read_at = step

    def record(self, **info: Any) -> RoutingRecord:
        """What there is so far; the last moment may be shorter than the others."""
        arrays = self._sums or dict(self.recorder().record().arrays)
        arrays = {**arrays, **{name: joined(*parts) for name, parts in self._rows.items()}}
        moments = list(self._history)
        if self._open.n_steps:
            self._open.step = self._step
            moments.append(self._open)
        if moments:
            arrays["history/step"] = np.array([moment.step for moment in moments], dtype=np.int64)
            for number in range(len(self.layers)):
                arrays[f"{number}/history"] = np.stack([moment.counts[number] for moment in moments])
                arrays[f"{number}/history_entropy"] = np.array(
                    [moment.mean_entropy(number) for moment in moments]
                )
        said = {"step": self._step, "split": "validation", "sums_of_step": self._read_at,
                "every": self.config.every, "tokens_each_time": self.config.tokens}  # fmt: skip
        return RoutingRecord(self.layers, self.groups, "training", arrays, {**said, **info})

    def save(self, folder: Path, **info: Any) -> None:
        """Write the record; each of its files appears whole or not at all."""
        self.record(**info).save(folder)

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps, as JSON: the moment that is not over."""
        return {"closed": self._history[-1].step if self._history else 0, "open": self._open.state()}

    def load(self, state: Mapping[str, Any] | None, folder: Path, step: int) -> None:
        """Go on from the checkpoint of `step`; what was recorded after it is left out.

        A run that kept no record until now, or one whose record is lost, begins one: with a warning in that case.
        """
        self._step = step
        if state is None:
            return
        try:
            found = RoutingRecord.load(folder)
        except DataError as error:
            warnings.warn(f"the routing record begins anew at step {step}: {error}", stacklevel=2)
            return
        if found.layers != self.layers or found.groups != self.groups:
            warnings.warn(
                f"the routing record begins anew at step {step}: that of {folder} has other layers or groups",
                stacklevel=2,
            )
            return
        self._open = _Moment.of(state["open"])
        arrays = dict(found.arrays)
        self._history = _moments(arrays, len(self.layers), int(state["closed"]))
        rows = {name: array for name, array in arrays.items() if "token/" in name}
        if rows:
            kept = rows["token/step"] <= step
            self._rows = {name: [array[kept]] for name, array in rows.items()}
        self._sums = {
            name: array for name, array in arrays.items() if name not in rows and "history" not in name
        }
        self._read_at = int(found.info["sums_of_step"])


class _Moment:
    """Sums over some steps: of each layer choices `[E]`, entropy and tokens."""

    def __init__(
        self, counts: list[np.ndarray], entropy: list[float], tokens: list[int], n_steps: int = 0, step: int = 0
    ) -> None:  # fmt: skip
        self.counts, self.entropy, self.tokens, self.n_steps, self.step = (
            counts,
            entropy,
            tokens,
            n_steps,
            step,
        )

    @classmethod
    def empty(cls, sizes: Sequence[int]) -> _Moment:
        return cls([np.zeros(size, dtype=np.int64) for size in sizes], [0.0] * len(sizes), [0] * len(sizes))

    def add(self, stats: Sequence[RoutingStats]) -> None:
        for number, layer in enumerate(stats):
            self.counts[number] += layer.requested_per_expert.cpu().numpy()
            # a router without probabilities has no entropy
            known = bool(layer.prob_sum[0] != 0) or bool(layer.prob_sum.any())
            self.entropy[number] += float(layer.entropy_sum) if known else math.nan
            self.tokens[number] += int(layer.n_tokens)
        self.n_steps += 1

    def mean_entropy(self, number: int) -> float:
        return self.entropy[number] / max(self.tokens[number], 1)

    def state(self) -> dict[str, Any]:
        entropy = [None if math.isnan(value) else value for value in self.entropy]
        counts = [array.tolist() for array in self.counts]
        return {"counts": counts, "entropy": entropy, "tokens": list(self.tokens), "steps": self.n_steps}

    @classmethod
    def of(cls, state: Mapping[str, Any]) -> _Moment:
        counts = [np.array(row, dtype=np.int64) for row in state["counts"]]
        entropy = [math.nan if value is None else value for value in state["entropy"]]
        return cls(counts, entropy, list(state["tokens"]), state["steps"])


def _moments(arrays: Mapping[str, np.ndarray], n_layers: int, last: int) -> list[_Moment]:
    """Those up to the step `last`, as they stand in a record: means are kept as sums over one token."""
    if "history/step" not in arrays:
        return []
    found = []
    for row, step in enumerate(arrays["history/step"].tolist()):
        if step <= last:
            counts = [arrays[f"{number}/history"][row] for number in range(n_layers)]
            entropy = [float(arrays[f"{number}/history_entropy"][row]) for number in range(n_layers)]
            found.append(_Moment(counts, entropy, [1] * n_layers, 1, step))
    return found
