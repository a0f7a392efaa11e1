"""Requests to a service desk by domain: technical, medical, finance, smart home and small talk (composed).

Each domain comes from another collection, so a classifier could tell the collections apart in place of the domains.
To leave it little but the words, all texts are made alike: lower case, Latin letters alone (as two of the collections
are already), and at most twelve words; of long texts, a stretch from a random place. What remains is that each
collection has its own vocabulary and manner, so a figure on these examples says how well the collections' topics are
told apart, not how well a desk would do in an office.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

import numpy as np

from moekit.config.errors import DataError, require
from moekit.data.documents import SourceInfo
from moekit.data.examples import Examples, TaskData, split_examples
from moekit.data.task_sources.base import Fetcher, register_source
from moekit.data.task_sources.chinese_tagging import chinese_tags
from moekit.data.task_sources.dialogue import chatterbot
from moekit.data.task_sources.intents import intents
from moekit.data.task_sources.medicine import icd10
from moekit.data.task_sources.news import newsgroups, r8
from moekit.data.task_sources.sentiment import chinese_sentiment

MOST_WORDS = 12
FEWEST_WORDS = 3  # of a stretch of a long text
_TECHNICAL = ("comp.", "sci.electronics")
# what the other domains are about is no small talk
_NOT_CHAT = frozenset({"computers", "coding", "tech_support", "money", "health", "science"})
_SEED = 0
_HELD = 0.1

Rows = list[tuple[str, str, str]]  # text, domain, intent


@register_source(
    "desk",
    "up to 7,500 requests of five domains, each from another collection, made alike and shortened (composed)",
    columns={
        "text": "the request: up to 12 words in lower case, letters only (Chinese: up to 24 characters)",
        "label": "the domain: technical, medical, finance, home or chat (Chinese: chat, home, news or shopping)",
        "intent": "the domain and what its collection says of the text: newsgroup, chapter, topic, intent",
    },
    licence="research only (Reuters-21578); otherwise that of 20newsgroups, icd10, r8, intents and chatterbot",
    research_only=True,
)
def desk(
    fetch: Fetcher,
    language: Literal["english", "chinese"] = "english",
    per_domain: int = 1200,
    test_per_domain: int = 300,
) -> TaskData:
    """Requests by domain; each collection's own test part is tested on, a tenth of the rest is for validation.

    Args:
        language: "english", or "chinese" with four domains: small talk, smart home, news of 1998 and reviews.
        per_domain: examples of a domain at most, its intents as evenly as they are there; 10 to 100,000.
        test_per_domain: the same for the test.

    Errors: `ConfigError` for other options; `DataError` where a package cannot be had.
    """
    require(
        language in ("english", "chinese"), "data.options.language", language, "must be english or chinese"
    )
    for name, value in (("per_domain", per_domain), ("test_per_domain", test_per_domain)):
        require(10 <= value <= 100_000, f"data.options.{name}", value, "must be 10 to 100000")
    made = _english(fetch) if language == "english" else _chinese(fetch)
    shorten = shortened if language == "english" else shortened_chinese
    train, test = (
        _part(made, place, size, shorten, np.random.Generator(np.random.PCG64([_SEED, place])))
        for place, size in ((0, per_domain), (1, test_per_domain))
    )
    seen = set(train["text"])
    test = test.rows([row for row, text in enumerate(test["text"]) if text not in seen])
    train, validation = split_examples(train, [_HELD], _SEED, by="intent")
    counts = ", ".join(f"{count} {domain}" for domain, count in sorted(Counter(train["label"]).items()))
    note = (
        f"composed from {len(made)} collections, one for each domain; lower case, letters only, at most {MOST_WORDS} "
        f"words; to train on: {counts}; test texts that stand in training were left out"
    )
    composed = SourceInfo(f"desk ({language})", "composed by moekit", "that of its parts", None, note)
    sources = [info for data, _ in made.values() for info in data.sources]
    return TaskData(train, validation, test, [*dict.fromkeys(sources), composed])


def _english(fetch: Fetcher) -> dict[str, tuple[TaskData, Callable[[Examples], Rows]]]:
    return {
        "technical": (newsgroups(fetch), lambda part: [
            (text, "technical", label) for text, label in _columns(part, "text", "label")
            if label.startswith(_TECHNICAL)
        ]),
        "medical": (icd10(fetch), lambda part: [
            (text, "medical", label) for text, label in _columns(part, "text", "label")
        ]),
        "finance": (r8(fetch), lambda part: [
            (text, "finance", label) for text, label in _columns(part, "text", "label")
        ]),
        "home": (intents(fetch), lambda part: [
            (text, "home", label) for text, label in _columns(part, "text", "label")
        ]),
        "chat": (_with_validation_to_test_on(chatterbot(fetch)), _chat),
    }  # fmt: skip


def _chinese(fetch: Fetcher) -> dict[str, tuple[TaskData, Callable[[Examples], Rows]]]:
    tagged = chinese_tags(fetch)
    return {
        "chat": (_with_validation_to_test_on(chatterbot(fetch, "chinese")), _chat),
        "home": (intents(fetch, "zh-CN"), lambda part: [
            (text, "home", label) for text, label in _columns(part, "text", "label")
        ]),
        "news": (tagged, lambda part: [("".join(words), "news", "news") for (words,) in _columns(part, "words")]),
        "shopping": (chinese_sentiment(fetch), lambda part: [
            (text, "shopping", label) for text, label in _columns(part, "text", "label")
        ]),
    }  # fmt: skip


def _with_validation_to_test_on(data: TaskData) -> TaskData:
    """A small source of which both held parts are tested on."""
    columns = {name: [*values, *data.test[name]] for name, values in data.validation.columns.items()}
    return replace(data, test=Examples(columns))


def _chat(part: Examples) -> Rows:
    """What is said and what answers it, of topics that are small talk."""
    rows = []
    for question, answer, topic in _columns(part, "question", "answer", "topic"):
        if topic not in _NOT_CHAT:
            rows += [(question, "chat", topic), (answer, "chat", topic)]
    return rows


def _columns(part: Examples, *names: str) -> list[tuple[Any, ...]]:
    return list(zip(*(part[name] for name in names), strict=True))


def _part(
    made: dict[str, tuple[TaskData, Callable[[Examples], Rows]]],
    place: int,
    most: int,
    shorten: Callable[[str, np.random.Generator], str],
    rng: np.random.Generator,
) -> Examples:
    """The training (`place` 0) or test part: up to `most` of each domain, no text twice."""
    texts: dict[str, tuple[str, str]] = {}
    for data, rows_of in made.values():
        source = data.test if place else data.train
        found: dict[str, tuple[str, str]] = {}
        for text, domain, intent in rows_of(source):
            short = shorten(text, rng)
            if short and short not in texts:
                found.setdefault(short, (domain, f"{domain}: {intent}"))
        rows = list(found.items())
        if not rows:
            raise DataError("a collection of the desk has no text of its domain")
        chosen = evenly([intent for _, (_, intent) in rows], most, rng)
        texts.update(rows[row] for row in chosen)
    return Examples({
        "text": list(texts),
        "label": [domain for domain, _ in texts.values()],
        "intent": [intent for _, intent in texts.values()],
    })  # fmt: skip


def evenly(labels: list[str], most: int, rng: np.random.Generator) -> list[int]:
    """Up to `most` places, in order: each label in turn gives one until it has none left.

    >>> labels = ["a"] * 6 + ["b"] * 2
    >>> chosen = evenly(labels, 5, np.random.Generator(np.random.PCG64(0)))
    >>> Counter(labels[place] for place in chosen)
    Counter({'a': 3, 'b': 2})
    """
    order = rng.permutation(len(labels))
    turns: Counter[str] = Counter()
    keys: list[tuple[int, int, int]] = []
    for place in order:
        keys.append((turns[labels[place]], len(keys), int(place)))
        turns[labels[place]] += 1
    return sorted(place for _, _, place in sorted(keys)[:most])


def shortened(text: str, rng: np.random.Generator) -> str:
    """Latin letters in lower case: all of a text of up to 12 words, else 3 to 12 words from a random place.

    >>> shortened("  Type 2 diabetes mellitus, unspecified", np.random.default_rng(0))
    'type diabetes mellitus unspecified'
    """
    words = re.sub(r"[^a-z]+", " ", text.lower()).split()
    if len(words) > MOST_WORDS:
        length = int(rng.integers(FEWEST_WORDS, MOST_WORDS + 1))
        start = int(rng.integers(0, len(words) - length + 1))
        words = words[start : start + length]
    return " ".join(words)


def shortened_chinese(text: str, rng: np.random.Generator) -> str:
    """Chinese characters and Latin letters in lower case; of more than 24, 6 to 24 from a random place.

    >>> shortened_chinese("你好，AI!", np.random.default_rng(0))
    '你好ai'
    """
    found = re.sub(r"[^a-z\u4e00-\u9fff]+", "", text.lower())
    if len(found) > 2 * MOST_WORDS:
        length = int(rng.integers(2 * FEWEST_WORDS, 2 * MOST_WORDS + 1))
        start = int(rng.integers(0, len(found) - length + 1))
        found = found[start : start + length]
    return found
