"""Stretches of a text that was read: from characters to tokens, and back.

Shape legend: T tokens of the text; places count from 1, 0 stands for no answer.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moekit.config.base import StrictConfig
from moekit.config.errors import DataError
from moekit.config.task import SpanHeadConfig, SpanTarget
from moekit.data.encoding.base import Arrays, Encoded, Encoder, require_value
from moekit.data.encoding.targets import IGNORED, TargetEncoder
from moekit.data.encoding.text import Tokens, joined_words
from moekit.data.examples import Examples

NONE = 0


class SpanEncoder(TargetEncoder):
    """The first and the last token of an answer; 0 and 0 where there is none.

    An answer that is None is unknown and counts nowhere, as does, in training, one beyond the tokens that are read.
    """

    kind = "span"

    def __init__(self, config: SpanTarget, column: str, may_be_empty: bool) -> None:
        self.config, self.column, self.may_be_empty = config, column, may_be_empty

    @classmethod
    def fit(cls, config: SpanTarget, train: Examples) -> SpanEncoder:
        raise TypeError("spans lie on the tokens of an input: use `fit_with`")

    @classmethod
    def fit_with(cls, config: SpanTarget, train: Examples, inputs: Mapping[str, Encoder]) -> SpanEncoder:
        read: Any = inputs[config.input]
        found = cls(config, read.config.column, False)
        spans = [span for span in found.characters(train) if span is not None]
        if not any(start < end for start, end in spans):
            raise DataError(f"target {config.column or config.start!r}: no example has an answer in its text")
        return cls(config, found.column, any(start == end for start, end in spans))

    def part(self) -> StrictConfig:
        return SpanHeadConfig(stem=self.config.input, may_be_empty=self.may_be_empty, longest=self.config.longest,
                              weight=self.config.weight)  # fmt: skip

    def encode(self, examples: Examples) -> Encoded:
        raise TypeError("spans lie on the tokens of an input: use `encode_with`")

    def encode_with(self, examples: Examples, inputs: Mapping[str, Encoded]) -> Encoded:
        """Errors: `DataError` naming example and column where an answer does not stand in the text."""
        tokens = inputs[self.config.input]
        assert isinstance(tokens, Tokens)
        found = np.full((len(examples), 2), IGNORED, dtype=np.int64)
        for row, span in enumerate(self.characters(examples)):
            if span is None:
                continue
            start, end = span
            if start == end:
                found[row] = NONE
                continue
            places = tokens.characters(row)
            inside = np.flatnonzero((places[:, 0] < end) & (places[:, 1] > start))
            if len(inside) and places[-1, 1] >= end:
                found[row] = inside[0] + 1, inside[-1] + 1
        return Arrays(targets=found)

    def characters(self, examples: Examples) -> list[tuple[int, int] | None]:
        """Start and end of each answer in its text, in characters; both 0 where there is none, None where unknown."""
        texts = map(joined_words, examples[self.column])
        return [self._span(examples, row, text) for row, text in enumerate(texts)]

    def _span(self, examples: Examples, row: int, text: str) -> tuple[int, int] | None:
        config = self.config
        if config.column is None:
            ends = [examples[name or ""][row] for name in (config.start, config.end)]
            if any(end is None for end in ends):
                return None
            start, end = (int(value) for value in ends)
            require_value(0 <= start <= end <= len(text), config.start or "", row, (start, end),
                          f"start and end must lie in order in the {len(text)} characters of the text")  # fmt: skip
            return start, end
        answer = examples[config.column][row]
        if answer is None:
            return None
        require_value(isinstance(answer, str), config.column, row, answer, "must hold text")
        if not answer.strip():
            return 0, 0
        given = None if config.start is None else examples[config.start][row]
        start = text.find(answer) if given is None else int(given)
        require_value(start >= 0 and text[start : start + len(answer)] == answer, config.column, row, answer,
                      "must stand in the text" + ("" if given is None else f" at character {start}"))  # fmt: skip
        return start, start + len(answer)

    def answers(self, answer: Tensor, row: int) -> dict[str, Any]:
        """Places of the first and last token of the likeliest answer, and its probability."""
        log_probs = answer[row].float().log_softmax(dim=0)  # [1 + T, 2]
        n = len(log_probs) - 1
        both = log_probs[1:, 0, None] + log_probs[None, 1:, 1]
        allowed = torch.ones(n, n, dtype=torch.bool).triu().tril(self.config.longest - 1)
        both = both.masked_fill(~allowed, -torch.inf)
        best = int(both.argmax())
        start, end, score = best // n + 1, best % n + 1, float(both.flatten()[best])
        nothing = float(log_probs[NONE].sum())
        if self.may_be_empty and nothing >= score:
            start, end, score = NONE, NONE, nothing
        return {"prediction": (start, end), "probability": float(np.exp(score))}

    def completed(
        self, answer: dict[str, Any], row: int, inputs: Mapping[str, Encoded], examples: Examples
    ) -> dict[str, Any]:
        """The answer as text, and where it stands, in characters."""
        tokens = inputs[self.config.input]
        assert isinstance(tokens, Tokens)
        first, last = answer["prediction"]
        if first == NONE:
            return {**answer, "prediction": "", "start": None, "end": None}
        places = tokens.characters(row)
        text = joined_words(examples[tokens.column][row])
        start, end = int(places[first - 1, 0]), int(places[last - 1, 1])
        said = text[start:end].strip()
        start = text.find(said, start)  # a token of byte-level BPE has the space before it
        return {**answer, "prediction": said, "start": start, "end": start + len(said)}

    def truth(self, examples: Examples) -> list[Any]:
        if self.config.column is not None:
            return list(examples[self.config.column])
        texts = map(joined_words, examples[self.column])
        return [None if span is None else text[slice(*span)]
                for text, span in zip(texts, self.characters(examples), strict=True)]  # fmt: skip

    def state(self) -> dict[str, Any]:
        return {"column": self.column, "may_be_empty": self.may_be_empty}

    @classmethod
    def from_state(cls, config: SpanTarget, state: Mapping[str, Any]) -> SpanEncoder:
        return cls(config, state["column"], state["may_be_empty"])
