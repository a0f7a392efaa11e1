"""Sentences and paragraphs in two languages: Bible verses, English and Spanish, and a handbook in 26 languages.

What the packages hold was read from them:

* sword-text-web 426.0-1 is the World English Bible with 17 deuterocanonical books, numbered as the NRSV with apocrypha;
  sword-text-sparv 2.60-1 is the Spanish Reina-Valera of 1909, numbered as the King James Version. Verses are aligned by
  book, chapter and number. Debian has no Chinese text of this kind.
* debian-handbook 11.20220922 holds the same pages with the same paragraphs in each language; what is not translated
  yet stands there in English.
"""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import PurePosixPath

from moekit.config.errors import DataError, MissingExtraError, nearest, require
from moekit.data.clients import Package
from moekit.data.documents import SourceInfo
from moekit.data.examples import Examples, TaskData, split_examples
from moekit.data.registry import PackageFolder
from moekit.data.task_sources.base import Fetcher, register_source

_SEED = 0  # of the splits made here, so that the test is the same in every run
_SHARES = [0.05, 0.05]  # of validation and test

# ---------------------------------------------------------------------------------------------------------- verses

_SWORD_FILES = tuple(f"usr/share/sword/modules/texts/ztext/*/{part}" for part in ("*.bzs", "*.bzv", "*.bzz"))
ENGLISH_BIBLE = Package(
    client="apt",
    name="sword-text-web",
    version="426.0-1",
    digest="sha256:930b23670b352f0829a306501de4bebb5e654a2df02cde2cbe86b802177868e1",
    members=(*_SWORD_FILES, "usr/share/doc/*/copyright"),
)
SPANISH_BIBLE = Package(
    client="apt",
    name="sword-text-sparv",
    version="2.60-1",
    digest="sha256:5c87f9b2bc97457e8a872f5bae7ea7ce59cb3de1dcee73e4d4740451863694cf",
    members=(*_SWORD_FILES, "usr/share/doc/*/copyright"),
)


@register_source(
    "bible-en-es",
    "31,077 verses of the Bible in English and Spanish",
    columns={
        "source": "a verse in English (World English Bible)",
        "target": "the same in Spanish (Reina-Valera, 1909)",
        "book": "its book, as OSIS abbreviates it",
        "chapter": "book and chapter",
    },
    licence="public domain",
)
def bible(fetch: Fetcher) -> TaskData:
    """A twentieth of the chapters is tested on, another is for validation: no chapter stands in two parts.

    Errors: `MissingExtraError` without pysword; `DataError` where the packages cannot be had.
    """
    require_pysword()
    english = dict(verses(fetch(ENGLISH_BIBLE), "nrsva"))
    spanish = dict(verses(fetch(SPANISH_BIBLE), "kjv"))
    both = [place for place in english if place in spanish]
    examples = Examples(
        {
            "source": [english[place] for place in both],
            "target": [spanish[place] for place in both],
            "book": [place[0] for place in both],
            "chapter": [f"{place[0]} {place[1]}" for place in both],
        }
    )
    note = f"{len(both)} verses that both have, aligned by their numbers; split by chapter"
    described = {
        ENGLISH_BIBLE: "Debian; World English Bible of eBible.org",
        SPANISH_BIBLE: "Debian; Reina-Valera, 1909, of eBible.org",
    }
    sources = [
        SourceInfo(f"{package.name} {package.version}", origin, "public domain",
                   package.digest.removeprefix("sha256:"), note)
        for package, origin in described.items()
    ]  # fmt: skip
    train, validation, test = split_examples(examples, _SHARES, _SEED, together="chapter")
    return TaskData(train, validation, test, sources)


def require_pysword() -> None:
    """Errors: `MissingExtraError` where pysword, which knows how verses are numbered, is not installed."""
    try:
        import pysword.books  # noqa: F401
    except ImportError:
        raise MissingExtraError(
            "Bible texts are read with pysword, which is not installed. Install it: pip install 'moekit[tasks]'"
        ) from None


