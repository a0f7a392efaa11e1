"""Columns of actions and of what came of them, and from the heads' answers back to them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from moekit.config.base import StrictConfig
from moekit.config.errors import DataError
from moekit.config.task import ActionTarget, ClassTarget, PolicyHeadConfig, ReturnTarget, ValueHeadConfig
from moekit.data.encoding.base import Arrays, Encoded
from moekit.data.encoding.fields import numbers
from moekit.data.encoding.targets import ClassEncoder, TargetEncoder
from moekit.data.examples import Examples


class ActionEncoder(TargetEncoder):
    """Names of actions as numbers, each with its advantage; NaN where the action is unknown."""

    kind = "action"

    def __init__(self, config: ActionTarget, actions: Sequence[str]) -> None:
        self.config = config
        # the action as a class of several: names, numbers and probabilities are the same
        self.names = ClassEncoder(ClassTarget(column=config.column), actions)

    @classmethod
    def fit(cls, config: ActionTarget, train: Examples) -> ActionEncoder:
        return cls(config, ClassEncoder.fit(ClassTarget(column=config.column), train).labels)

    def part(self) -> StrictConfig:
        return PolicyHeadConfig(actions=tuple(self.names.labels), weight=self.config.weight)

    def encode(self, examples: Examples) -> Encoded:
        taken = self.names.encode(examples).batch(np.arange(len(examples)))["targets"].numpy()
        found = np.ones((len(examples), 2), dtype=np.float32)
        found[:, 0] = np.where(taken < 0, np.nan, taken)
        if self.config.advantage is not None:
            found[:, 1] = numbers(examples, self.config.advantage)
        return Arrays(targets=found)

    def answers(self, answer: Tensor, row: int) -> dict[str, Any]:
        return self.names.answers(answer, row)

    def raw(self, answer: Tensor, row: int, said: Mapping[str, Any]) -> Any:
        return self.names.raw(answer, row, said)

    def truth(self, examples: Examples) -> list[Any]:
        return self.names.names(examples)

    def state(self) -> dict[str, Any]:
        return {"actions": self.names.labels}

    @classmethod
    def from_state(cls, config: ActionTarget, state: Mapping[str, Any]) -> ActionEncoder:
        return cls(config, state["actions"])


class ReturnEncoder(TargetEncoder):
    """Returns in their own units; NaN where unknown."""

    kind = "return"

    def __init__(self, config: ReturnTarget, mean: float = 0.0, deviation: float = 1.0) -> None:
        self.config, self.mean, self.deviation = config, float(mean), float(deviation)

    @classmethod
    def fit(cls, config: ReturnTarget, train: Examples) -> ReturnEncoder:
        values = numbers(train, config.column)
        known = values[~np.isnan(values)]
        if len(known) == 0 or float(known.std()) == 0:
            raise DataError(
                f"column {config.column!r} must hold different numbers to learn; got {len(known)} equal ones"
            )
        return cls(config, known.mean(), known.std())

    def part(self) -> StrictConfig:
        return ValueHeadConfig(mean=self.mean, deviation=self.deviation, weight=self.config.weight)

    def encode(self, examples: Examples) -> Encoded:
        return Arrays(targets=numbers(examples, self.config.column).astype(np.float32))

    def answers(self, answer: Tensor, row: int) -> dict[str, Any]:
        return {"prediction": float(answer[row]) * self.deviation + self.mean}

    def truth(self, examples: Examples) -> Any:
        return numbers(examples, self.config.column)

    def state(self) -> dict[str, Any]:
        return {"mean": self.mean, "deviation": self.deviation}

    @classmethod
    def from_state(cls, config: ReturnTarget, state: Mapping[str, Any]) -> ReturnEncoder:
        return cls(config, state["mean"], state["deviation"])
