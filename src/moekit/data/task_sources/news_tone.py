"""News by topic beside reviews by tone: two tasks whose examples come from two collections, none of which has both.

A model with a head for each learns the tone where it is known, from people's ratings of reviews, and says it of news
as well: transferred, and not checked there, because nobody rated these news. To leave the heads little but the words to
tell the collections by, the reviews are made like the news: lower case, letters only.
"""

from __future__ import annotations

import re
from typing import Any, Literal

from moekit.config.errors import require
from moekit.data.documents import SourceInfo
from moekit.data.examples import Examples, TaskData
from moekit.data.task_sources.base import Fetcher, register_source
from moekit.data.task_sources.news import r8, r52
from moekit.data.task_sources.own_split import shared
from moekit.data.task_sources.sentiment import reviews

_DOMAINS = ("tweets", "movies", "products", "editorials")


@register_source(
    "news-tone",
    "7,674 news of Reuters by topic and some 19,000 snippets of reviews by tone, each known by one of them (composed)",
    columns={
        "text": "the news or the snippet, lower case, letters only",
        "topic": "the topic of a news; None for a snippet",
        "tone": "positive or negative; None for a news",
        "order": "the place of a news in its files, training first; -1 for a snippet",
        "collection": "news, tweets, movies, products or editorials",
    },
    licence="research only (Reuters-21578); MIT (the reviews)",
    research_only=True,
)
def news_tone(
    fetch: Fetcher, news: Literal["r8", "r52"] = "r8", domains: tuple[str, ...] = _DOMAINS
) -> TaskData:
    """News with the given test, and snippets with the test of `reviews`.

    Args:
        news: "r8" or "r52".
        domains: of the snippets: tweets, movies, products, editorials.

    Errors: `ConfigError` for other options; `DataError` where a package cannot be had.
    """
    require(news in ("r8", "r52"), "data.options.news", news, "must be r8 or r52")
    wanted = tuple(domains)
    require(wanted and set(wanted) <= set(_DOMAINS), "data.options.domains", list(wanted),
            f"must name some of {', '.join(_DOMAINS)}")  # fmt: skip
    topics = (r8 if news == "r8" else r52)(fetch)
    tones = reviews(fetch)
    train, test = (
        _joined(*parts, wanted) for parts in ((topics.train, tones.train), (topics.test, tones.test))
    )
    # letters alone make some snippets of the test equal to some of training
    same = shared(train["text"], test["text"])
    kept = [row for row in range(len(test)) if row not in same or test["topic"][row] is not None]
    left_out, test = len(test) - len(kept), test.rows(kept)
    note = (
        f"news {news} and snippets of {', '.join(wanted)}, which are made like the news: lower case, letters only; no "
        f"text has both a topic and a tone; {left_out} snippets of the test that stand in training too were left out"
    )
    composed = SourceInfo("news-tone", "composed by moekit", "that of its parts", None, note)
    sources = [*topics.sources, *tones.sources, composed]
    return TaskData(train, train.rows([]), test, sources, given_test=True)


def _joined(news: Examples, snippets: Examples, domains: tuple[str, ...]) -> Examples:
    chosen = snippets.rows([row for row, domain in enumerate(snippets["domain"]) if domain in domains])
    n, m = len(news), len(chosen)
    columns: dict[str, list[Any]] = {
        "text": [*news["text"], *(plain_letters(text) for text in chosen["text"])],
        "topic": [*news["label"], *[None] * m],
        "tone": [*[None] * n, *chosen["label"]],
        "order": [*news["order"], *[-1] * m],
        "collection": [*["news"] * n, *chosen["domain"]],
    }
    return Examples(columns)


def plain_letters(text: str) -> str:
    """Lower case, everything but Latin letters a space, as the news have it.

    >>> plain_letters("It's GREAT, 10/10!")
    'it s great'
    """
    return " ".join(re.sub(r"[^a-z]+", " ", text.lower()).split())
