"""The page of a news monitor: what each topic is about now, how the stream went, which experts served whom."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from moekit.evaluate.charts import Drawing, Series, draw_heat_map, draw_lines, format_percent
from moekit.evaluate.charts.theme import escape
from moekit.evaluate.page.blocks import figure, grid, section, table
from moekit.evaluate.page.document import plain_page

_SHOWN = 12  # topics on the page
_LINES = 5  # topics in the chart over the stream
_BLOCKS = 20  # stretches of the stream in the charts


def render_monitor(report: Mapping[str, Any]) -> str:
    """One HTML page that asks the network for nothing.

    Args:
        report: what `Monitor.report` gives.
    """
    shown = report["topics"][:_SHOWN]
    parts = [_topics(report, shown), _stream(report, shown), _experts(report, shown), _made(report)]
    return plain_page(
        f"News monitor: {report['texts']:,} texts",
        "moekit news monitor",
        _headline(report),
        _tiles(report),
        *parts,
    )


def _headline(report: Mapping[str, Any]) -> str:
    if not report["topics"]:
        return "No text has been read"
    first = report["topics"][0]
    return (
        f"{report['texts']:,} texts in {len(report['topics'])} topics; now mostly {first['topic']}: "
        f"{', '.join(first['terms'][:4])}"
    )


def _tiles(report: Mapping[str, Any]) -> str:
    taken = report["milliseconds"]
    found = [(f"{report['texts']:,}", "texts read, one by one")]
    if report["accuracy"] is not None:
        found.append((format_percent(report["accuracy"], 1), "of them under the topic that editors gave"))
    if taken:
        found.append((f"{taken['median']:.1f} ms", "median time of a text: encoding, model, summary"))
        found.append((f"{taken['p95']:.1f} ms", "95th percentile of it"))
    items = "".join(f"<div><dd>{escape(value)}</dd><dt>{escape(name)}</dt></div>" for value, name in found)
    return f'<dl class="tiles">{items}</dl>'


def _topics(report: Mapping[str, Any], shown: Sequence[Mapping[str, Any]]) -> str:
    rows = []
    for one in shown:
        latest = "<br>".join(escape(item["text"]) for item in one["latest"])
        rows.append([
            escape(one["topic"]), f"{one['texts']:,}", format_percent(one["recent_share"], 0), f"{one['tone']:+.2f}",
            escape(", ".join(one["terms"])), escape(one["central"]["text"]), latest,
        ])  # fmt: skip
    more = len(report["topics"]) - len(shown)
    intro = (
        "The largest topics first, by their share of the recent stream. The texts have no sentences to quote, so a "
        "topic is told by the terms that set it apart, by the recent text nearest to its mean, and by the latest texts."
        + (f" {more} smaller topics are in the JSON file alone." if more else "")
    )
    head = ["topic", "texts", "of recent", "tone", "terms", "most central recent text", "latest"]
    return section("topics", "Topics now", intro, table(head, rows))


def _stream(report: Mapping[str, Any], shown: Sequence[Mapping[str, Any]]) -> str:
    history = report["history"]
    if len(history) < 2 * _BLOCKS:
        return ""
    bounds = [round(i * len(history) / _BLOCKS) for i in range(_BLOCKS + 1)]
    blocks = [history[low:high] for low, high in pairwise(bounds)]
    x = [float(high) for high in bounds[1:]]
    largest = [name for name, _ in Counter(name for name, _ in history).most_common(_LINES)]
    shares = [
        Series(name, x, [sum(topic == name for topic, _ in block) / len(block) for block in blocks])
        for name in largest
    ]
    tones = [Series("all texts", x, [sum(tone for _, tone in block) / len(block) for block in blocks])]

    def topics(width: float) -> Drawing:
        return draw_lines(
            shares, title="Share of the topics over the stream", heading="Topics over the stream", width=width,
            x_label="texts read", y_format=lambda value: format_percent(value, 0), y_limits=(0.0, None),
        )  # fmt: skip

    def tone(width: float) -> Drawing:
        return draw_lines(
            tones, title="Mean tone over the stream", heading="Mean tone over the stream", width=width,
            x_label="texts read", labels="none",
        )  # fmt: skip

    intro = f"Each point is the mean of one of {_BLOCKS} stretches of the stream. Tone goes from -1 to 1."
    return section("stream", "The stream", intro, grid([figure(topics), figure(tone)]))


def _experts(report: Mapping[str, Any], shown: Sequence[Mapping[str, Any]]) -> str:
    served = [one for one in shown if one["experts"]]
    if not served or not report["experts"]:
        return ""

    def draw(width: float) -> Drawing:
        return draw_heat_map(
            [one["experts"] for one in served], [one["topic"] for one in served], report["experts"],
            title="Share of each expert by topic", width=width, row_tip="topic", column_tip="expert",
            value_format=lambda value: format_percent(value, 0), key_label="of the mixture",
        )  # fmt: skip

    intro = (
        "How much each expert counts in the mixture that the topic is answered from: experts that both tasks share, "
        "and the topic's own."
    )
    return section("experts", "Experts by topic", intro, figure(draw, wide=760))


def _made(report: Mapping[str, Any]) -> str:
    intro = (
        f"Run {escape(report['run'])}. A text counts half when {report['half_life']:g} more have been read. The tone "
        f"is {escape(report['tone_is'])}: read it as a hint. Times are those of one text at a time on the machine that "
        "wrote this page. Every number stands in the JSON file beside it."
    )
    return section("made", "How this was made", intro)
