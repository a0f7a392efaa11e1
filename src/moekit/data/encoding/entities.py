"""Columns whose answer is an entity: what is asked, what is known already, and orders of all entities.

Shape legend: B examples of a batch, L tokens of a sequence, N entities.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moekit.config.base import StrictConfig
from moekit.config.errors import ConfigError, DataError, nearest, require
from moekit.config.task import EntityTarget, RankHeadConfig, SequenceInput, TokenStemConfig
from moekit.data.encoding.base import Arrays, Encoded, Encoder, Ragged, filled
from moekit.data.encoding.fields import IdsEncoder, category, listed
from moekit.data.encoding.targets import IGNORED, TargetEncoder
from moekit.data.examples import Examples

# ids of a sequence: 0 is padding, 1 its beginning, then the entities
BEGINNING, FIRST = 1, 2


class IdSequenceEncoder(Encoder):
    """Lists of entities, the last `max_len` of each, behind a beginning; entities unseen in training are left out."""

    kind = "sequence"

    def __init__(self, config: SequenceInput, names: Sequence[str]) -> None:
        self.config, self.names = config, list(names)

    @classmethod
    def fit(cls, config: SequenceInput, train: Examples) -> IdSequenceEncoder:
        found = {name for row in range(len(train)) for name in listed(train, config.column, row)}
        if not found:
            raise DataError(f"column {config.column!r} must hold lists of entities; all are empty")
        return cls(config, sorted(found))

    def part(self) -> TokenStemConfig:
        return TokenStemConfig(vocab_size=len(self.names) + FIRST)

    def encode(self, examples: Examples) -> Encoded:
        known = {name: number for number, name in enumerate(self.names, FIRST)}
        found = []
        for row in range(len(examples)):
            ids = [known[name] for name in listed(examples, self.config.column, row) if name in known]
            found.append(np.asarray([BEGINNING, *ids[-self.config.max_len :]], dtype=np.int64))
        return Ragged(0, ids=found)

    def unseen(self, examples: Examples) -> dict[str, list[str]]:
        """By column, entities that training never saw."""
        column = self.config.column
        found = {name for row in range(len(examples)) for name in listed(examples, column, row)}
        return {column: sorted(found - set(self.names))}

    def state(self) -> dict[str, Any]:
        return {"names": self.names}

    @classmethod
    def from_state(cls, config: SequenceInput, state: Mapping[str, Any]) -> IdSequenceEncoder:
        return cls(config, state["names"])


class Ranking(dict[str, Any]):
    """An answer in the user's words, with the logit of every candidate `[N + 1]` beside it."""

    scores: np.ndarray


