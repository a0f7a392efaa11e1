"""Doubles, contradictions and the split of sources that bring none."""

from __future__ import annotations

import pytest
from text_source_samples import check_own_split

from moekit.data.clients import Package
from moekit.data.documents import SourceInfo
from moekit.data.examples import Examples, TaskData
from moekit.data.task_sources.own_split import (
    given_split,
    info_of,
    letters,
    nothing_of,
    own_split,
    plain,
    shared,
    without_doubles,
)


def sample() -> Examples:
    texts = ["Good", "good ", "good!", "bad", "bad", "", "!", "fine"]
    return Examples({"text": texts, "label": ["+", "+", "+", "+", "-", "+", "-", "+"], "id": list(range(8))})


def test_the_first_of_each_text_stays_and_contradictions_leave() -> None:
    kept, note = without_doubles(sample())
    assert kept.columns["id"] == [0, 2, 6, 7]
    assert note == "left out: 1 double, 2 of a text under two labels, 1 empty"


def test_what_counts_as_the_same_is_a_choice() -> None:
    kept, note = without_doubles(sample(), same=letters)
    assert kept.columns["id"] == [0, 7]
    assert note == "left out: 2 doubles, 2 of a text under two labels, 2 empty"


def test_without_a_label_nothing_contradicts() -> None:
    kept, note = without_doubles(sample(), label=None)
    assert kept.columns["id"] == [0, 2, 3, 6, 7]
    assert "0 of a text under two labels" in note


@pytest.mark.parametrize(
    ("one", "other"), [("ＡＢＣ  1", "abc 1"), ("Straße\n", "STRASSE"), ("a\u3000b", "a b")]
)
def test_plain_sees_through_width_case_and_space(one: str, other: str) -> None:
    assert plain(one) == plain(other)


def test_plain_keeps_signs_and_letters_drops_them() -> None:
    assert plain("good!") != plain("good")
    assert letters("不错！") == letters("不错。。")
    assert letters("a1") != letters("a2")


def grouped() -> Examples:
    words = [[f"w{i}", "x"] for i in range(50)]
    words[30] = words[0]
    return Examples(
        {"words": words, "label": ["ab"[i % 2] for i in range(50)], "document": [i // 5 for i in range(50)]}
    )


def test_groups_stay_together_and_what_training_holds_leaves_the_test() -> None:
    examples = grouped()
    data, note = own_split(examples, by="label", together="document", column="words")
    data = TaskData(data.train, data.validation, data.test, [SourceInfo("x", "y", "z", None, note)])
    check_own_split(data, "document")
    assert not shared(data.train["words"], data.test["words"])
    left_out = 50 - len(data.train) - len(data.test)
    assert (f"{left_out} of them" in note) == (left_out > 0)


def test_the_double_across_documents_is_dropped_from_the_test_only() -> None:
    # documents 2 and 9 are the test; sentence 10 is of document 2, sentence 0 of document 0
    examples = grouped()
    examples["words"][10] = examples["words"][0]  # type: ignore[index]
    data, note = own_split(examples, together="document", column="words")
    assert set(data.test["document"]) == {2, 9}
    assert data.train["words"].count(["w0", "x"]) == 2  # sentences 0 and 30; doubles in training stay
    assert data.test["words"].count(["w0", "x"]) == 0
    assert len(data.test) == 9
    assert "1 of them that stand in training too were left out" in note


def test_the_split_is_the_same_every_time() -> None:
    first, second = (own_split(grouped(), by="label", column="words")[0] for _ in range(2))
    assert first.fingerprint() == second.fingerprint()


def test_a_given_split_is_kept_and_its_doubles_are_counted() -> None:
    train = Examples({"text": ["a", "b"]})
    data, note = given_split(train, nothing_of(train), Examples({"text": ["b", "c", "b"]}), "text")
    assert data.given_test
    assert len(data.test) == 3
    assert "2 of the test's 3" in note
    assert "no validation is given" in note


def test_npm_digests_go_into_the_note() -> None:
    pip = info_of(Package("pip", "a", "1", "sha256:00"), "PyPI", "MIT", "n")
    npm = info_of(Package("npm", "a", "1", "sha512-xyz=="), "npm", "MIT", "n")
    assert (pip.sha256, pip.note) == ("00", "n")
    assert (npm.sha256, npm.note) == (None, "n; checked against sha512-xyz==")
