"""The recipe `slots`: the share of spans that are found, and a conditional random field of the same spans."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from moekit.config.errors import ConfigError
from moekit.config.task import AnyTarget, SpanTarget, TagsTarget, TextInput
from moekit.config.task_run import TaskRunConfig
from moekit.data.examples import Examples, TaskData
from moekit.evaluate.baselines.base import fit_baseline
from moekit.evaluate.baselines.words import split_words
from moekit.evaluate.task import predict
from moekit.evaluate.task_metrics import score
from moekit.recipes.tasks import Recipe
from moekit.train.run import LoadedTask

BASELINE = "crf of spans"


def measure(loaded: LoadedTask, data: TaskData) -> dict[str, float]:
    """What `found_shares` says of the test."""
    said = predict(loaded.model, loaded.encoding, data.test).raw
    return found_shares(said, loaded.config.targets, data.test)


def found_shares(
    said: Mapping[str, Sequence[Any]], targets: Mapping[str, AnyTarget], examples: Examples
) -> dict[str, float]:
    """Of all targets together, the share of spans that are found whole: of words that training has, and of new ones.

    Args:
        said: by target, an answer to each example.
        targets: by name.
        examples: with the column `words`, see the source `slots`; without it all spans are counted together.
    """
    kinds = examples.columns.get("words", [""] * len(examples))
    right: dict[str, list[float]] = {}
    for name, answers in said.items():
        target = targets[name]
        assert isinstance(target, SpanTarget)
        for one, other, kind in zip(answers, examples[target.column or ""], kinds, strict=True):
            if other:
                right.setdefault(kind, []).append(score("exact_match", [one], [other]))
    return {f"spans found of {kind} words" if kind else "spans found": float(np.mean(right[kind]))
            for kind in sorted(right)}  # fmt: skip


def baseline(name: str, recipe: Recipe, config: TaskRunConfig, data: TaskData) -> dict[str, Any]:
    """A conditional random field over words (characters in Chinese) that tags each target's span by itself."""
    if name != BASELINE:
        raise ConfigError(f"recipe {recipe.name} names a baseline {name!r} that nobody registers")
    read = next(part for part in config.inputs.values() if isinstance(part, TextInput))
    began, scores, settings, answers = time.perf_counter(), {}, {}, {}
    for target, wanted in config.targets.items():
        assert isinstance(wanted, SpanTarget)
        parts = [tagged(part, read, wanted) for part in (data.train, data.validation, data.test)]
        tags = {target: TagsTarget(column="tags", input="words")}
        fitted = fit_baseline("crf", parts[0], parts[1], {"words": TextInput(column="words")}, tags)
        found = fitted.predict(parts[2])[target].values
        said = answers[target] = [
            span_of(text, words, tag)
            for text, words, tag in zip(data.test[read.column], parts[2]["words"], found, strict=True)
        ]
        for measured in recipe.measures:
            if measured.target == target:
                scores[measured.key] = score(measured.metric, said, data.test[wanted.column or ""])
        settings[target] = fitted.settings[target]
    scores |= found_shares(answers, config.targets, data.test)
    return {"scores": scores, "seconds": time.perf_counter() - began, "settings": settings}


def tagged(examples: Examples, read: TextInput, target: SpanTarget) -> Examples:
    """Words of the texts, and B, I or O of each by the target's span."""
    columns: Mapping[str, list[Any]] = {"words": [], "tags": []}
    for row, text in enumerate(examples[read.column]):
        answer = examples[target.column or ""][row]
        start = examples[target.start or ""][row] if answer else -1
        places = words_in(text)
        inside = [start <= begin < start + len(answer) for begin, _ in places]
        first = inside.index(True) if any(inside) else -1
        columns["words"].append([text[begin:end] for begin, end in places])
        columns["tags"].append(
            ["B-X" if place == first else "I-X" if here else "O" for place, here in enumerate(inside)]
        )
    return Examples(columns)


def words_in(text: str) -> list[tuple[int, int]]:
    """Where each word starts and ends; a Chinese character is a word, and so is each run of signs.

    >>> words_in("set it: 5°"), words_in("开灯")
    ([(0, 3), (4, 6), (6, 7), (8, 9), (9, 10)], [(0, 1), (1, 2)])
    """
    found, end = [], 0
    for word in split_words(text):
        begin = text.lower().index(word, end)
        found += _signs(text, end, begin)
        end = begin + len(word)
        found.append((begin, end))
    return found + _signs(text, end, len(text))


def _signs(text: str, begin: int, end: int) -> list[tuple[int, int]]:
    between = text[begin:end]
    kept = between.strip()
    start = begin + len(between) - len(between.lstrip())
    return [(start, start + len(kept))] if kept else []


def span_of(text: str, words: Sequence[str], tags: Sequence[str]) -> str:
    """The text of the first span that the tags say, empty where they say none.

    >>> span_of("in the living room now", ["in", "the", "living", "room", "now"], ["O", "O", "B-X", "I-X", "O"])
    'living room'
    """
    places = words_in(text)
    inside = [place for place, tag in enumerate(tags) if tag != "O"]
    if not inside:
        return ""
    first = last = inside[0]
    while last + 1 < len(words) and tags[last + 1] == "I-X":
        last += 1
    return text[places[first][0] : places[last][1]]
