"""Sources of pairs of texts: verses, paragraphs of a handbook, questions and answers; on files made here."""

from __future__ import annotations

import json
import struct
import zlib
from pathlib import Path

import pytest

from moekit.config.errors import ConfigError, DataError, MissingExtraError
from moekit.data.clients import Package, RegistryUnavailable
from moekit.data.registry import PackageFolder
from moekit.data.task_sources import dialogue, translation
from moekit.data.task_sources.base import Fetcher, load_source, task_sources


class FakeFetcher(Fetcher):
    """Hands out folders made by a test instead of packages."""

    def __init__(self, folders: dict[str, Path]):
        super().__init__()
        object.__setattr__(self, "folders", folders)

    def __call__(self, package: Package) -> PackageFolder:
        folder = self.folders[package.name]
        names = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
        return PackageFolder(package, folder, tuple(sorted(names)))


def parts_of(data) -> list:
    return [data.train, data.validation, data.test]


# ---------------------------------------------------------------------------------------------------------- verses


def write_sword(folder: Path, texts: dict[str, dict[int, str]]) -> None:
    """A compressed SWORD text: `texts[testament][place]`, in blocks of two verses."""
    folder.mkdir(parents=True, exist_ok=True)
    for testament in ("ot", "nt"):
        placed = texts.get(testament, {})
        records, blocks, packed = b"", b"", b""
        block = 0
        for place in range(max(placed, default=-1) + 1):
            text = placed.get(place, "").encode()
            if not text:
                records += struct.pack("<IIH", 0, 0, 0)
                continue
            padding = b"?" * 7  # the verse does not start its block
            squeezed = zlib.compress(padding + text)
            blocks += struct.pack("<III", len(packed), len(squeezed), len(padding + text))
            packed += squeezed
            records += struct.pack("<IIH", block, 7, len(text))
            block += 1
        for part, data in (("bzv", records), ("bzs", blocks), ("bzz", packed)):
            (folder / f"{testament}.{part}").write_bytes(data)


def test_verses_are_aligned_by_number_whatever_the_numbering_of_books(tmp_path: Path):
    books = pytest.importorskip("pysword.books")
    english, spanish = books.BibleStructure("nrsva"), books.BibleStructure("kjv")

    def places(structure, book: str, chapter: int) -> list[int]:
        return structure.ref_to_indicies(books=[book], chapters=[chapter])["nt"]

    # Matthew is the first book of the New Testament in both, Revelation the last: their places differ by little or
    # much, as the verses between them are counted
    sides = {}
    for name, structure in (("english", english), ("spanish", spanish)):
        texts = {}
        for chapter in range(1, 29):
            for number, place in enumerate(places(structure, "Matthew", chapter)[:3], 1):
                texts[place] = f"<w>{name} Mt {chapter}:{number}</w>"
        for number, place in enumerate(places(structure, "Revelation of John", 22)[:2], 1):
            texts[place] = f"{name} Rev 22:{number}<note>x</note>"
        sides[name] = texts
    del sides["spanish"][places(spanish, "Matthew", 1)[1]]
    for name, texts in sides.items():
        write_sword(tmp_path / name / "usr/share/sword/modules/texts/ztext/x", {"nt": texts})
    fetch = FakeFetcher({"sword-text-web": tmp_path / "english", "sword-text-sparv": tmp_path / "spanish"})
    data = load_source("bible-en-es", {}, fetch)
    names = ("source", "target", "book", "chapter")
    rows = [row for part in parts_of(data) for row in zip(*(part[name] for name in names), strict=True)]
    assert len(rows) == 28 * 3 + 2 - 1
    for source, target, book, chapter in rows:
        assert source.removeprefix("english ") == target.removeprefix("spanish ")
        assert book == chapter.split()[0]
        assert source.split()[1:] == [
            {"Matt": "Mt", "Rev": "Rev"}[book],
            f"{chapter.split()[1]}:{source[-1]}",
        ]
    chapters = [set(part["chapter"]) for part in parts_of(data)]
    assert all(chapters)
    assert sum(map(len, chapters)) == len(set.union(*chapters)) == 29
    assert [info.licence for info in data.sources] == ["public domain"] * 2


@pytest.mark.parametrize(
    ("marked", "text"),
    [
        ("God<note n='1'>or <i>gods</i></note>created <divineName>all</divineName> .", "God created all."),
        ("<title>Of David</title>Sing,\n  sing", "Sing, sing"),
        ("<note/>a &amp; b &lt;c&gt; &amp;lt;", "a & b <c> &lt;"),
        ("<milestone/> ", ""),
    ],
)
def test_a_verse_loses_its_marks(marked: str, text: str):
    assert translation.plain_verse(marked) == text


