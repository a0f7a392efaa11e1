"""Columns of lists of words: each word a token, known by itself and by its parts.

Parts of a word: its shape, its beginnings and endings, the runs of characters in it, and its pairs with the words
beside it. They share a number of vectors by a hash that never changes, so that nothing has to be kept of them.
"""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby, pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moekit.config.errors import DataError
from moekit.config.task import WordsInput, WordStemConfig
from moekit.data.encoding.base import Encoded, Encoder, filled, require_value
from moekit.data.encoding.text import Tokens
from moekit.data.examples import Examples

OTHER = 1  # the id of words without one of their own; 0 is padding


class WordsEncoder(Encoder):
    """Words to ids, by how often training has them, and to the ids of their parts."""

    kind = "words"

    def __init__(self, config: WordsInput, counts: Mapping[str, int]) -> None:
        self.config, self.counts = config, dict(counts)
        self._ids = {word: number for number, word in enumerate(self.counts, OTHER + 1)}

    @classmethod
    def fit(cls, config: WordsInput, train: Examples) -> WordsEncoder:
        counts = Counter(plain(word) for words in _lists(config, train) for word in words)
        if not counts:
            raise DataError(f"column {config.column!r} holds no words")
        often = sorted(
            (word for word, n in counts.items() if n >= config.min_count),
            key=lambda word: (-counts[word], word),
        )
        return cls(config, {word: counts[word] for word in often[: config.vocab_size]})

    def part(self) -> WordStemConfig:
        return WordStemConfig(
            vocab_size=len(self.counts) + OTHER + 1, buckets=self.config.buckets, mix=self.config.mix
        )

    def encode(self, examples: Examples) -> Encoded:
        return Words(self, _lists(self.config, examples))

    def id_of(self, word: str) -> int:
        """The id of a word, 1 where it has none of its own."""
        return self._ids.get(plain(word), OTHER)

    def hidden_share(self, word: str) -> float:
        """How often training hides the word itself, so that words like it are known by their parts alone."""
        rare = self.config.rare_dropout
        return rare / (rare + self.counts.get(plain(word), 1)) if rare else 0.0

    def parts_of(self, word: str) -> list[int]:
        """The ids of a word's parts; its shape is the first, where it counts."""
        return [self._hashed(part) for part in dict.fromkeys(word_parts(word, self.config))]

    def pairs_of(self, words: Sequence[str]) -> np.ndarray:
        """`[words, 2]`: ids of each word with the one before and with the next."""
        ends = ["", *map(plain, words), ""]
        joined = [self._hashed(f"{one} {other}") for one, other in pairwise(ends)]
        return np.asarray([joined[:-1], joined[1:]], dtype=np.int64).T

    def _hashed(self, part: str) -> int:
        return zlib.crc32(part.encode()) % self.config.buckets + 1

    def state(self) -> dict[str, Any]:
        return {"counts": self.counts}

    @classmethod
    def from_state(cls, config: WordsInput, state: Mapping[str, Any]) -> WordsEncoder:
        return cls(config, state["counts"])


class Words(Tokens):
    """The words of all examples. What is known of a word is worked out once, however often it stands there."""

    def __init__(self, encoder: WordsEncoder, lists: Sequence[Sequence[str]]) -> None:
        config = encoder.config
        self.encoder = encoder
        read = [list(words[: config.max_len]) for words in lists]
        numbers: dict[str, int] = {}
        rows = [
            # an example without words is one word that nothing is known of
            np.asarray([numbers.setdefault(word, len(numbers)) for word in words or [""]], dtype=np.int64)
            for words in read
        ]
        firsts = [_places(len(words), config.max_len) for words in lists]
        super().__init__(rows, firsts, [len(words) for words in lists], config.column)
        self.rows = rows
        self.pairs = [encoder.pairs_of(words or [""]) for words in read] if config.pairs else None
        self._ids = np.asarray([encoder.id_of(word) for word in numbers], dtype=np.int64)
        self._hidden = np.asarray([encoder.hidden_share(word) for word in numbers])
        self._parts = filled(
            [np.asarray(encoder.parts_of(word) or [0], dtype=np.int64) for word in numbers], 0
        )

    def batch(self, rows: np.ndarray, rng: np.random.Generator | None = None) -> dict[str, Tensor]:
        """`ids` `[B, S]` and `parts` `[B, S, N]`; with `rng`, words hidden as the configuration says."""
        config = self.encoder.config
        numbers = filled([self.rows[row] for row in rows], -1)
        real = numbers >= 0
        ids, parts = self._ids[numbers], self._parts[numbers]
        if self.pairs is not None:
            parts = np.concatenate([parts, filled([self.pairs[row] for row in rows], 0)], axis=2)
        if rng is not None:
            ids[rng.random(ids.shape) < self._hidden[numbers]] = OTHER
            blank = rng.random(ids.shape) < config.dropout
            ids[blank] = OTHER
            parts[blank, int(config.shape) :] = 0
        ids[~real], parts[~real] = 0, 0
        return {"ids": torch.from_numpy(ids), "parts": torch.from_numpy(parts)}


def plain(word: str) -> str:
    """A word in lower case, every digit a 0.

    >>> plain("B-52s")
    'b-00s'
    """
    return "".join("0" if character.isdigit() else character for character in word.lower())


def word_parts(word: str, config: WordsInput) -> Iterator[str]:
    """The parts of a word, some of them in two ways; < and > stand for its ends.

    >>> list(word_parts("NATO", WordsInput(ngrams=(4, 5), affixes=1)))
    ['shape X', '<n', 'o>', '<nat', 'nato', 'ato>', '<nato', 'nato>']
    """
    if config.shape:
        yield f"shape {shape(word)}"
    marked = f"<{word.lower()}>"
    n = len(marked)
    for size in range(1, min(config.affixes, n - 2) + 1):
        yield marked[: size + 1]
        yield marked[n - size - 1 :]
    shortest, longest = config.ngrams or (1, 0)
    for size in range(shortest, longest + 1):
        for start in range(n - size + 1):
            yield marked[start : start + size]


def shape(word: str) -> str:
    """Capitals as X, small letters as x, digits as d, runs of them shortened.

    >>> shape("McDonald's"), shape("1998"), shape("U.S.")
    ("XxXx'x", 'd', 'X.X.')
    """
    kinds = ("X" if c.isupper() else "x" if c.isalpha() else "d" if c.isdigit() else c for c in word)
    return "".join(kind for kind, _ in groupby(kinds))


def words_in(value: Any, unit: str) -> list[str]:
    """A list of words as it is; a text cut at white space or, for the unit characters, everywhere.

    >>> words_in("in Bonn", "words"), words_in("你好", "characters"), words_in(["New York"], "words")
    (['in', 'Bonn'], ['你', '好'], ['New York'])
    """
    if isinstance(value, str):
        return list(value) if unit == "characters" else value.split()
    return [str(word) for word in value]


def _lists(config: WordsInput, examples: Examples) -> list[list[str]]:
    found = []
    for row, value in enumerate(examples[config.column]):
        require_value(isinstance(value, str | list | tuple | np.ndarray), config.column, row, value,
                      "must hold a list of words, or a text")  # fmt: skip
        found.append(words_in(value, config.unit))
    return found


def _places(n: int, most: int) -> np.ndarray:
    """Where each word stands; -1 for those that are not read."""
    places = np.arange(n)
    places[most:] = -1
    return places
