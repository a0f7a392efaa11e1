"""What sources without a given test share: doubles leave first, then a fixed share is set aside."""

from __future__ import annotations

import json
import unicodedata
from collections import defaultdict
from collections.abc import Callable

from moekit.data.clients import Package
from moekit.data.documents import SourceInfo
from moekit.data.examples import Examples, TaskData, Values, split_examples

TEST_SHARE = 0.2
SEED = 0  # of every split made here: the test of a source is the same in every run, whatever the run's seed


def plain(text: str) -> str:
    """What two texts must share to count as the same: NFKC, lower case, single spaces.

    >>> plain("Ｇood   Day\\n") == plain("good day")
    True
    """
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def letters(text: str) -> str:
    """As `plain`, but only letters and digits count; for texts that are copied with other punctuation.

    >>> letters("不错！") == letters("不错...")
    True
    """
    return "".join(
        character for character in unicodedata.normalize("NFKC", text).casefold() if character.isalnum()
    )


def info_of(package: Package, origin: str, licence: str, note: str) -> SourceInfo:
    """What a source says of its package; npm's digest is no sha256 and goes into the note."""
    if package.digest.startswith("sha256:"):
        sha256: str | None = package.digest.removeprefix("sha256:")
    else:
        sha256, note = None, f"{note}; checked against {package.digest}"
    return SourceInfo(f"{package.name} {package.version}", origin, licence, sha256, note)


def without_doubles(
    examples: Examples, label: str | None = "label", text: str = "text", same: Callable[[str], str] = plain
) -> tuple[Examples, str]:
    """The first example of each text, none of a text that has two labels, none that is empty; and what was left out.

    Args:
        examples: with the columns `text` and `label`.
        label: None where a text cannot contradict itself; then the first stays whatever the others say.
        same: two texts are one where this says the same of both; empty where there is nothing to go by.

    >>> examples = Examples({"text": ["a", "A", "b", "b", " "], "label": [1, 1, 1, 2, 1]})
    >>> without_doubles(examples)[0].columns
    {'text': ['a'], 'label': [1]}
    >>> without_doubles(examples)[1]
    'left out: 1 double, 2 of a text under two labels, 1 empty'
    """
    places: dict[str, list[int]] = defaultdict(list)
    for place, value in enumerate(examples[text]):
        places[same(value)].append(place)
    empty = len(places.pop("", []))
    kept, doubles, conflicts = [], 0, 0
    for rows in places.values():
        if label is not None and len({examples[label][row] for row in rows}) > 1:
            conflicts += len(rows)
            continue
        kept.append(rows[0])
        doubles += len(rows) - 1
    left_out = f"left out: {_count(doubles, 'double')}, {conflicts} of a text under two labels, {empty} empty"
    return examples.rows(sorted(kept)), left_out


def _count(number: int, word: str) -> str:
    return f"{number} {word}" if number == 1 else f"{number} {word}s"


def shared(train: Values, test: Values) -> set[int]:
    """The places in the test whose value stands in training too, as it is.

    >>> shared([["a", "b"], ["c"]], [["c"], ["d"]])
    {0}
    """
    known = {json.dumps(value) for value in train}
    return {place for place, value in enumerate(test) if json.dumps(value) in known}


def nothing_of(examples: Examples) -> Examples:
    """No example, with the same columns."""
    return examples.rows([])


def given_split(train: Examples, validation: Examples, test: Examples, column: str) -> tuple[TaskData, str]:
    """The splits as the source gives them, and how much of the test stands in training; its info is still to add."""
    same = len(shared(train[column], test[column]))
    note = (
        "the given split" if len(validation) else "the given split; no validation is given"
    ) + f"; {same} of the test's {len(test)} stand in training too and are kept, so that figures compare"
    return TaskData(train, validation, test, given_test=True), note


def own_split(
    examples: Examples, *, by: str | None = None, together: str | None = None, column: str = "text"
) -> tuple[TaskData, str]:
    """A fifth for the test, the same every time, the rest for training; and a note that says so.

    A test example whose `column` stands in training word for word is left out of the test.

    Args:
        by: a column whose values have about the same shares in both.
        together: a column whose equal values stay in one of them.
    """
    train, test = split_examples(examples, [TEST_SHARE], SEED, by=by, together=together)
    same = shared(train[column], test[column])
    test = test.rows([place for place in range(len(test)) if place not in same])
    note = f"no split is given: {TEST_SHARE:.0%} were set aside for the test"
    note += f", no {together} in both" if together is not None else ""
    note += f"; {len(same)} of them that stand in training too were left out" if same else ""
    return TaskData(train, nothing_of(train), test), note
