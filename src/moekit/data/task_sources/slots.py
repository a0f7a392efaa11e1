"""Requests to a smart home with the words that say where, which device and what: spans in the templates' own labels.

The templates of `intents` have places for rooms, names of devices and free text; what is filled in there is the answer,
so nobody had to label anything, and nothing about it is an opinion. Lists of words are learnt by heart easily, so the
test asks for two things: places of known words in templates that training never saw, and places of words that it never
saw either. The latter cannot all be found: where a template takes a room or a device alike (as "X 的亮度" does, the
brightness of X), only what X means tells which one it is.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from typing import Literal

from moekit.config.errors import require
from moekit.data.examples import Examples, TaskData
from moekit.data.task_sources.base import Fetcher, register_source
from moekit.data.task_sources.intents import INTENTS, WORDS, requests
from moekit.data.task_sources.own_split import info_of, without_doubles
from moekit.data.task_sources.slot_words import MORE_WORDS

# the lists whose values each span stands for; "name" are those of all kinds of devices
SLOTS = {
    "area": ("area",),
    "device": ("name",),
    "content": (
        "message",
        "search_query",
        "timer_name",
        "timer_command",
        "shopping_list_item",
        "todo_list_item",
    ),
}
PARTS = ("train", "validation", "test")
# marks around a value while sentences are drawn: characters that no text has
_OPEN = {slot: chr(0xE000 + number) for number, slot in enumerate(SLOTS)}
_CLOSE = "\ue00f"
_MARKED = re.compile(f"([{''.join(_OPEN.values())}])([^{_CLOSE}]*){_CLOSE}")


@register_source(
    "slots",
    "about 9,900 requests to a smart home (Chinese 7,400) with the words that name the room, the device and free text",
    columns={
        "text": "the request",
        "area": "the words that name a room; empty where there is none",
        "device": "the words that name a device; empty where there is none",
        "content": "what is said, searched, listed or named a timer by; empty where there is none",
        "area_start": "where they start in the request, in characters; None where there are none",
        "device_start": "the same of the device",
        "content_start": "the same of free text",
        "words": "known where training has the words of its spans, new where it has none of them, none without spans",
        "intent": "the intent",
        "template": "the template, as intent/number; of rare ones, the intent",
    },
    licence="Apache-2.0",
)
def slots(fetch: Fetcher, language: Literal["en", "zh-CN"] = "en", per_template: int = 10) -> TaskData:
    """Requests with spans. No template stands in two parts. Of the test's templates, and of those for validation, half
    the requests are about rooms, devices and phrases of training, half about ones that no other part has.

    Args:
        language: "en" or "zh-CN".
        per_template: how many sentences are drawn of each template, at most; in the test of known and of new words.
    """
    require(language in WORDS, "data.options.language", language, f"must be one of {', '.join(WORDS)}")
    require(1 <= per_template <= 1000, "data.options.per_template", per_template, "must be 1 to 1000")
    package = fetch(INTENTS)
    known = json.loads(package.read_text("home_assistant_intents/intents.json"))
    described = json.loads(package.read_text(f"home_assistant_intents/data/{language}.json"))
    domains = {intent: str(entry.get("domain", "homeassistant")) for intent, entry in known.items()}
    words = joined_words(WORDS[language], MORE_WORDS[language])
    parts, left_out = [], []
    for part in PARTS:
        drawn = marked_requests(described, domains, words, per_template, part)
        if part != "train":
            new = marked_requests(described, domains, words, per_template, part, new=True)
            drawn = Examples({name: [*values, *new[name]] for name, values in drawn.columns.items()})
        found, without = without_doubles(drawn, label=None)
        parts.append(found)
        left_out.append(f"{part}: {without.removeprefix('left out: ')}")
    note = (
        f"{sum(map(len, parts))} sentences, at most {per_template} of a template and kind of words, lists of words "
        f"filled in; templates are split, so that none stands in two parts, and so are the words of half the requests "
        f"that are not trained on; left out: {'; '.join(left_out)}"
    )
    origin = f"PyPI; sentence templates of Home Assistant, {language}"
    train, validation, test = parts
    return TaskData(train, validation, test, [info_of(INTENTS, origin, "Apache-2.0", note)])


def marked_requests(
    described: Mapping[str, object],
    domains: Mapping[str, str],
    words: Mapping[str, str],
    per_template: int,
    part: str,
    new: bool = False,
) -> Examples:
    """The sentences of one part with their spans; arguments as `moekit.data.task_sources.intents.requests` has them.

    `new` fills in the words that this part alone has, and leaves out what has no span; otherwise words of training.
    """
    allowed, whose = part_of_values(words), part if new else "train"
    own = dict(words)
    for name, values in words.items():
        slot = _slot(name)
        if slot is not None:
            kept = [value for value in values.split("|") if allowed[value] == whose]
            own[name] = "|".join(f"{_OPEN[slot]}{value}{_CLOSE}" for value in kept)
    drawn = requests(described, domains, own, per_template)
    columns: dict[str, list[object]] = {"text": [], "words": [], "intent": [], "template": []}
    for slot in SLOTS:
        columns |= {slot: [], f"{slot}_start": []}
    for marked, intent, template in zip(drawn["text"], drawn["label"], drawn["template"], strict=True):
        # rare intents split by sentence in `intents`; their template is the intent here, so that none is in two parts
        key = template if "/" in template else intent
        if _share(key) != part:
            continue
        text, spans = plain_and_spans(marked)
        if len({slot for slot, _, _ in spans}) < len(spans):
            continue  # two rooms: nothing says which one is asked for
        if new and not spans:
            continue
        columns["text"].append(text)
        columns["words"].append("new" if new else "known" if spans else "none")
        columns["intent"].append(intent)
        columns["template"].append(key)
        by_slot = {slot: (start, value) for slot, start, value in spans}
        for slot in SLOTS:
            start, value = by_slot.get(slot, (None, ""))
            columns[slot].append(value)
            columns[f"{slot}_start"].append(start)
    return Examples(columns)


def joined_words(*lists: Mapping[str, str]) -> dict[str, str]:
    """Lists of the same names one behind the other.

    >>> joined_words({"area": "hall|attic", "zone": "work"}, {"area": "den"})
    {'area': 'hall|attic|den', 'zone': 'work'}
    """
    names = dict.fromkeys(name for words in lists for name in words)
    return {name: "|".join(words[name] for words in lists if name in words) for name in names}


def part_of_values(words: Mapping[str, str]) -> dict[str, str]:
    """For each value of the lists that spans stand for, the part that may use it, whichever list it stands in.

    A fifth of a list is for the test, a fifth for validation; of fewer than five values all are for training, and other
    parts fill in names of any device instead.

    >>> found = part_of_values({"area": "a|b|c|d|e|f", "name fan": "x|a"})
    >>> sorted(found.values()), found["x"]
    (['test', 'train', 'train', 'train', 'train', 'train', 'validation'], 'train')
    """
    found: dict[str, str] = {}
    for name in sorted(words):
        if _slot(name) is None:
            continue
        values = sorted(words[name].split("|"), key=lambda value: hashlib.sha256(value.encode()).hexdigest())
        for part in ("test", "validation"):
            missing = len(values) // 5 - sum(found.get(value) == part for value in values)
            free = [value for value in values if value not in found]
            found |= dict.fromkeys(free[: max(0, missing)], part)
        for value in values:
            found.setdefault(value, "train")
    return found


def _slot(name: str) -> str | None:
    """The span that a list's values stand for; `name` is followed by a kind of device there."""
    return next((slot for slot, lists in SLOTS.items() if name.split(" ")[0] in lists), None)


def plain_and_spans(marked: str) -> tuple[str, list[tuple[str, int, str]]]:
    """The text without marks, and slot, start and value of each span.

    >>> plain_and_spans(f"light in the {_OPEN['area']}hall{_CLOSE} on")
    ('light in the hall on', [('area', 13, 'hall')])
    """
    slots_of = {mark: slot for slot, mark in _OPEN.items()}
    text, spans, end = "", [], 0
    for match in _MARKED.finditer(marked):
        text += marked[end : match.start()]
        spans.append((slots_of[match[1]], len(text), match[2]))
        text += match[2]
        end = match.end()
    return text + marked[end:], spans


def _share(template: str) -> str:
    """The part that a template belongs to: a fifth of them for the test, a tenth for validation."""
    number = int.from_bytes(hashlib.sha256(template.encode()).digest()[:4], "big") % 10
    return "test" if number < 2 else "validation" if number == 2 else "train"
