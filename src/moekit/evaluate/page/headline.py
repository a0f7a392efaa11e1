"""The result in words, computed from a report; a lost comparison is said as plainly as a won one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from moekit.evaluate.charts.numbers import (
    format_change,
    format_count,
    format_number,
    format_percent,
    is_number,
)
from moekit.evaluate.page.schema import MODEL_NAMES, MODELS

_LEVEL = 0.0005  # a difference that prints as 0.0% is none
_EQUAL = 0.02  # "equal" parameters or tokens: within 2%, and the text says within how much
_SUBJECT = {"moe": "The mixture of experts", "dense": "The dense model", "transformer_xl": "Transformer-XL"}
_OBJECT = {"moe": "the mixture of experts", "dense": "its dense twin", "transformer_xl": "Transformer-XL"}


@dataclass(frozen=True)
class Headline:
    """The first lines of the page: `verdict` is one sentence, `details` are those that qualify it."""

    verdict: str
    details: tuple[str, ...]


def present(report: Mapping[str, Any]) -> list[str]:
    """The models of a report in the order in which the page shows them."""
    return [name for name in MODELS if name in report["models"]]


def relative(report: Mapping[str, Any], model: str, other: str, field: str = "mean") -> float | None:
    """Bits per byte of `model` above those of `other`, as a share; negative is better."""
    models = report["models"]
    if model not in models or other not in models:
        return None
    ours, theirs = models[model]["bits_per_byte"].get(field), models[other]["bits_per_byte"].get(field)
    return ours / theirs - 1 if is_number(ours) and is_number(theirs) and theirs > 0 else None


def are_equal(report: Mapping[str, Any], field: str) -> bool:
    """True if all models have the same `field`, such as "active_parameters", within 2%."""
    values = [report["models"][name][field] for name in present(report)]
    return min(values) > 0 and max(values) / min(values) - 1 <= _EQUAL


def make_headline(report: Mapping[str, Any]) -> Headline:
    """Who needs fewer bits per byte, by how much, after how many steps and seconds, and on what terms."""
    names = present(report)
    subject = names[0]
    verdict = _verdict(report, subject, names[1:])
    details = [
        text
        for text in (
            _speed(report) if {"moe", "dense"} <= set(names) else "",
            _lost_domains(report, subject, names[1:]),
            _terms(report, names),
        )
        if text
    ]
    return Headline(verdict, tuple(details))


def _verdict(report: Mapping[str, Any], subject: str, others: list[str]) -> str:
    compared = [(other, relative(report, subject, other)) for other in others]
    known = [(other, share) for other, share in compared if share is not None]
    if not known:
        value = report["models"][subject]["bits_per_byte"]["mean"]
        if not is_number(value):
            return f"{_SUBJECT[subject]} has no finite loss: the training diverged or was not evaluated."
        alone = f"{_SUBJECT[subject]} needs {format_number(value)} bits per byte on average"
        return f"{alone}; there is nothing to compare it with."
    sentence, previous = "", ""
    for other, share in known:
        kind = "level" if abs(share) < _LEVEL else "fewer" if share < 0 else "more"
        name = _OBJECT[other]
        if not sentence:
            if kind == "level":
                sentence = f"{_SUBJECT[subject]} is level with {name} in bits per byte"
            else:
                lost = " loses: it" if kind == "more" else ""
                amount = f"{format_percent(abs(share))} {kind} bits per byte than {name}"
                sentence = f"{_SUBJECT[subject]}{lost} needs {amount}"
        else:
            link = " and" if kind == previous else ", but"
            if kind == "level":
                sentence += f"{link} is level with {name}" if kind != previous else f"{link} with {name}"
            elif previous == "level":
                sentence += f"{link} needs {format_percent(abs(share))} {kind} than {name}"
            else:
                sentence += f"{link} {format_percent(abs(share))} {kind} than {name}"
        previous = kind
    return sentence + "."


def _speed(report: Mapping[str, Any]) -> str:
    shares = report["to_dense_loss"] or {}
    steps, seconds = shares.get("steps_share"), shares.get("seconds_share")
    if not is_number(steps) and not is_number(seconds):
        return "It does not reach the dense twin’s final loss within this run."
    parts = []
    if is_number(steps):
        parts.append(f"{format_percent(steps, 0)} of the steps")
    if is_number(seconds):
        parts.append(f"{format_percent(seconds, 0)} of the seconds")
    text = f"It reaches the dense twin’s final loss in {' and '.join(parts)} that the twin took"
    if is_number(seconds) and seconds > 1.005:
        fewer = is_number(steps) and steps < 0.995
        text += ": fewer steps, but more time" if fewer else ": more time"
    return text + "."


def _lost_domains(report: Mapping[str, Any], subject: str, others: list[str]) -> str:
    """The domains on which the subject loses although it wins on average, against each other model."""
    texts = []
    for other in others:
        mean = relative(report, subject, other)
        if mean is None or mean > -_LEVEL:
            continue
        domains = [domain for domain in report["models"][subject]["bits_per_byte"] if domain != "mean"]
        lost = [(domain, relative(report, subject, other, domain)) for domain in domains]
        worse = [
            f"{domain} ({format_change(share)})"
            for domain, share in lost
            if share is not None and share > _LEVEL
        ]
        if worse:
            texts.append(f"It is behind {_OBJECT[other]} on {', '.join(worse)}.")
    return " ".join(texts)


def _terms(report: Mapping[str, Any], names: list[str]) -> str:
    """What was held equal, by the numbers: active parameters and tokens."""
    if len(names) < 2:
        return ""
    equal, unequal = [], []
    for field, noun in (("active_parameters", "active parameters"), ("tokens", "training tokens")):
        values = {name: report["models"][name][field] for name in names}
        low, high = min(values.values()), max(values.values())
        if are_equal(report, field):
            within = "" if high == low else f", within {format_percent(high / low - 1)}"
            equal.append(f"{noun} ({format_count(high)}{within})")
        else:
            each = ", ".join(f"{MODEL_NAMES[name]} {format_count(value)}" for name, value in values.items())
            unequal.append(f"{noun} differ: {each}")
    sentences = []
    if equal:
        sentences.append(f"All models have equal {' and '.join(equal)}.")
    sentences += [f"Not equal: the {text}." for text in unequal]
    sentences.append(f"One run each, seed {report['settings']['seed']}.")
    return " ".join(sentences)
