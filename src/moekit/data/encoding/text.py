"""Columns of text: a sequence of tokens, or a weighted set of terms."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from moekit.config.errors import DataError, MissingExtraError
from moekit.config.task import BagInput, BagStemConfig, TextInput, TokenStemConfig
from moekit.data.encoding.base import Encoded, Encoder, Ragged, require_value
from moekit.data.examples import Examples

if TYPE_CHECKING:
    from tokenizers import Tokenizer as _Tokenizer

PADDING, UNKNOWN = "[PAD]", "[UNK]"


def no_characters(row: int) -> np.ndarray:
    """What words that are tokens by themselves say of their characters: an error."""
    raise TypeError("words that are tokens by themselves have no places in a text")


class Tokens(Ragged):
    """Token ids `[B, S]`, for tags with where each example's words begin.

    Attributes: firsts: the first token of each word that was read; n_words: words of each example, cut off or not;
        characters: gives `[T, 2]`, where each token of an example starts and ends; of words as tokens nobody knows.
    """

    def __init__(
        self,
        ids: list[np.ndarray],
        firsts: list[np.ndarray],
        n_words: list[int],
        column: str,
        characters: Callable[[int], np.ndarray] = no_characters,
        unknown: float = 0.0,
    ) -> None:
        super().__init__(0, ids=ids)
        self.firsts, self.n_words, self.column, self.characters = firsts, n_words, column, characters
        self.unknown = unknown

    def batch(self, rows: np.ndarray, rng: np.random.Generator | None = None) -> dict[str, Tensor]:
        """In training a share of the tokens is unknown, so that what stands around an unknown one is learnt as well."""
        found = super().batch(rows, rng)
        if rng is not None and self.unknown > 0:
            hidden = torch.from_numpy(rng.random(found["ids"].shape) < self.unknown)
            found["ids"] = found["ids"].masked_fill(hidden & (found["ids"] != 0), 1)
        return found


class TextEncoder(Encoder):
    """Text, or lists of words, to token ids; 0 is padding, 1 what the vocabulary lacks."""

    kind = "text"

    def __init__(self, config: TextInput, tokenizer: _Tokenizer) -> None:
        self.config, self.tokenizer = config, tokenizer

    @classmethod
    def fit(cls, config: TextInput, train: Examples) -> TextEncoder:
        texts = [joined_words(value) for value in train[config.column]]
        if not any(text.strip() for text in texts):
            raise DataError(f"column {config.column!r} holds no text to train a tokenizer on")
        return cls(config, _train(config, texts))

    def part(self) -> TokenStemConfig:
        return TokenStemConfig(vocab_size=self.tokenizer.get_vocab_size())

    def encode(self, examples: Examples) -> Encoded:
        values = examples[self.config.column]
        ids, firsts, n_words = [], [], []
        for row, value in enumerate(values):
            require_value(value is not None, self.config.column, row, value, "must hold text")
        for one in self._encodings(values):
            ids.append(np.asarray(one.ids[: self.config.max_len] or [1], dtype=np.int64))
            firsts.append(_first_tokens(one.word_ids[: self.config.max_len]))
            n_words.append(max((number for number in one.word_ids if number is not None), default=-1) + 1)
        if len(values) and not isinstance(values[0], str):
            n_words = [len(words(value)) for value in values]
        # looked up where a span is asked for: no other target needs it
        return Tokens(ids, firsts, n_words, self.config.column, lambda row: self.characters(values[row]),
                      self.config.unknown)  # fmt: skip

    def characters(self, value: str | Sequence[str]) -> np.ndarray:
        """`[T, 2]`: where each token that is read starts in the text, and the place behind its end.

        Words of a list stand in a text with a space between them.
        """
        (one,) = self._encodings([value])
        offsets = np.asarray(one.offsets[: self.config.max_len] or [(0, 0)], dtype=np.int64)
        if isinstance(value, str):
            return offsets
        lengths = [0, *(len(word) + 1 for word in words(value))]
        starts = np.cumsum(lengths)[[word or 0 for word in one.word_ids[: len(offsets)]] or [0]]
        return offsets + starts[:, None]

    def pieces(self, value: str | Sequence[str]) -> list[str]:
        """The tokens of one text as they are read, for explanations."""
        (one,) = self._encodings([value])
        if isinstance(value, str):
            return [value[start:end] for start, end in one.offsets[: self.config.max_len]]
        return list(one.tokens[: self.config.max_len])

    def _encodings(self, values: Iterable[Any]) -> list[Any]:
        texts = list(values)
        lists = [not isinstance(value, str) for value in texts]
        if any(lists) and not all(lists):
            raise DataError(
                f"column {self.config.column!r} must hold either texts or lists of words, not both"
            )
        inputs = [words(value) for value in texts] if any(lists) else texts
        return list(self.tokenizer.encode_batch(inputs, is_pretokenized=any(lists), add_special_tokens=False))

    def state(self) -> dict[str, Any]:
        return {"tokenizer": self.tokenizer.to_str()}

    @classmethod
    def from_state(cls, config: TextInput, state: Mapping[str, Any]) -> TextEncoder:
        from tokenizers import Tokenizer as _Tokenizer

        return cls(config, _Tokenizer.from_str(state["tokenizer"]))


def words(value: Any) -> list[str]:
    """The words of a value that holds a list of them (or one text)."""
    return [value] if isinstance(value, str) else [str(word) for word in value]


def joined_words(value: Any) -> str:
    """A text as it is; of a list of words, the words with a space between them."""
    return value if isinstance(value, str) else " ".join(words(value))


def _train(config: TextInput, texts: Sequence[str]) -> _Tokenizer:
    from tokenizers import Tokenizer as _Tokenizer
    from tokenizers import models, normalizers, pre_tokenizers, trainers

    special = [PADDING, UNKNOWN]
    if config.tokenizer == "bpe":
        inner = _Tokenizer(models.BPE(unk_token=UNKNOWN))
        inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer: Any = trainers.BpeTrainer(
            vocab_size=config.vocab_size,
            special_tokens=special,
            initial_alphabet=alphabet,
            show_progress=False,
        )
    else:
        inner = _Tokenizer(models.WordLevel(unk_token=UNKNOWN))
        inner.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
        if config.tokenizer == "words":
            inner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        else:
            # each character by itself; white space between words stands for itself
            inner.pre_tokenizer = pre_tokenizers.Split("", "isolated")
        trainer = trainers.WordLevelTrainer(
            vocab_size=config.vocab_size, special_tokens=special, show_progress=False, min_frequency=2
        )
    inner.train_from_iterator(texts, trainer)
    return inner


def _first_tokens(word_ids: Sequence[int | None]) -> np.ndarray:
    """Place of the first token of each word; -1 for a word that was cut off or has no token."""
    places: dict[int, int] = {}
    for place, word in enumerate(word_ids):
        if word is not None:
            places.setdefault(word, place)
    n = max(places, default=-1) + 1
    return np.asarray([places.get(word, -1) for word in range(n)], dtype=np.int64)


class BagEncoder(Encoder):
    """Text to its terms and their TF-IDF weights, by scikit-learn."""

    kind = "bag"

    def __init__(self, config: BagInput, terms: Sequence[str], idf: Sequence[float]) -> None:
        self.config, self.terms, self.idf = config, list(terms), np.asarray(idf, dtype=np.float64)
        self._vectorizer = _vectorizer(config, vocabulary={term: i for i, term in enumerate(self.terms)})
        self._vectorizer.idf_ = self.idf

    @classmethod
    def fit(cls, config: BagInput, train: Examples) -> BagEncoder:
        found = _vectorizer(config).fit(_texts(train, config.column))
        return cls(config, found.get_feature_names_out().tolist(), found.idf_.tolist())

    def part(self) -> BagStemConfig:
        return BagStemConfig(vocab_size=max(2, len(self.terms) + 1))

    def encode(self, examples: Examples) -> Encoded:
        matrix = self._vectorizer.transform(_texts(examples, self.config.column)).tocsr()
        ids, weights = [], []
        for row in range(matrix.shape[0]):
            part = slice(matrix.indptr[row], matrix.indptr[row + 1])
            terms, values = matrix.indices[part], matrix.data[part]
            if len(terms) > self.config.max_terms:
                kept = np.sort(np.argsort(-values, kind="stable")[: self.config.max_terms])
                terms, values = terms[kept], values[kept]
            ids.append(terms.astype(np.int64) + 1)
            weights.append(values.astype(np.float32))
        found = Ragged(
            0, ids=[_never_empty(item) for item in ids], weights=[_never_empty(w) for w in weights]
        )
        found.lengths = None  # one vector, however many terms
        return found

    def state(self) -> dict[str, Any]:
        return {"terms": self.terms, "idf": self.idf.tolist()}

    @classmethod
    def from_state(cls, config: BagInput, state: Mapping[str, Any]) -> BagEncoder:
        return cls(config, state["terms"], state["idf"])


def _never_empty(item: np.ndarray) -> np.ndarray:
    return item if len(item) else np.zeros(1, dtype=item.dtype)


def _texts(examples: Examples, column: str) -> list[str]:
    for row, value in enumerate(examples[column]):
        require_value(isinstance(value, str), column, row, value, "must hold text")
    return list(examples[column])


def _vectorizer(config: BagInput, vocabulary: Mapping[str, int] | None = None) -> Any:
    try:
        from sklearn.feature_extraction.text import TfidfVectorizer
    except ImportError:
        raise MissingExtraError("inputs of kind bag need scikit-learn: pip install 'moekit[tasks]'") from None
    return TfidfVectorizer(
        sublinear_tf=True, analyzer=config.analyzer, ngram_range=config.ngrams, vocabulary=vocabulary,
        max_features=config.max_features, min_df=config.min_count if vocabulary is None else 1,
        token_pattern=r"(?u)\b\w+\b" if config.analyzer == "word" else None,
    )  # fmt: skip
