"""What a setting of training may be: learning rate, batch size, dropout, balancing, weight decay, length and warm-up.

The model stays. A run never sees more examples than the budget allows, whatever its batch size.
"""

from __future__ import annotations

import math
from typing import Any

from moekit.config.errors import ConfigError
from moekit.config.task_run import TaskRunConfig
from moekit.design.budget import Budget
from moekit.design.space import Choice, Draws
from moekit.design.subject import Changes, require_searchable
from moekit.train.material import AnyRunConfig

LENGTHS = (0.5, 0.75, 1.0)
BATCHES = (0.5, 1.0, 2.0)


class TuneSpace:
    """Settings around those of the default.

    Args:
        config: the default, fitted to the data, so that its steps are known.
        budget: `examples` is used here.
        n_train: training examples of a task, which a batch cannot exceed.

    Errors: `ConfigError` for a budget that is less than one batch.
    """

    axis = "examples"

    def __init__(self, config: AnyRunConfig, budget: Budget, n_train: int | None = None) -> None:
        require_searchable(config)
        self.config, train = config, config.train
        self.own = train.steps * train.batch_size
        self.limits: dict[str, float] = {"examples": budget.examples.of(self.own)}
        if self.limits["examples"] < train.batch_size:
            raise ConfigError(
                f"budget.examples must be at least one batch ({train.batch_size}); got "
                f"{self.limits['examples']:.0f}. Write for example examples=default"
            )
        sizes = [max(1, round(train.batch_size * factor)) for factor in BATCHES]
        sizes = [size - size % train.accumulation or train.accumulation for size in sizes]
        self.batches = tuple(dict.fromkeys(size for size in sizes if n_train is None or size <= n_train))
        self.dropouts = ["dropout"]
        if isinstance(config, TaskRunConfig):
            self.dropouts += ["embedding_dropout", "head_dropout"]
        self.balanced = config.model.moe is not None  # type: ignore[union-attr]

    def default(self) -> Choice:
        train, model = self.config.train, self.config.model
        features = {
            "lr": train.optimizer.lr, "weight_decay": train.optimizer.weight_decay, "batch_size": train.batch_size,
            "warmup": round(train.schedule.warmup_steps / train.steps, 3),
            **{name: getattr(model, name) for name in self.dropouts}, "length": 1.0,
        }  # fmt: skip
        if self.balanced:
            features["load_balance"] = model.moe.balance.load_balance  # type: ignore[union-attr]
        return Choice({}, features, {"examples": self.own})

    def sample(self, draws: Draws) -> Choice:
        train = self.config.train
        lr, decay = train.optimizer.lr, train.optimizer.weight_decay or 0.01
        found: dict[str, Any] = {
            "lr": draws.suggest_float("lr", lr / 4, lr * 4, log=True),
            "weight_decay": draws.suggest_float("weight_decay", decay / 10, decay * 10, log=True),
            "batch_size": draws.suggest_categorical("batch_size", self.batches),
            "warmup": draws.suggest_float("warmup", 0.0, 0.2, step=0.02),
        }
        for name in self.dropouts:
            found[name] = draws.suggest_float(name, 0.0, 0.5, step=0.05)
        found["length"] = draws.suggest_categorical("length", LENGTHS)
        if self.balanced:
            found["load_balance"] = draws.suggest_float("load_balance", 1e-4, 1e-1, log=True)
        return self._choice(found)

    def ideas(self) -> list[dict[str, Any]]:
        """The learning rate doubled and halved, and more dropout; what is not named is drawn."""
        lr = self.config.train.optimizer.lr
        return [
            {"lr": lr * 2, "length": 1.0},
            {"lr": lr / 2, "length": 1.0},
            {"lr": lr, "dropout": 0.3, "length": 1.0},
        ]

    def _choice(self, found: dict[str, Any]) -> Choice:
        size = int(found["batch_size"])
        steps = max(1, math.floor(self.limits["examples"] * found["length"] / size))
        changes: Changes = {
            "train.optimizer.lr": float(f"{found['lr']:.4g}"),
            "train.optimizer.weight_decay": float(f"{found['weight_decay']:.4g}"),
            "train.batch_size": size,
            "train.steps": steps,
            "train.schedule.warmup_steps": round(found["warmup"] * steps),
        }
        if isinstance(self.config, TaskRunConfig):
            changes["epochs"] = None
        for name in self.dropouts:
            changes[f"model.{name}"] = round(found[name], 3)
        if self.balanced:
            changes["model.moe.balance.load_balance"] = float(f"{found['load_balance']:.4g}")
        features = {
            key: float(f"{value:.4g}") if isinstance(value, float) else value for key, value in found.items()
        }
        return Choice(changes, features, {"examples": steps * size})