def verses(package: PackageFolder, numbering: str) -> Iterator[tuple[tuple[str, int, int], str]]:
    """((book, chapter, verse), text) of a compressed SWORD text, without the empty ones.

    pysword says which verse stands where. The blocks are opened here: a block is a whole book, and pysword opens it
    anew for each verse, which takes minutes for a Bible.
    """
    from pysword.books import BibleStructure

    structure = BibleStructure(numbering)
    for testament, books in structure.get_books().items():
        data = {}
        for part in ("bzv", "bzs", "bzz"):
            found = [name for name in package.files if name.endswith(f"/{testament}.{part}")]
            if len(found) != 1:
                raise DataError(
                    f"{package.package.name} has {len(found)} files {testament}.{part}; it must have one"
                )
            data[part] = (package.folder / found[0]).read_bytes()
        blocks: dict[int, bytes] = {}
        for book in books:
            for chapter in range(1, book.num_chapters + 1):
                places = structure.ref_to_indicies(books=[book.name], chapters=[chapter])[testament]
                for number, place in enumerate(places, 1):
                    text = plain_verse(_verse(data, place, blocks))
                    if text:
                        yield (book.osis_name, chapter, number), text


def _verse(data: dict[str, bytes], place: int, blocks: dict[int, bytes]) -> str:
    """The marked-up verse: a record of (block, start, length), a block of (offset, size, size unpacked)."""
    if (place + 1) * 10 > len(data["bzv"]):
        return ""
    block, start, length = struct.unpack_from("<IIH", data["bzv"], place * 10)
    if length == 0 or (block + 1) * 12 > len(data["bzs"]):
        return ""
    if block not in blocks:
        offset, size, _ = struct.unpack_from("<III", data["bzs"], block * 12)
        try:
            blocks[block] = zlib.decompress(data["bzz"][offset : offset + size])
        except zlib.error as error:
            raise DataError(f"block {block} of a Bible text cannot be unpacked: {error}") from None
    return blocks[block][start : start + length].decode("utf-8", errors="replace")


_NOTES = re.compile(r"<(note|title)\b[^>]*?(?:/>|>.*?</\1>)", re.DOTALL)
_TAGS = re.compile(r"<[^>]*>")
_SPACE_BEFORE = re.compile(r"\s+([,.;:!?”’)])")


def plain_verse(text: str) -> str:
    """The words of a verse in OSIS: no footnotes, no headings, no tags; entities and spaces put right.

    >>> plain_verse('<w lemma="x">God</w><note>or gods</note><w>created</w> <q>it</q> .')
    'God created it.'
    """
    text = _TAGS.sub("", _NOTES.sub(" ", text))
    for name, character in (("&lt;", "<"), ("&gt;", ">"), ("&quot;", '"'), ("&apos;", "'"), ("&amp;", "&")):
        text = text.replace(name, character)
    return _SPACE_BEFORE.sub(r"\1", " ".join(text.split()))


# ------------------------------------------------------------------------------------------------------ paragraphs

LANGUAGES = {
    "ar": "ar-MA", "ca": "ca-ES", "cs": "cs-CZ", "da": "da-DK", "de": "de-DE", "el": "el-GR", "en": "en-US",
    "es": "es-ES", "fa": "fa-IR", "fr": "fr-FR", "hr": "hr-HR", "id": "id-ID", "it": "it-IT", "ja": "ja-JP",
    "ko": "ko-KR", "nb": "nb-NO", "nl": "nl-NL", "pl": "pl-PL", "pt": "pt-BR", "ro": "ro-RO", "ru": "ru-RU",
    "sv": "sv-SE", "tr": "tr-TR", "vi": "vi-VN", "zh": "zh-CN", "zh-tw": "zh-TW",
}  # fmt: skip
_PAGES = "usr/share/doc/debian-handbook/html"


def handbook_package(*languages: str) -> Package:
    """The package with the pages of these languages, and of English, which shows what is translated."""
    folders = sorted({LANGUAGES["en"], *(LANGUAGES[language] for language in languages)})
    return Package(
        client="apt",
        name="debian-handbook",
        version="11.20220922",
        digest="sha256:3d5dbeac1f1afc9c094eab9d0f701f6ecff99c4927d5a4794cf6c85678134faa",
        members=(
            *(f"{_PAGES}/{folder}/*.html" for folder in folders),
            "usr/share/doc/debian-handbook/copyright",
        ),
    )


