"""A task that trains in a second, as a user's own file, and draws that need no Optuna."""

from __future__ import annotations

import random

from moekit.config.task_run import TaskRunConfig
from moekit.data.examples import Examples
from moekit.train.run import LoadedTask


class RandomDraws:
    """Draws of a space, uniform and seeded."""

    def __init__(self, seed: int = 0) -> None:
        self.rng = random.Random(seed)

    def suggest_categorical(self, name, choices):
        return self.rng.choice(list(choices))

    def suggest_float(self, name, low, high, *, step=None, log=False):
        if log:
            return low * (high / low) ** self.rng.random()
        if step:
            return low + step * self.rng.randint(0, round((high - low) / step))
        return self.rng.uniform(low, high)


class Accuracy:
    """Share of right answers, through the task's own predictions."""

    def __call__(self, loaded: LoadedTask, examples: Examples) -> dict[str, float]:
        from moekit.recipes.running import measured
        from moekit.recipes.tasks import Measure

        return measured(loaded, examples, [Measure("label", "accuracy", {})])


def tiny_config(folder, **train) -> TaskRunConfig:
    """Points of a plane, by quadrant."""
    path = folder / "points.csv"
    if not path.exists():
        rng = random.Random(0)
        points = [(rng.uniform(-1, 1), rng.uniform(-1, 1)) for _ in range(160)]
        rows = [f"{x:.4f},{y:.4f},{'even' if x * y > 0 else 'odd'}" for x, y in points]
        path.write_text("x,y,label\n" + "\n".join(rows) + "\n", encoding="utf-8")
    return TaskRunConfig.from_dict({
        "name": "points", "inputs": {"fields": {"kind": "fields", "numbers": ["x", "y"]}},
        "targets": {"label": {"kind": "class", "column": "label"}},
        "data": {"path": str(path), "validation_share": 0.2, "test_share": 0.2},
        "model": {"d_model": 16, "n_layers": 2, "n_heads": 2, "d_ff": 32, "dropout": 0.1,
                  "moe": {"n_experts": 4, "top_k": 2, "d_expert": 16}},
        "train": {"steps": 12, "batch_size": 16, "device": "cpu", "validate_every": 0, "checkpoint_every": 0,
                  "schedule": {"warmup_steps": 2}, "optimizer": {"lr": 0.01}, **train},
    })  # fmt: skip