class EntityEncoder(TargetEncoder):
    """An entity that an input knows, as its number there.

    Candidate 0 stands for all that training never saw: it has the logit minus infinity, so an example whose answer is
    such an entity counts as one that ranks it last.
    """

    kind = "entity"

    def __init__(
        self,
        config: EntityTarget,
        names: Sequence[str],
        start: int = 1,
        given: Sequence[str] = (),
        sequence: str | None = None,
        facts: Mapping[str, Sequence[int]] | None = None,
        products: int = 0,
    ) -> None:
        self.config, self.names, self.start, self.products = config, list(names), start, products
        self.given, self.sequence = list(given), sequence
        self.facts: dict[str, set[int]] = defaultdict(set)
        for question, places in (facts or {}).items():
            self.facts[question] = set(places)
        self._numbers = {name: number for number, name in enumerate(self.names, 1)}

    @classmethod
    def fit(cls, config: EntityTarget, train: Examples) -> EntityEncoder:
        found = {category(value) for value in train[config.column]} - {""}
        if len(found) < 2:
            raise DataError(f"column {config.column!r} must hold at least two entities; got {len(found)}")
        return cls(config, sorted(found))

    @classmethod
    def fit_with(cls, config: EntityTarget, train: Examples, inputs: Mapping[str, Encoder]) -> EntityEncoder:
        """Fit, and share the numbers of the entities with the input that knows them."""
        found = cls.fit(config, train)
        found.share(inputs[config.input], train)
        return found

    def share(self, given: Encoder, train: Examples) -> None:
        """Take the numbers of the entities from the input that knows them, which learns those of the answers as well.

        Errors: `ConfigError` where `like` names no column of it.
        """
        if isinstance(given, IdSequenceEncoder):
            given.names = self.names = sorted({*given.names, *self.names})
            self.start, self.sequence, self.given = FIRST, given.config.column, []
        elif isinstance(given, IdsEncoder):
            columns = given.config.columns
            like = self.config.like if self.config.like is not None else columns[0]
            require(like in columns, "targets like", like, f"must be a column of inputs.{self.config.input}",
                    nearest(like, columns))  # fmt: skip
            given.names[like] = self.names = sorted({*given.names[like], *self.names})
            before = columns[: columns.index(like)]
            self.start = sum(len(given.names[column]) + 1 for column in before) + 1
            self.given, self.products = list(columns), len(given.config.products)
        else:
            raise ConfigError(
                f"targets of kind entity need an input of kind ids or sequence; inputs.{self.config.input} is of kind "
                f"{given.kind}"
            )
        self._numbers = {name: number for number, name in enumerate(self.names, 1)}
        self.learn(train)

    def learn(self, examples: Examples) -> None:
        """Keep the right answers of these examples, which orders of candidates leave out where another is asked for."""
        if self.sequence is None and self.config.new:
            for question, place in zip(self._questions(examples), self.truth(examples), strict=True):
                if place:
                    self.facts[question].add(int(place))

    def _questions(self, examples: Examples) -> list[str]:
        columns = [[category(value) for value in examples[column]] for column in self.given]
        return ["\t".join(names) for names in zip(*columns, strict=True)]

    def known(self, examples: Examples) -> list[set[int]]:
        """For each example the places that an order leaves out, its own answer not among them."""
        if not self.config.new:
            return [set() for _ in range(len(examples))]
        if self.sequence is not None:
            lists = (listed(examples, self.sequence, row) for row in range(len(examples)))
            found = [{self._numbers[name] for name in names if name in self._numbers} for names in lists]
        else:
            found = [self.facts.get(question, set()) for question in self._questions(examples)]
        if self.config.column in examples.columns:
            found = [places - {int(own)} for places, own in zip(found, self.truth(examples), strict=True)]
        return found

    def part(self) -> StrictConfig:
        return RankHeadConfig(
            n_entities=len(self.names), stem=self.config.input, start=self.start,
            sequence=self.sequence is not None, wide=self.products if self.config.wide else 0,
            smoothing=self.config.smoothing, weight=self.config.weight,
        )  # fmt: skip

    def encode(self, examples: Examples) -> Encoded:
        places = self.truth(examples)
        return Arrays(targets=np.where(places > 0, places - 1, IGNORED))

    def encode_with(self, examples: Examples, inputs: Mapping[str, Encoded]) -> Encoded:
        if self.sequence is None:
            return self.encode(examples)
        given = inputs[self.config.input]
        assert isinstance(given, Ragged)
        last = self.encode(examples).batch(np.arange(len(examples)))["targets"].numpy()
        return NextEntities(given.sequences["ids"], last, self.config.every)

    def unseen(self, examples: Examples) -> dict[str, list[str]]:
        """By column, answers that training never saw."""
        found = {category(value) for value in examples[self.config.column]} - {""}
        return {self.config.column: sorted(found - set(self._numbers))}

    def truth(self, examples: Examples) -> np.ndarray:
        """`[N]` places among the candidates; 0 for what training never saw."""
        values = [category(value) for value in examples[self.config.column]]
        return np.asarray([self._numbers.get(name, 0) for name in values], dtype=np.int64)

    def answers(self, answer: Tensor, row: int) -> dict[str, Any]:
        return self._ranking(answer[row].float().numpy(), set())

    def completed(
        self, answer: dict[str, Any], row: int, inputs: Mapping[str, Encoded], examples: Examples
    ) -> dict[str, Any]:
        """The order without what is known of the example in `row`."""
        (known,) = self.known(examples.rows([row]))
        assert isinstance(answer, Ranking)
        return self._ranking(answer.scores[1:], known) if known else answer

    def raw(self, answer: Tensor, row: int, said: Mapping[str, Any]) -> Any:
        """`[N + 1]` logits of the candidates, minus infinity for those that are left out."""
        assert isinstance(said, Ranking)
        return said.scores

    def _ranking(self, logits: np.ndarray, known: set[int]) -> Ranking:
        scores = np.concatenate([np.full(1, -np.inf, np.float32), logits.astype(np.float32)])
        scores[list(known)] = -np.inf
        probs = torch.from_numpy(scores).softmax(dim=0)
        n = min(self.config.n_best, int(np.isfinite(scores).sum()))
        best, places = probs.topk(n)
        named = [
            {"entity": self.names[place - 1], "probability": probability}
            for place, probability in zip(places.tolist(), best.tolist(), strict=True)
        ]
        found = Ranking(prediction=named[0]["entity"] if named else None,
                        probability=named[0]["probability"] if named else 0.0, best=named)  # fmt: skip
        found.scores = scores
        return found

    def ordered(self, labels: Sequence[Any], scores: np.ndarray, examples: Examples) -> np.ndarray:
        """`[n, N + 1]`: what somebody else says of these examples, as metrics read it.

        Args:
            labels: names of the columns of `scores` `[n, labels]`; an entity that is not among them comes last.
            examples: whose known answers are left out.
        """
        table = np.full((len(examples), len(self.names) + 1), -np.inf)
        places = [self._numbers.get(category(label), 0) for label in labels]
        table[:, places] = scores
        table[:, 0] = -np.inf
        for row, known in enumerate(self.known(examples)):
            table[row, list(known)] = -np.inf
        return table

    def state(self) -> dict[str, Any]:
        facts = {question: sorted(places) for question, places in self.facts.items()}
        return {"names": self.names, "start": self.start, "given": self.given, "sequence": self.sequence,
                "facts": facts, "products": self.products}  # fmt: skip

    @classmethod
    def from_state(cls, config: EntityTarget, state: Mapping[str, Any]) -> EntityEncoder:
        return cls(
            config, state["names"], state["start"], state["given"], state["sequence"], state["facts"],
            state["products"],
        )  # fmt: skip


class NextEntities(Encoded):
    """What comes behind each token of sequences `[B, L]`; in evaluation behind the last one alone."""

    def __init__(self, ids: Sequence[np.ndarray], last: np.ndarray, every: bool) -> None:
        self.ids, self.last, self.every = ids, last, every

    def __len__(self) -> int:
        return len(self.last)

    def batch(self, rows: np.ndarray, rng: np.random.Generator | None = None) -> dict[str, Tensor]:
        found = []
        for row in rows:
            ids = self.ids[row]
            behind = np.full(len(ids), IGNORED, dtype=np.int64)
            if self.every and rng is not None:
                behind[:-1] = ids[1:] - FIRST
            behind[-1] = self.last[row]
            found.append(behind)
        return {"targets": torch.from_numpy(filled(found, IGNORED))}
