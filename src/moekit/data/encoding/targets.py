"""Columns of answers, and from a head's answer back to them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moekit.config.base import StrictConfig
from moekit.config.errors import DataError
from moekit.config.task import (
    ClassifyHeadConfig,
    ClassTarget,
    NumberTarget,
    RegressHeadConfig,
    TagHeadConfig,
    TagsTarget,
)
from moekit.data.encoding.base import Arrays, Encoded, Encoder, Ragged, require_value
from moekit.data.encoding.fields import category, numbers
from moekit.data.encoding.text import Tokens
from moekit.data.examples import Examples

IGNORED = -100


class TargetEncoder(Encoder):
    """An encoder that also gives answers back in the user's words."""

    @classmethod
    def fit_with(cls, config: Any, train: Examples, inputs: Mapping[str, Encoder]) -> Encoder:
        """Learn sizes and statistics, with the fitted inputs at hand."""
        return cls.fit(config, train)

    def encode_with(self, examples: Examples, inputs: Mapping[str, Encoded]) -> Encoded:
        """The targets of examples whose inputs are encoded; for answers that lie on an input's tokens."""
        return self.encode(examples)

    def part_beside(self, inputs: Mapping[str, Encoder]) -> StrictConfig:
        """Configuration of the head, for answers whose sizes are those of an input."""
        return self.part()

    def answers(self, answer: Tensor, row: int) -> dict[str, Any]:
        """What a head said of the example in `row` of a batch: prediction, and probability where it has one."""
        raise NotImplementedError

    def completed(
        self, answer: dict[str, Any], row: int, inputs: Mapping[str, Encoded], examples: Examples
    ) -> dict[str, Any]:
        """An answer in terms of what was given: `row` counts the encoded examples here."""
        return answer

    def raw(self, answer: Tensor, row: int, said: Mapping[str, Any]) -> Any:
        """What metrics read of the example in `row` of a batch, whose completed answer is `said`: probabilities `[C]`,
        numbers in their units, or the prediction itself."""
        return said["prediction"]

    def truth(self, examples: Examples) -> Any:
        """What examples say themselves, in the form that metrics compare with predictions."""
        raise NotImplementedError


class ClassEncoder(TargetEncoder):
    """Names of classes as numbers in their sorted order; with `multi`, zeros and ones.

    A class that training never saw has no number: it counts in no loss, and in a metric as answered wrongly.
    """

    kind = "class"

    def __init__(
        self, config: ClassTarget, labels: Sequence[str], wide: Mapping[str, int] | None = None
    ) -> None:
        self.config, self.labels = config, list(labels)
        self.wide = dict(wide or {})
        self._numbers = {label: number for number, label in enumerate(self.labels)}

    @classmethod
    def fit(cls, config: ClassTarget, train: Examples) -> ClassEncoder:
        found: set[str] = set()
        for row, value in enumerate(train[config.column]):
            found.update(_labels(config, value, row))
        if len(found) < 2:
            raise DataError(
                f"column {config.column!r} must hold at least two classes; got {', '.join(sorted(found)) or 'none'}"
            )
        return cls(config, sorted(found, key=_in_order))

    def part(self) -> StrictConfig:
        return ClassifyHeadConfig(
            labels=tuple(self.labels), multi=self.config.multi, smoothing=self.config.smoothing, wide=self.wide,
            wide_share=None if self.config.wide_fit == "jointly" else self.config.wide_share, weight=self.config.weight,
        )  # fmt: skip

    def encode(self, examples: Examples) -> Encoded:
        values = examples[self.config.column]
        if self.config.multi:
            found = np.zeros((len(values), len(self.labels)), dtype=np.float32)
            for row, value in enumerate(values):
                found[
                    row,
                    [
                        self._numbers[name]
                        for name in _labels(self.config, value, row)
                        if name in self._numbers
                    ],
                ] = 1
            return Arrays(targets=found)
        single = np.full(len(values), IGNORED, dtype=np.int64)
        for row, value in enumerate(values):
            for label in _labels(self.config, value, row):
                single[row] = self._numbers.get(label, IGNORED)
        return Arrays(targets=single)

    def unseen(self, examples: Examples) -> list[str]:
        """Classes of these examples that training never saw."""
        values = examples[self.config.column]
        found = {name for row, value in enumerate(values) for name in _labels(self.config, value, row)}
        return sorted(found - set(self._numbers))

    def names(self, examples: Examples) -> list[Any]:
        """The class of each example, None where unknown; a list of them with `multi`."""
        found = [_labels(self.config, value, row) for row, value in enumerate(examples[self.config.column])]
        return found if self.config.multi else [each[0] if each else None for each in found]

    def answers(self, answer: Tensor, row: int) -> dict[str, Any]:
        logits = answer[row].float()
        if self.config.multi:
            probs = logits.sigmoid()
            chosen = [self.labels[i] for i in torch.nonzero(probs >= 0.5).flatten().tolist()]
            return {
                "prediction": chosen,
                "probabilities": dict(zip(self.labels, probs.tolist(), strict=True)),
            }
        probs = logits.softmax(dim=-1)
        best = int(probs.argmax())
        return {"prediction": self.labels[best], "probability": float(probs[best]),
                "probabilities": dict(zip(self.labels, probs.tolist(), strict=True))}  # fmt: skip

    def raw(self, answer: Tensor, row: int, said: Mapping[str, Any]) -> Any:
        logits = answer[row].float()
        return (logits.sigmoid() if self.config.multi else logits.softmax(dim=-1)).numpy()

    def truth(self, examples: Examples) -> list[Any]:
        return self.names(examples)

    def state(self) -> dict[str, Any]:
        return {"labels": self.labels, "wide": self.wide}

    @classmethod
    def from_state(cls, config: ClassTarget, state: Mapping[str, Any]) -> ClassEncoder:
        return cls(config, state["labels"], state["wide"])


