"""BM25 retrieval: the answer of the training example whose text is nearest, for dialogue and question answering.

Robertson and Zaragoza 2009, "The Probabilistic Relevance Framework: BM25 and Beyond", computed by bm25s.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from moekit.config.errors import ConfigError, DataError, require
from moekit.data.examples import Examples
from moekit.evaluate.baselines.base import Answers, Fitted, Problem, register_baseline
from moekit.evaluate.baselines.words import split_words


class Retrieval:
    """BM25 over texts; a Chinese character is a word.

    >>> found = Retrieval(["the cat sat", "a dog ran", "你好 吗"])
    >>> found.order("a dog?").tolist(), found.order("你好", k=1).tolist()
    ([1, 0, 2], [2])
    """

    def __init__(self, texts: Sequence[str], k1: float = 1.5, b: float = 0.75):
        import bm25s

        require(k1 >= 0, "k1", k1, "must be at least 0")
        require(0 <= b <= 1, "b", b, "must be in 0..1")
        words = [split_words(text) for text in texts]
        if not any(words):
            raise DataError(f"{len(words)} texts hold no word, so none can be found")
        logging.getLogger("bm25s").setLevel(logging.WARNING)
        self.n_texts = len(words)
        self._index = bm25s.BM25(k1=k1, b=b)
        self._index.index(words, show_progress=False)

    def similarities(self, text: str) -> np.ndarray:
        """BM25 of the text with each indexed one, `[texts]`; 0 where no word is shared."""
        known = [word for word in split_words(text) if word in self._index.vocab_dict]
        if not known:
            return np.zeros(self.n_texts, dtype=np.float32)
        return self._index.get_scores(known)

    def order(self, text: str, k: int | None = None) -> np.ndarray:
        """Places of the nearest `k` texts (all where None), nearest first; the earlier one of equals."""
        return np.argsort(-self.similarities(text), kind="stable")[:k]


@register_baseline(
    "bm25",
    "the answer of the training example whose text BM25 finds nearest",
    reads=("text", "bag"),
    answers=("class", "sequence", "text"),
    libraries=("bm25s",),
)
def bm25(problem: Problem, k1: float = 1.5, b: float = 0.75) -> Fitted:
    """Fit it. Where no word is shared with any training text, the most frequent answer is given."""
    columns = list(dict.fromkeys(given.column for given in problem.inputs.values()))  # type: ignore[union-attr]
    if len(columns) != 1:
        raise ConfigError(f"baseline 'bm25' reads one column of text; got {', '.join(columns)}")
    replies: list[Any] = list(problem.train[problem.target.column])
    index = Retrieval([_text(text) for text in problem.train[columns[0]]], k1, b)
    keys = [str(reply) for reply in replies]
    # the first of the most frequent ones
    fallback = replies[keys.index(Counter(keys).most_common(1)[0][0])]

    def predict(examples: Examples) -> Answers:
        found = []
        for text in examples[columns[0]]:
            near = index.similarities(_text(text))
            best = int(near.argmax())
            found.append(replies[best] if near[best] > 0 else fallback)
        return Answers(found)

    return Fitted(predict, {"k1": k1, "b": b})


def _text(text: Any) -> str:
    return "" if text is None else text if isinstance(text, str) else " ".join(text)