@register_source(
    "handbook",
    "up to 2,500 paragraphs of a handbook of Debian in two of 26 languages (en-es 2,380, en-zh 2,075)",
    columns={
        "source": "a paragraph in the language `source`",
        "target": "the same in the language `target`",
        "page": "the page that it stands on",
    },
    licence="GPL-2.0-or-later or CC-BY-SA-3.0",
)
def handbook(fetch: Fetcher, source: str = "en", target: str = "es") -> TaskData:
    """About a twentieth of the pages is tested on, another is for validation: no page stands in two parts.

    Args:
        source, target: languages: ar, ca, cs, da, de, el, en, es, fa, fr, hr, id, it, ja, ko, nb, nl, pl, pt, ro, ru,
            sv, tr, vi, zh, zh-tw. cs, da, el, hr, ko, nl and pl are translated in small part only.

    Errors: `ConfigError` for a language that it has not; `DataError` where the package cannot be had.
    """
    for name, language in (("source", source), ("target", target)):
        require(language in LANGUAGES, f"data.options.{name}", language, "must be a language of the handbook",
                nearest(str(language), LANGUAGES))  # fmt: skip
    require(source != target, "data.options.target", target, "must differ from data.options.source")
    package = fetch(handbook_package(source, target))
    columns: dict[str, list[str]] = {"source": [], "target": [], "page": []}
    seen = set()
    for page in sorted(name for name in package.files if f"/{LANGUAGES['en']}/" in name):
        english = paragraphs(package.read_text(page))
        sides = []
        for language in (source, target):
            name = page.replace(f"/{LANGUAGES['en']}/", f"/{LANGUAGES[language]}/")
            sides.append(paragraphs(package.read_text(name)) if name in package.files else [])
        if not len(english) == len(sides[0]) == len(sides[1]):
            continue  # without the same paragraphs nothing says which belong together
        for original, *pair in zip(english, *sides, strict=True):
            translated = all(text and (language == "en" or text != original)
                             for text, language in zip(pair, (source, target), strict=True))  # fmt: skip
            if translated and tuple(pair) not in seen:
                seen.add(tuple(pair))
                columns["source"].append(pair[0])
                columns["target"].append(pair[1])
                columns["page"].append(PurePosixPath(page).stem)
    info = SourceInfo(
        f"{package.package.name} {package.package.version}",
        "Debian; The Debian Administrator's Handbook, Hertzog and Mas, and its translators",
        "GPL-2.0-or-later or CC-BY-SA-3.0",
        package.package.digest.removeprefix("sha256:"),
        f"{len(seen)} paragraphs in {source} and {target}, aligned by their place on the page; those that are not "
        "translated, and doubles, left out; split by page",
    )
    train, validation, test = split_examples(Examples(columns), _SHARES, _SEED, together="page")
    return TaskData(train, validation, test, [info])


_EMPTY_TAGS = frozenset({"br", "img", "hr", "meta", "link", "input", "col"})


class _Paragraphs(HTMLParser):
    """Collects the text of each `<div class="para">`; one inside another is a paragraph by itself."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.found: list[list[str]] = []
        self._open: list[tuple[str, list[str] | None]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in _EMPTY_TAGS:
            return
        pieces: list[str] | None = None
        if tag == "div" and dict(attrs).get("class") == "para":
            pieces = []
            self.found.append(pieces)
        self._open.append((tag, pieces))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        if any(tag == name for name, _ in self._open):
            while self._open.pop()[0] != tag:
                pass

    def handle_data(self, data: str) -> None:
        for tag, pieces in reversed(self._open):
            if tag == "pre":  # listings are the same in every language
                return
            if pieces is not None:
                pieces.append(data)
                return


def paragraphs(page: str) -> list[str]:
    """The paragraphs of a page, in the order in which they begin; an empty one stays as an empty text.

    >>> paragraphs('<div class="para">A <b>b</b><pre>x = 1</pre><ul><div class="para">c</div></ul> d</div>')
    ['A b d', 'c']
    """
    reader = _Paragraphs()
    reader.feed(page)
    return [" ".join("".join(pieces).split()) for pieces in reader.found]
