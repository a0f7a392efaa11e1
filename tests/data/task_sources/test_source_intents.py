"""Sentence templates and what is drawn from them; intents of a smart home."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from text_source_samples import Folders, check_own_split, everything, rows

from moekit.config.errors import ConfigError, DataError
from moekit.data.task_sources.base import load_source
from moekit.data.task_sources.intents import WORDS, requests
from moekit.data.task_sources.templates import Draw, parse_template, sample_sentences


def every(template: str, rules: dict[str, str] | None = None, **lists: str) -> set[str]:
    """All that a small template says: far more draws than it has sentences."""

    def value(words: str) -> Callable[[Draw], str]:
        return lambda draw: words

    return set(
        sample_sentences(template, 100, {name: value(words) for name, words in lists.items()}, rules or {})
    )


@pytest.mark.parametrize(
    ("template", "sentences"),
    [
        ("stop", {"stop"}),
        ("turn (on|off)", {"turn on", "turn off"}),
        ("turn [the] fan[s]", {"turn fan", "turn the fan", "turn fans", "turn the fans"}),
        ("[a|b] c", {"c", "a c", "b c"}),
        ("a|b", {"a", "b"}),
        ("(now;[please] go)", {"now go", "go now", "now please go", "please go now"}),
        ("(a;b;c)", {"a b c", "a c b", "b a c", "b c a", "c a b", "c b a"}),
        ("in [the [big|small]] room", {"in room", "in the room", "in the big room", "in the small room"}),
        ("第[一|二]层", {"第层", "第一层", "第二层"}),
        ("5([ ]%)", {"5%", "5 %"}),
        ("[the] first floor [floor]", {"the first floor", "first floor"}),
    ],
)
def test_templates(template: str, sentences: set[str]) -> None:
    assert every(template) == sentences


def test_lists_and_rules_are_templates_too() -> None:
    rules = {"turn": "(turn|switch) [<how>]", "how": "it"}
    assert every("<turn> {state:x}", rules, state="(on|off)") == {
        f"{verb}{it} {state}" for verb in ("turn", "switch") for it in ("", " it") for state in ("on", "off")
    }


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("(a", "does not close a bracket"),
        ("a)", "closes a bracket that it does not open"),
        ("(a]", "does not close a bracket"),
        ("a {b", "without its other half"),
        ("(a|b;c)", r"has \| and ;"),
    ],
)
def test_brackets_must_match(template: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        parse_template(template)


def test_unknown_names_and_rules_within_themselves() -> None:
    with pytest.raises(DataError, match=r"the list 'area' is not there"):
        every("{area}")
    with pytest.raises(DataError, match=r"the rule 'the' is not there"):
        every("<the>")
    with pytest.raises(DataError, match=r"the rule 'a' holds itself"):
        every("<a>", {"a": "<a> b"})


FIRST = ["set 428 to 767", "set 236 to 524", "set 385 to 113", "set 263 to 743", "set 930 to 326"]


def test_what_is_drawn_depends_on_the_template_alone() -> None:
    def number(draw: Draw) -> str:
        return str(draw(1000))

    first = sample_sentences("set {n} to {n}", 5, {"n": number}, {})
    assert len(set(first)) == 5
    assert sample_sentences("set {n} to {n}", 5, {"n": number}, {}) == first
    assert sample_sentences("set {n} to {n}", 3, {"n": number}, {}) == first[:3]
    # fixed for good: another order of draws or another hash would move every split and figure
    assert first == FIRST


def description() -> dict[str, object]:
    def block(*sentences: str, **more: object) -> dict[str, object]:
        return {"sentences": list(sentences), "metadata": {}, **more}

    return {
        "language": "en",
        "intents": {
            "On": {
                "data": [
                    block("<turn> on {name}", "{name} on", "start {name}", slots={"domain": "light"}),
                    block(
                        "<turn> on {area} {n:level}", "{area} {n} on", requires_context={"domain": ["fan"]}
                    ),
                ]
            },
            "Lock": {"data": [block("lock {name} now", requires_context={"domain": "lock"})]},
            "Hello": {"data": [block("(hello|hi)[ there]")]},
        },
        "lists": {
            "n": {"range": {"from": 10, "to": 100, "step": 10}},
            "state": {"values": [{"in": "(open|ajar)", "out": "on"}]},
            "message": {"wildcard": True},
        },
        "expansion_rules": {"turn": "(turn|switch)"},
    }


DOMAINS = {"On": "homeassistant", "Lock": "lock", "Hello": "homeassistant"}


def test_names_are_those_of_the_device() -> None:
    examples = requests(description(), DOMAINS, WORDS["en"], 30)
    found = rows(examples)
    lamps = WORDS["en"]["name light"].split("|")
    for row in found:
        if row["template"] in ("On/0", "On/1", "On/2"):
            assert any(lamp in row["text"] for lamp in lamps), row
        if row["label"] == "Lock":
            assert any(name in row["text"] for name in WORDS["en"]["name lock"].split("|")), row
    levels = {int(text.split()[-2]) for text in examples["text"] if text.endswith("0 on")}
    assert levels <= set(range(10, 101, 10))
    assert levels


def test_templates_of_frequent_intents_are_groups_and_rare_ones_are_not() -> None:
    examples = requests(description(), DOMAINS, WORDS["en"], 30)
    groups = {row["template"] for row in rows(examples) if row["label"] == "On"}
    assert groups == {f"On/{i}" for i in range(5)}
    hello = {row["template"] for row in rows(examples) if row["label"] == "Hello"}
    assert hello == {"Hello: hello", "Hello: hello there", "Hello: hi", "Hello: hi there"}


def test_an_open_list_without_words_is_refused() -> None:
    with pytest.raises(DataError, match=r"the list 'message' is open"):
        requests(description(), DOMAINS, {"name": "x"}, 3)


def test_the_source(tmp_path: Path) -> None:
    folder = "home_assistant_intents"
    files = {f"{folder}/data/{language}.json": json.dumps(description()) for language in WORDS}
    files[f"{folder}/intents.json"] = json.dumps(
        {name: {"domain": domain} for name, domain in DOMAINS.items()}
    )
    fetch = Folders(tmp_path, {"home-assistant-intents": files})
    data = load_source("intents", {}, fetch)  # type: ignore[arg-type]
    check_own_split(data, "template")
    assert set(everything(data, "label")) == {"On", "Lock", "Hello"}
    assert len(set(everything(data, "text"))) == len(everything(data, "text"))
    fewer = load_source("intents", {"per_template": 4, "language": "zh-CN"}, fetch)  # type: ignore[arg-type]
    assert len(everything(fewer, "text")) == 4 * 7
    with pytest.raises(ConfigError, match=r"data\.options\.language must be one of en, zh-CN; got 'de'"):
        load_source("intents", {"language": "de"}, fetch)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"data\.options\.per_template"):
        load_source("intents", {"per_template": 0}, fetch)  # type: ignore[arg-type]
