"""Cutting, doubles, trimming and the split: exact, deterministic, and no original in two splits."""

from __future__ import annotations

import pytest
from data_samples import numbered
from hypothesis import given
from hypothesis import strategies as st

from moekit.data.documents import (
    Document,
    cut_documents,
    cut_text,
    remove_doubles,
    split_documents,
    trim_documents,
)


@given(st.text(alphabet=st.sampled_from("ab .\n中🙂é"), max_size=300), st.integers(4, 60))
def test_pieces_join_to_the_text_and_keep_the_limit(text: str, limit: int) -> None:
    pieces = cut_text(text, limit)
    assert "".join(pieces) == text
    assert all(0 < len(piece.encode()) <= limit for piece in pieces)


@pytest.mark.parametrize(
    ("text", "second"),
    [
        ("one\n\ntwo words\nthree\n\nACT II.\nfour\n\nfive\n", "ACT II.\nfour\n\nfive\n"),
        (
            "import os\nimport sys\n\nx = 1\n\n\ndef f():\n    return 1\n\n\n\n",
            "def f():\n    return 1\n\n\n\n",
        ),
        ("a paragraph of text\n\nanother one\nwith lines", "another one\nwith lines"),
        ("a line of some words\nanother line", "another line"),
        ("A sentence of some words. Another one.", "Another one."),
        ("汉字汉字汉字汉字。汉字汉字汉字", "汉字汉字汉字"),
    ],
)
def test_cuts_fall_at_the_best_place(text: str, second: str) -> None:
    assert cut_text(text, len(text.encode()) - 4) == [text.removesuffix(second), second]


def test_pieces_share_the_group_of_their_original() -> None:
    documents = [Document("word " * 100, "d", "long"), Document("short", "d", "short")]
    pieces = cut_documents(documents, 200)
    assert [piece.name for piece in pieces] == ["long#1", "long#2", "long#3", "short"]
    assert {piece.original for piece in pieces} == {"long", "short"}
    assert len({piece.original for piece in cut_documents(documents, 200, own_groups=True)}) == 4


def test_doubles_go_and_the_first_stays() -> None:
    play = "\n".join(f"This is line number {i} of a play that somebody wrote" for i in range(50))
    half_new = (
        "\n".join(f"Another line {i} that is in no other document at all" for i in range(60)) + "\n" + play
    )
    documents = [
        Document(play, "d", "play"),
        Document(play.upper().replace("\n", " \n "), "d", "same words"),
        Document("Preface of the second edition.\n" + play, "d", "with preface"),
        Document(half_new, "d", "half new"),
        Document("  \n ", "d", "empty"),
        Document("ｆｕｌｌ width", "d", "full"),
        Document("full width", "d", "half"),
    ]
    assert [document.name for document in remove_doubles(documents)] == ["play", "half new", "full"]


def test_long_lines_are_compared_by_sentence() -> None:
    speech = " ".join(f"Sentence {i} of the address is about matter number {i * i}." for i in range(30))
    documents = [
        Document(speech, "d", "a"),
        Document("Fellow citizens: hear this at last! " + speech, "d", "b"),
    ]
    assert [document.name for document in remove_doubles(documents)] == ["a"]


def test_trimming_takes_whole_originals_within_the_budget() -> None:
    documents = cut_documents(numbered("a", 40, 600), 200)
    chosen = trim_documents(documents, 6000)
    total = sum(document.n_bytes for document in chosen)
    assert 0.8 * 6000 < total <= 6000
    for original in {document.original for document in chosen}:
        assert [d for d in documents if d.original == original] == [
            d for d in chosen if d.original == original
        ]
    assert trim_documents(documents, 6000) == chosen
    assert {d.name for d in trim_documents(list(reversed(documents)), 6000)} == {d.name for d in chosen}
    assert trim_documents(documents, 10**9) == documents


def test_one_original_larger_than_the_budget_gives_its_beginning() -> None:
    pieces = cut_documents([Document("word " * 200, "d", "book")], 100)
    assert [piece.name for piece in trim_documents(pieces, 250)] == ["book#1", "book#2"]


@given(st.integers(0, 50))
def test_no_original_is_in_two_splits(seed: int) -> None:
    documents = cut_documents(numbered("a", 60) + numbered("b", 25, 900), 250)
    train, validation = split_documents(documents, 0.1, seed)
    assert not {d.original for d in train} & {d.original for d in validation}
    assert sorted(d.name for d in train + validation) == sorted(d.name for d in documents)
    for domain in "ab":
        held = sum(d.n_bytes for d in validation if d.domain == domain)
        total = sum(d.n_bytes for d in documents if d.domain == domain)
        assert 0.08 < held / total < 0.16


def test_the_split_depends_on_the_seed_and_on_nothing_else() -> None:
    documents = numbered("a", 60)
    first = split_documents(documents, 0.1, 0)
    shuffled = split_documents(documents[::-1], 0.1, 0)
    assert {d.name for d in first[1]} == {d.name for d in shuffled[1]}
    assert {d.name for d in first[1]} != {d.name for d in split_documents(documents, 0.1, 1)[1]}
    # known by value: a change of this list would silently change every published split
    assert sorted(d.name for d in first[1]) == ["a/23", "a/24", "a/30", "a/44", "a/47", "a/59"]


def test_few_large_originals_give_the_smallest_and_one_gives_none() -> None:
    documents = [Document("x" * size, "d", str(size)) for size in (900, 1000, 1100)]
    assert [d.name for d in split_documents(documents, 0.05, 0)[1]] == ["900"]
    assert split_documents(documents[:1], 0.05, 0)[1] == []
