"""The part of the page on experts that were switched off."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moekit.evaluate.charts.numbers import format_number
from moekit.evaluate.charts.theme import escape
from moekit.explain.page.blocks import Cell, figure, number_cell, share_cell, sortable
from moekit.explain.rulings import CONTRARY, SUPPORTED

WAYS = {"nothing": "nothing", "next": "the next best", "share": "their share given away"}
SHOWN_EXPERTS = 8


def ablation(report: Mapping[str, Any]) -> str:
    """Words, figures and table on the verdicts of a report."""
    return "".join((
        "<p>The experts that a group asks for more than the others do were switched off together: the fewest that hold "
        "half of that lead. Once nothing stands in their place, once each token’s next best expert takes over. The "
        "difference is the rise of the group’s loss less the mean rise of the other groups’. <b>Supported</b>: it "
        "lies above 0 beyond its interval over texts, and at most 5% of as many random experts with the nearest load "
        "make as much of it. <b>Contrary</b>: below 0, likewise. That a group is supported with nothing in their "
        "place, and not with the next best, means that others can do their work.</p>",
        figure(
            "ablation",
            "Dot and line: difference with its 95% interval over texts. Grey: from the least to the most that random "
            "experts make of it.",
        ),
        figure("curve", "The most particular 1, 2, 4 and 8 experts of each group switched off together."),
        sortable("Experts switched off", _HEAD, [_row(report, one) for one in report["causes"]]),
    ))  # fmt: skip


_HEAD = (
    "layer", "group", "experts", "their share there", "elsewhere", "in their place", "loss there", "loss elsewhere",
    "difference", "95% interval", "random experts", "verdict",
)  # fmt: skip


def _row(report: Mapping[str, Any], one: Mapping[str, Any]) -> tuple[Cell, ...]:
    labels = report["layers"][one["layer"]]["labels"]
    names = ", ".join(labels[expert] for expert in one["experts"][:SHOWN_EXPERTS])
    if len(one["experts"]) > SHOWN_EXPERTS:
        names += f" and {len(one['experts']) - SHOWN_EXPERTS} more"
    null = one["null"]
    return (
        str(one["layer"]), escape(report["groups"][one["group"]]), escape(names),
        share_cell(one["share"], 0), share_cell(one["elsewhere"], 0), WAYS[one["instead"]],
        number_cell(one["own"], 4), number_cell(one["others"], 4), number_cell(one["value"], 4),
        f"{format_number(one['low'], 4)} to {format_number(one['high'], 4)}",
        f"{format_number(min(null), 4)} to {format_number(max(null), 4)}" if null else "none",
        ruling_mark(one["ruling"]),
    )  # fmt: skip


def ruling_mark(ruling: str) -> str:
    """A ruling with a sign before it, since a colour is not seen by all.

    >>> ruling_mark("supported")
    '<span class="held">✓ supported</span>'
    """
    if ruling == SUPPORTED:
        return f'<span class="held">✓ {ruling}</span>'
    sign = "✗" if ruling == CONTRARY else "⚠"
    return f'<span class="missed">{sign} {ruling}</span>'


def headline(report: Mapping[str, Any]) -> tuple[str, str] | None:
    """For the top of the page: how many groups miss the experts that they ask for; None where none was tested."""
    tested = [one for one in report["causes"] or () if one["instead"] == report["causes"][0]["instead"]]
    if not tested:
        return None
    held = sum(one["ruling"] == SUPPORTED for one in tested)
    return f"{held} of {len(tested)}", "groups’ own experts that ablation supports"