def test_a_broken_block_is_said(tmp_path: Path):
    pytest.importorskip("pysword")
    folder = tmp_path / "x"
    write_sword(folder, {"ot": dict.fromkeys(range(10), "verse")})
    (folder / "ot.bzz").write_bytes(b"\0" * 400)
    package = FakeFetcher({"sword-text-web": tmp_path})(translation.ENGLISH_BIBLE)
    with pytest.raises(DataError, match=r"block \d of a Bible text cannot be unpacked"):
        list(translation.verses(package, "kjv"))
    (folder / "ot.bzz").unlink()
    package = FakeFetcher({"sword-text-web": tmp_path})(translation.ENGLISH_BIBLE)
    with pytest.raises(DataError, match=r"has 0 files ot\.bzz; it must have one"):
        list(translation.verses(package, "kjv"))


def test_without_pysword_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pysword.books", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'moekit\[tasks\]'"):
        load_source("bible-en-es", {}, Fetcher(offline=True))


# ------------------------------------------------------------------------------------------------------ paragraphs


def page(*texts: str) -> str:
    inner = "".join(f'<div class="para">\n\t{text}\n</div><br /><a id="x"></a>' for text in texts)
    return f"<html><head><meta a='b'><title>t</title></head><body><ul>{inner}</ul></body></html>"


def handbook_folder(root: Path) -> Path:
    folder = root / "usr/share/doc/debian-handbook/html"
    for language in ("en-US", "es-ES", "zh-CN"):
        (folder / language).mkdir(parents=True)
    for number in range(40):
        texts = {
            "en-US": [f"One {number}", "Not translated yet", f"apt-get {number}", "The same"],
            "es-ES": [f"Uno {number}", "Not translated yet", f"<code>apt-get</code> {number}", "Lo mismo"],
            "zh-CN": [f"一 {number}", "翻译了", f"apt-get {number}", "The same"],
        }
        for language, found in texts.items():
            (folder / language / f"p{number:02d}.html").write_text(page(*found), encoding="utf-8")
    (folder / "es-ES/p00.html").write_text(page("a", "b", "c"))
    (folder / "zh-CN/p01.html").unlink()
    return root


def test_paragraphs_are_aligned_by_place_and_only_translated_ones_stay(tmp_path: Path):
    fetch = FakeFetcher({"debian-handbook": handbook_folder(tmp_path)})
    data = load_source("handbook", {}, fetch)
    pairs = {pair for part in parts_of(data) for pair in zip(part["source"], part["target"], strict=True)}
    # page 0 has another number of paragraphs in Spanish; "The same" is a double on all pages but the first
    assert pairs == {(f"One {i}", f"Uno {i}") for i in range(1, 40)} | {("The same", "Lo mismo")}
    pages = [set(part["page"]) for part in parts_of(data)]
    assert all(pages)
    assert sum(map(len, pages)) == len(set.union(*pages)) == 39
    chinese = load_source("handbook", {"source": "es", "target": "zh"}, fetch)
    pairs = {pair for part in parts_of(chinese) for pair in zip(part["source"], part["target"], strict=True)}
    assert pairs == {(f"Uno {i}", f"一 {i}") for i in range(2, 40)}


def test_paragraphs_inside_others_and_listings():
    text = (
        '<div class="para">A<br>B &amp; <code>c</code><div class="list"><div class="para">inner</div></div> end'
        '<pre>code <b>x</b></pre></div><div class="para"></div></div><p>not this</p><div class="para">last</div>'
    )
    assert translation.paragraphs(text) == ["AB & c end", "inner", "", "last"]


def test_languages_of_the_handbook_are_checked():
    with pytest.raises(
        ConfigError, match=r"data\.options\.target must be a language of the handbook; got 'zh_tw'"
    ):
        load_source("handbook", {"target": "zh_tw"}, Fetcher(offline=True))
    with pytest.raises(ConfigError, match=r"data\.options\.target must differ"):
        load_source("handbook", {"target": "en"}, Fetcher(offline=True))
    members = translation.handbook_package("es", "zh").members
    assert [name.split("/")[-2] for name in members[:-1]] == ["en-US", "es-ES", "zh-CN"]


# -------------------------------------------------------------------------------------------- questions and answers