def _labels(config: ClassTarget, value: Any, row: int) -> list[str]:
    if not config.multi:
        name = category(value)
        return [name] if name else []
    if value is None:
        return []
    require_value(not isinstance(value, str), config.column, row, value, "must hold a list of classes")
    return [category(item) for item in value]


def _in_order(label: str) -> tuple[int, float, str]:
    """Numbers by size, before words by spelling."""
    try:
        return (0, float(label), label)
    except ValueError:
        return (1, 0.0, label)


class NumberEncoder(TargetEncoder):
    """Numbers in their own units; NaN where unknown."""

    kind = "number"

    def __init__(self, config: NumberTarget, means: Sequence[float], deviations: Sequence[float]) -> None:
        self.config, self.means, self.deviations = config, list(means), list(deviations)

    @classmethod
    def fit(cls, config: NumberTarget, train: Examples) -> NumberEncoder:
        means, deviations = [], []
        for column in config.columns:
            values = numbers(train, column)
            known = values[~np.isnan(values)]
            if len(known) == 0 or float(known.std()) == 0:
                raise DataError(
                    f"column {column!r} must hold different numbers to learn; got {len(known)} equal ones"
                )
            means.append(float(known.mean()))
            deviations.append(float(known.std()))
        return cls(config, means, deviations)

    def part(self) -> StrictConfig:
        return RegressHeadConfig(
            means=tuple(self.means), deviations=tuple(self.deviations), bounds=self.config.bounds,
            wide=self.config.wide, weight=self.config.weight,
        )  # fmt: skip

    def encode(self, examples: Examples) -> Encoded:
        return Arrays(
            targets=np.stack([numbers(examples, c) for c in self.config.columns], axis=1).astype(np.float32)
        )

    def answers(self, answer: Tensor, row: int) -> dict[str, Any]:
        values = self.in_units(answer[row : row + 1])[0].tolist()
        named = dict(zip(self.config.columns, values, strict=True))
        return {"prediction": values[0] if len(values) == 1 else named}

    def raw(self, answer: Tensor, row: int, said: Mapping[str, Any]) -> Any:
        return self.in_units(answer[row : row + 1])[0].numpy()

    def truth(self, examples: Examples) -> Any:
        return self.encode(examples).batch(np.arange(len(examples)))["targets"].numpy()

    def in_units(self, answer: Tensor) -> Tensor:
        """Answers `[B, N]` in the targets' own units, within their bounds."""
        values = answer.float() * torch.tensor(self.deviations) + torch.tensor(self.means)
        return values if self.config.bounds is None else values.clamp(*self.config.bounds)

    def state(self) -> dict[str, Any]:
        return {"means": self.means, "deviations": self.deviations}

    @classmethod
    def from_state(cls, config: NumberTarget, state: Mapping[str, Any]) -> NumberEncoder:
        return cls(config, state["means"], state["deviations"])


