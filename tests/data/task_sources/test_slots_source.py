"""Requests with the places of their words: parts of templates and of words, marks, the source."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
from text_source_samples import Folders, everything, rows

from moekit.config.errors import ConfigError
from moekit.data.clients import RegistryUnavailable
from moekit.data.task_sources import slots as source
from moekit.data.task_sources.base import Fetcher, load_source
from moekit.data.task_sources.intents import WORDS
from moekit.data.task_sources.slot_words import MORE_WORDS
from moekit.data.task_sources.slots import (
    SLOTS,
    joined_words,
    marked_requests,
    part_of_values,
    plain_and_spans,
)

ROOMS = "attic|barn|cellar|den|entry|foyer|garage|hall|inn|jail"
LAMPS = "alpha lamp|beta lamp|gamma lamp|delta lamp|hall"
LISTS = {"area": ROOMS, "name light": LAMPS, "name": "kettle|radio|toaster|oven|fridge", "zone": "work"}


def description() -> dict[str, object]:
    """Forty templates with a room, forty with a room and a lamp, five that say nothing, two rooms, a rare intent."""
    here = [f"do {number} in the {{area}} [now|please]" for number in range(40)]
    both = [f"{{area}} {number} <turn> the {{name}}" for number in range(40)]
    return {
        "language": "en",
        "intents": {
            "Here": {"data": [{"sentences": here}]},
            "Lamp": {"data": [{"sentences": both, "slots": {"domain": "light"}}]},
            "Stop": {"data": [{"sentences": [f"stop {number}" for number in range(5)]}]},
            "Move": {"data": [{"sentences": [f"{number} from {{area}} to {{area}}" for number in range(5)]}]},
            "Rare": {"data": [{"sentences": ["go to [the] {area}"]}]},
        },
        "lists": {},
        "expansion_rules": {"turn": "(on|off)"},
    }


DOMAINS = dict.fromkeys(("Here", "Lamp", "Stop", "Move", "Rare"), "homeassistant")


def drawn(part: str, new: bool = False) -> list[dict[str, object]]:
    return rows(marked_requests(description(), DOMAINS, LISTS, 4, part, new))


def test_words_are_divided_once_for_all_lists():
    parts = part_of_values(LISTS)
    assert "work" not in parts, "no span stands for zones"
    rooms = [parts[room] for room in ROOMS.split("|")]
    assert {part: rooms.count(part) for part in source.PARTS} == {"train": 6, "validation": 2, "test": 2}
    # "hall" has the part of the list that comes first, and counts there
    lamps = [parts[lamp] for lamp in LAMPS.split("|")]
    assert lamps.count("test") >= 1
    assert lamps.count("validation") >= 1
    few = part_of_values({"area": "a|b|c|d"})
    assert set(few.values()) == {"train"}


def test_spans_stand_where_they_are_said_to():
    found = drawn("train") + drawn("test") + drawn("test", new=True)
    assert any(row["device"] for row in found)
    for row in found:
        for slot in SLOTS:
            start, value = row[f"{slot}_start"], row[slot]
            if value:
                assert row["text"][start : start + len(value)] == value
            else:
                assert start is None
        assert row["text"].isascii(), "no mark is left"


def test_parts_share_no_template_and_new_words_are_of_one_part_alone():
    allowed = part_of_values(LISTS)
    templates = {}
    for part in source.PARTS:
        known, new = drawn(part), drawn(part, new=True)
        templates[part] = {row["template"] for row in known}
        for row in known:
            spans = [row[slot] for slot in SLOTS if row[slot]]
            assert {allowed[value] for value in spans} <= {"train"}
            assert row["words"] == ("known" if spans else "none")
        if part != "train":
            assert new
            for row in new:
                spans = [row[slot] for slot in SLOTS if row[slot]]
                assert {allowed[value] for value in spans} == {part}
                assert row["words"] == "new"
    assert len(templates["train"]) > len(templates["test"]) > len(templates["validation"]) > 0
    assert not templates["train"] & (templates["test"] | templates["validation"])
    assert not templates["test"] & templates["validation"]


def test_two_rooms_are_no_question_and_rare_intents_stay_together():
    found = [row for part in source.PARTS for row in drawn(part)]
    assert not [row for row in found if row["intent"] == "Move"]
    assert {row["template"] for row in found if row["intent"] == "Rare"} == {"Rare"}


def test_text_without_marks_stays():
    assert plain_and_spans("stop it") == ("stop it", [])


@pytest.mark.parametrize("language", list(WORDS))
def test_the_longer_lists_name_lists_that_are_filled_and_say_nothing_twice(language):
    assert set(MORE_WORDS[language]) <= set(WORDS[language])
    for name, values in joined_words(WORDS[language], MORE_WORDS[language]).items():
        assert len(set(values.split("|"))) == len(values.split("|")), name
    parts = part_of_values(joined_words(WORDS[language], MORE_WORDS[language]))
    assert min(list(parts.values()).count(part) for part in source.PARTS) > 40


def test_the_slots_source(tmp_path: Path):
    folder = "home_assistant_intents"
    files = {f"{folder}/data/{language}.json": json.dumps(description()) for language in WORDS}
    files[f"{folder}/intents.json"] = json.dumps({name: {"domain": value} for name, value in DOMAINS.items()})
    fetch = Folders(tmp_path, {"home-assistant-intents": files})
    data = load_source("slots", {"per_template": 6}, fetch)  # type: ignore[arg-type]
    texts = everything(data, "text")
    for part in (data.validation, data.test):
        assert {"known", "new"} <= set(part["words"])
        assert not set(part["template"]) & set(data.train["template"])
    assert set(data.train["words"]) <= {"known", "none"}
    new = {row["area"] for row in rows(data.test) if row["words"] == "new"}
    assert new
    assert not new & set(data.train["area"])
    assert f"{len(texts)} sentences" in data.sources[0].note
    chinese = load_source("slots", {"language": "zh-CN"}, fetch)  # type: ignore[arg-type]
    assert set(WORDS["zh-CN"]["area"].split("|")) & set(chinese.train["area"])
    with pytest.raises(ConfigError, match=r"data\.options\.language must be one of en, zh-CN; got 'de'"):
        load_source("slots", {"language": "de"}, fetch)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"data\.options\.per_template"):
        load_source("slots", {"per_template": 0}, fetch)  # type: ignore[arg-type]


@pytest.mark.network
@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("language", "sizes", "words"),
    [
        ("en", (5920, 1402, 2560), {"known": 950, "new": 929, "none": 681}),
        ("zh-CN", (4589, 939, 1914), {"known": 793, "new": 736, "none": 385}),
    ],
)
def test_the_real_requests(language, sizes, words):
    try:
        data = load_source("slots", {"language": language}, Fetcher())
    except RegistryUnavailable as error:
        pytest.skip(f"the registry cannot be reached: {error}")
    assert (len(data.train), len(data.validation), len(data.test)) == sizes
    assert Counter(data.test["words"]) == words