def test_chatterbot_pairs_by_topic_and_language(tmp_path: Path):
    folder = tmp_path / "chatterbot_corpus/data"
    (folder / "english").mkdir(parents=True)
    (folder / "chinese").mkdir()
    many = "".join(f"- - Question {i}\n  - Answer {i}\n" for i in range(60))
    (folder / "english/sports.yml").write_text(
        "categories:\n- sports\nconversations:\n"
        + many
        + "- - one\n  - two\n  - three\n- - one\n  - two\n- - ONE\n  - other\n- just a text\n- - alone\n- - 1\n  - 2\n"
    )
    (folder / "chinese/ai.yml").write_text("conversations:\n- - 你好\n  - 嗨\n", encoding="utf-8")
    fetch = FakeFetcher({"chatterbot-corpus": tmp_path})
    data = load_source("chatterbot", {}, fetch)
    rows = [row for part in parts_of(data) for row in zip(part["question"], part["answer"], strict=True)]
    expected = {(f"Question {i}", f"Answer {i}") for i in range(60)} | {
        ("one", "two"),
        ("two", "three"),
        ("ONE", "other"),
    }
    assert sorted(rows) == sorted(expected)
    assert set(data.train["topic"]) == {"sports"}
    assert set(data.train["language"]) == {"english"}
    for questions in ({"one", "two", "ONE"},):  # a conversation, and another with the same question
        assert sum(bool(questions & set(part["question"])) for part in parts_of(data)) == 1
    assert "63 pairs, 1 doubles left out" in data.sources[0].note
    everything = load_source("chatterbot", {"language": "all"}, fetch)
    assert sum(map(len, parts_of(everything))) == 64
    with pytest.raises(ConfigError, match=r"got 'chinesse'\. did you mean 'chinese'"):
        load_source("chatterbot", {"language": "chinesse"}, fetch)
    with pytest.raises(DataError, match="1 examples are too few"):
        load_source("chatterbot", {"language": "chinese"}, fetch)
    (folder / "english/broken.yml").write_text("a: [")
    with pytest.raises(DataError, match=r"broken\.yml is not YAML"):
        load_source("chatterbot", {}, fetch)


def test_chitchat_pairs_turns_and_keeps_conversations_whole(tmp_path: Path):
    (tmp_path / "chitchat_dataset").mkdir()
    stored = {
        f"c{i}": {
            "messages": [
                [{"text": f"hi {i}"}, {"text": "there"}],
                [{"text": " "}],
                [{"text": "yes"}],
                [{"text": "so"}],
            ]
        }
        for i in range(60)
    }
    stored["short"] = {"messages": [[{"text": "nobody answers"}]]}
    (tmp_path / "chitchat_dataset/dataset.json").write_text(json.dumps(stored))
    data = load_source("chitchat", {}, FakeFetcher({"chitchat-dataset": tmp_path}))
    assert [len(part) for part in parts_of(data)] == [108, 6, 6]
    names = [set(part["conversation"]) for part in parts_of(data)]
    assert len(set.union(*names)) == sum(map(len, names)) == 60
    first = data.test.rows([0, 1])
    assert first["question"] == [f"hi {first['conversation'][0][1:]} there", "yes"]
    assert first["answer"] == ["yes", "so"]


def test_rows_that_share_through_others_belong_together():
    assert dialogue.joined([["a"], ["b"], ["c"], ["b", "c"], ["d", "a"]]) == [0, 1, 1, 1, 0]
    assert dialogue.joined([]) == []


def test_the_sources_are_registered_with_their_licences():
    known = task_sources()
    assert {"bible-en-es", "handbook", "chatterbot", "chitchat"} <= set(known)
    assert known["handbook"].options == {"source": "en", "target": "es"}
    assert known["bible-en-es"].licence == "public domain"


# ---------------------------------------------------------------------------------------------- the packages themselves


@pytest.mark.network
@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "options", "total"),
    [
        ("bible-en-es", {}, 31_077),
        ("handbook", {}, 2_380),
        ("handbook", {"target": "zh"}, 2_075),
        ("chatterbot", {}, 1_177),
        ("chatterbot", {"language": "chinese"}, 550),
        ("chitchat", {}, 131_557),
    ],
)
def test_the_packages_are_what_was_read_from_them(name: str, options: dict[str, str], total: int):
    if name == "bible-en-es":
        pytest.importorskip("pysword")
    try:
        data = load_source(name, options, Fetcher())
    except RegistryUnavailable as error:
        pytest.skip(str(error))
    assert sum(map(len, parts_of(data))) == total
    assert len(data.test) > 0
    assert len(data.validation) > 0