class TagsEncoder(TargetEncoder):
    """A tag for the first token of each word; the others count nowhere."""

    kind = "tags"

    def __init__(self, config: TagsTarget, labels: Sequence[str], bio: bool = False) -> None:
        self.config, self.labels, self.bio = config, list(labels), bio
        self._numbers = {label: number for number, label in enumerate(self.labels)}

    @classmethod
    def fit(cls, config: TagsTarget, train: Examples) -> TagsEncoder:
        lists = [[str(tag) for tag in tags] for tags in train[config.column]]
        found = {tag for tags in lists for tag in tags}
        if not found:
            raise DataError(f"column {config.column!r} holds no tags")
        return cls(config, sorted(found), all(follows_bio(tags) for tags in lists))

    def part(self) -> StrictConfig:
        return TagHeadConfig(
            labels=tuple(self.labels), stem=self.config.input, crf=self.config.crf,
            bio=self.config.crf and self.bio, weight=self.config.weight,
        )  # fmt: skip

    def encode(self, examples: Examples) -> Encoded:
        raise TypeError("tags lie on the tokens of an input: use `encode_with`")

    def encode_with(self, examples: Examples, inputs: Mapping[str, Encoded]) -> Encoded:
        """The tags of examples on the tokens of their encoded words.

        Errors: `DataError` where an example has not as many tags as words.
        """
        words = inputs[self.config.input]
        assert isinstance(words, Tokens)
        firsts, lengths = words.firsts, words.lengths
        assert lengths is not None
        found = []
        for row, tags in enumerate(examples[self.config.column]):
            places = firsts[row]
            n_words = words.n_words[row]
            require_value(len(tags) == n_words, self.config.column, row, len(tags),
                          f"must hold as many tags as words ({n_words})")  # fmt: skip
            target = np.full(int(lengths[row]), IGNORED, dtype=np.int64)
            for place, tag in zip(places, tags, strict=False):
                if place >= 0:
                    target[place] = self._numbers.get(str(tag), IGNORED)
            found.append(target)
        return Ragged(IGNORED, targets=found)

    def answers(self, answer: Tensor, row: int) -> dict[str, Any]:
        best = answer[row].argmax(dim=-1).tolist()
        return {"prediction": [self.labels[i] for i in best]}

    def completed(
        self, answer: dict[str, Any], row: int, inputs: Mapping[str, Encoded], examples: Examples
    ) -> dict[str, Any]:
        """Tags by word, from tags by token; "O" (or the first tag) for a word beyond the input's longest text."""
        words = inputs[self.config.input]
        assert isinstance(words, Tokens)
        of_tokens = answer["prediction"]
        nothing = "O" if "O" in self.labels else self.labels[0]
        found = [of_tokens[place] if 0 <= place < len(of_tokens) else nothing for place in words.firsts[row]]
        return {**answer, "prediction": found + [nothing] * (words.n_words[row] - len(found))}

    def truth(self, examples: Examples) -> list[list[str]]:
        return [[str(tag) for tag in tags] for tags in examples[self.config.column]]

    def state(self) -> dict[str, Any]:
        return {"labels": self.labels, "bio": self.bio}

    @classmethod
    def from_state(cls, config: TagsTarget, state: Mapping[str, Any]) -> TagsEncoder:
        return cls(config, state["labels"], state.get("bio", False))


def follows_bio(tags: Sequence[str]) -> bool:
    """Whether all tags are O, B-X or I-X, and I-X stands behind B-X or I-X alone.

    >>> follows_bio(["O", "B-PER", "I-PER"]), follows_bio(["O", "I-PER"]), follows_bio(["NOUN"])
    (True, False, False)
    """
    inside = None
    for tag in tags:
        if tag != "O" and not tag.startswith(("B-", "I-")):
            return False
        if tag.startswith("I-") and tag[2:] != inside:
            return False
        inside = None if tag == "O" else tag[2:]
    return True
