"""A column of labels in order, whose places along an input nobody knows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from moekit.config.base import StrictConfig
from moekit.config.errors import DataError
from moekit.config.task_transcript import CtcHeadConfig, TranscriptTarget
from moekit.data.encoding.base import Encoded, Ragged, require_value
from moekit.data.encoding.targets import IGNORED, TargetEncoder
from moekit.data.examples import Examples
from moekit.models.ctc_head import best_path, prefix_beam


class TranscriptEncoder(TargetEncoder):
    """Labels as numbers from 1; the prediction is a text, the labels with spaces between."""

    kind = "transcript"

    def __init__(self, config: TranscriptTarget, labels: Sequence[str]) -> None:
        self.config, self.labels = config, list(labels)
        self._numbers = {label: number for number, label in enumerate(self.labels, 1)}

    @classmethod
    def fit(cls, config: TranscriptTarget, train: Examples) -> TranscriptEncoder:
        found = {label for labels in label_lists(config, train) for label in labels}
        if not found:
            raise DataError(f"column {config.column!r} holds no labels")
        return cls(config, sorted(found))

    def part(self) -> StrictConfig:
        return CtcHeadConfig(labels=tuple(self.labels), stem=self.config.input, weight=self.config.weight)

    def encode(self, examples: Examples) -> Encoded:
        """A label that training never saw is left out: no path could say it."""
        found = [
            np.asarray([self._numbers[label] for label in labels if label in self._numbers], np.int64)
            for labels in label_lists(self.config, examples)
        ]
        return Ragged(IGNORED, targets=found)

    def answers(self, answer: Tensor, row: int) -> dict[str, Any]:
        logits = answer[row].float().numpy()
        found = best_path(logits) if self.config.beam == 1 else prefix_beam(logits, self.config.beam)
        return {"prediction": " ".join(self.labels[number - 1] for number in found)}

    def truth(self, examples: Examples) -> list[str]:
        return [" ".join(labels) for labels in label_lists(self.config, examples)]

    def state(self) -> dict[str, Any]:
        return {"labels": self.labels}

    @classmethod
    def from_state(cls, config: TranscriptTarget, state: Mapping[str, Any]) -> TranscriptEncoder:
        return cls(config, state["labels"])


def label_lists(config: TranscriptTarget, examples: Examples) -> list[list[str]]:
    """The labels of each example. Errors: `DataError` for what is neither a text nor a list of labels."""
    found = []
    for row, value in enumerate(examples[config.column]):
        if isinstance(value, str):
            found.append(value.split())
            continue
        require_value(
            isinstance(value, list | tuple), config.column, row, value, "must hold a list of labels"
        )
        labels = [str(label) for label in value]
        spaced = next((label for label in labels if not label or label.split() != [label]), None)
        require_value(spaced is None, config.column, row, value, "must hold labels without spaces")
        found.append(labels)
    return found
