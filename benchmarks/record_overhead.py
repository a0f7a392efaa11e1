"""What the routing record costs in training: steps and validations of trainers with and without, taken in turn.

    python benchmarks/record_overhead.py [--steps 60] [--layers 4] [--experts 16] [--json FILE]

All trainers have the same weights and data, so that every step computes the same; a turn is one step of each, in an
order that moves on. Compared are medians over the turns of processor time (of one thread: other programs on the machine
do not count) and of real time for saving. A run is taken to validate and save every 100 steps.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from moekit.config.train import RunConfig
from moekit.data.packing import TokenizedSplit
from moekit.models import build_model
from moekit.train.alarms import RoutingWatch
from moekit.train.loop import Trainer
from moekit.train.material import TextMaterial
from moekit.train.observing import TrainingRecord
from moekit.train.validation import loss_over

WAYS: dict[str, dict[str, Any]] = {
    "plain": {"alarms": None},
    "alarms": {},
    "counts": {"alarms": None, "record": {"tokens": 0, "every": 10}},
    "tokens": {"alarms": None, "record": {"tokens": 1024, "every": 10}},
}


@dataclass
class Way:
    """One trainer with what it keeps, and the seconds that it took."""

    trainer: Trainer
    steps: Iterator[Any]
    watch: RoutingWatch
    record: TrainingRecord | None
    material: Any
    step_seconds: list[float] = field(default_factory=list)
    validation_seconds: list[float] = field(default_factory=list)
    save_seconds: list[float] = field(default_factory=list)

    def step(self) -> None:
        began = time.process_time()
        next(self.steps)
        if self.record is not None:
            self.record.add(self.trainer.step, self.trainer.last_stats)
        self.watch.step(self.trainer.last_stats)
        self.step_seconds.append(time.process_time() - began)

    def validate(self) -> float:
        began = time.process_time()
        recorder = None if self.record is None else self.record.recorder()

        def observe(batch: Any, out: Any) -> None:
            if recorder is not None:
                self.material.observe(recorder, batch, out, self.trainer.step)

        trainer = self.trainer
        result = loss_over(trainer.model, self.material.validation(), trainer.device, trainer.dtype, observe)
        if self.record is not None and recorder is not None:
            self.record.keep(recorder, trainer.step)
        self.validation_seconds.append(time.process_time() - began)
        return result.mean

    def save(self, folder: Path) -> None:
        began = time.perf_counter()
        if self.record is not None:
            self.record.save(folder)
        self.save_seconds.append(time.perf_counter() - began)


class _Text(TextMaterial):
    """Random tokens."""

    def __init__(self, config: RunConfig) -> None:
        rng = np.random.Generator(np.random.PCG64(0))
        self.config = config
        self.data: Any = argparse.Namespace(train=_split(rng, 200_000), validation=_split(rng, 40_000))


def _split(rng: np.random.Generator, n: int) -> TokenizedSplit:
    offsets = np.append(np.arange(0, n, 400), n)
    tokens = rng.integers(1, 4096, n).astype(np.uint16)
    tokens[offsets[:-1]] = 0
    n_documents = len(offsets) - 1
    names = tuple(map(str, range(n_documents)))
    domains = ("a", "b", "c", "d")
    of_document = np.arange(n_documents, dtype=np.int32) % len(domains)
    return TokenizedSplit(tokens, offsets, of_document, 4 * np.diff(offsets), domains, names, 0)


def way(config: RunConfig, **train: Any) -> Way:
    config = config.replace(train=type(config.train).from_dict({**config.train.to_dict(), **train}))
    torch.manual_seed(0)
    model, material = build_model(config.model), _Text(config)
    trainer = Trainer(model, config.train, material.loader())
    record = None
    if config.train.record is not None:
        record = TrainingRecord(config.train.record, model, material.groups(), material.validation)
    return Way(trainer, trainer.steps(), RoutingWatch(model, config.train), record, material)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for name, default in (("steps", 60), ("layers", 4), ("experts", 16), ("width", 128)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    config = RunConfig.from_dict({
        "model": {"vocab_size": 4096, "d_model": given.width, "n_layers": given.layers, "n_heads": 4,
                  "max_seq_len": 128,
                  "moe": {"n_experts": given.experts, "top_k": 2, "d_expert": given.width}},
        "data": {"seq_len": 128},
        "train": {"steps": 10 * given.steps, "batch_size": 16, "device": "cpu"},
    })  # fmt: skip
    ways = {name: way(config, **train) for name, train in WAYS.items()}
    names = list(ways)
    losses = {}
    for turn in range(given.steps):
        moved = names[turn % len(names) :] + names[: turn % len(names)]
        for name in moved:
            ways[name].step()
        if turn % 10 == 9:
            for name in moved:
                losses[name] = ways[name].validate()
                with tempfile.TemporaryDirectory() as folder:
                    ways[name].save(Path(folder))
    if len(set(losses.values())) != 1:
        raise SystemExit(f"the losses differ: {losses}")
    every = config.train.validate_every
    answer = {}
    for name, one in ways.items():
        step, validation = statistics.median(one.step_seconds), statistics.median(one.validation_seconds)
        save = statistics.median(one.save_seconds)
        whole = step + (validation + save) / every
        answer[name] = {"step_ms": 1e3 * step, "validation_ms": 1e3 * validation, "save_ms": 1e3 * save,
                        "whole_ms_a_step": 1e3 * whole}  # fmt: skip
    for name, row in answer.items():
        row["overhead"] = row["whole_ms_a_step"] / answer["plain"]["whole_ms_a_step"] - 1
        print(f"{name:7} step {row['step_ms']:7.2f} ms  validation {row['validation_ms']:7.1f} ms  "
              f"save {row['save_ms']:5.1f} ms  overhead {row['overhead']:+.1%}")  # fmt: skip
    if given.json is not None:
        given.json.write_text(json.dumps(answer, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
