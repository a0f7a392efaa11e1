"""Bars, always from zero: grouped upright bars and grouped horizontal bars."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from moekit.evaluate.charts.annotations import Reference
from moekit.evaluate.charts.canvas import HEADING_SIZE, SMALL_SIZE, TEXT_SIZE, Drawing
from moekit.evaluate.charts.numbers import is_number
from moekit.evaluate.charts.scale import Format, Scale, make_scale, tick_format, ticks
from moekit.evaluate.charts.theme import SERIES, shorten, text_width

_WIDEST_BAR = 46.0


@dataclass(frozen=True)
class Bars:
    """One value per group; None and NaN leave the place empty, with a dash."""

    name: str
    values: Sequence[float | None]
    colour: str | None = None


def bar_chart(
    groups: Sequence[str], bars: Sequence[Bars], *, title: str, standalone: bool = False, **options: object
) -> str:
    """Grouped upright bars as SVG; `options` are those of `draw_bars`."""
    return draw_bars(groups, bars, title=title, **options).to_svg(standalone=standalone)  # type: ignore[arg-type]


def horizontal_bars(
    groups: Sequence[str], bars: Sequence[Bars], *, title: str, standalone: bool = False, **options: object
) -> str:
    """Grouped horizontal bars as SVG; `options` are those of `draw_horizontal_bars`."""
    drawing = draw_horizontal_bars(groups, bars, title=title, **options)  # type: ignore[arg-type]
    return drawing.to_svg(standalone=standalone)


def draw_bars(
    groups: Sequence[str],
    bars: Sequence[Bars],
    *,
    title: str,
    description: str = "",
    heading: str | None = None,
    subheading: str | None = None,
    x_label: str = "",
    y_label: str = "",
    width: float = 540,
    height: float = 280,
    y_max: float | None = None,
    y_format: Format | None = None,
    value_format: Format | None = None,
    reference: Reference | None = None,
    show_values: bool = True,
    legend: bool = True,
) -> Drawing:
    """Draw one bundle of upright bars per group.

    Args:
        groups: names under the bundles; each of `bars` has as many values.
        y_max: upper end of the axis, so that several charts share one.
        reference: a line across all bars, such as the even share.
        show_values: write each value above its bar where the bars are wide enough.
    """
    drawing = Drawing(width, height)
    drawing.title, drawing.description = title, description
    top = _head(drawing, bars, heading, subheading, y_label, legend and len(bars) > 1, width)
    bottom = height - (38 if x_label else 22)
    values = [value for part in bars for value in part.values if is_number(value)]
    values += [0.0] + ([reference.y] if reference else [])
    highest = y_max if y_max is not None else max(values)
    limits = (0.0 if min(values) >= 0 else None, None)  # room for the values under negative bars
    y_axis = make_scale(
        [*values, highest], bottom, top, limits=limits, padding=0.06 if min(values) >= 0 else 0.12
    )
    y_ticks = ticks(y_axis, max(2, round((bottom - top) / 48)))
    y_text = [(value, (y_format or tick_format(y_ticks))(value)) for value in y_ticks]
    write = value_format or tick_format(values)
    left = max((text_width(text, SMALL_SIZE) for _, text in y_text), default=0.0) + 8
    for value, text in y_text:
        drawing.line(left, y_axis.at(value), width, y_axis.at(value))
        drawing.text(left - 8, y_axis.at(value) + 4, text, fill="muted", anchor="end")

    slot = (width - left) / max(1, len(groups))
    gap = min(slot * 0.2, 36) if len(bars) > 1 else slot * 0.24
    size = min((slot - gap) / max(1, len(bars)), _WIDEST_BAR)
    gap = slot - size * max(1, len(bars))
    thin = min(size * 0.12, 2.0) if len(bars) > 1 else 0.0
    fits = show_values and all(text_width(write(v), SMALL_SIZE) <= size - 2 for v in values)
    for place, group in enumerate(groups):
        for index, part in enumerate(bars):
            x = left + place * slot + gap / 2 + index * size
            tip = ", ".join(name for name in (part.name, group) if name)
            _upright(drawing, part, index, place, x, size - thin, y_axis, write, fits, tip)
    _group_labels(drawing, groups, left, slot, bottom)
    drawing.line(left, y_axis.at(0), width, y_axis.at(0), stroke="axis")
    if reference:
        y = y_axis.at(reference.y)
        drawing.line(left, y, width, y, stroke="ink", dash="4 3", thickness=1.2)
        if reference.label:
            drawing.text(width, y - 5, reference.label, anchor="end", halo=True)
    if x_label:
        drawing.text(
            (left + width) / 2,
            bottom + 34,
            shorten(x_label, SMALL_SIZE, width),
            fill="muted",
            anchor="middle",
        )
    return drawing


def draw_horizontal_bars(
    groups: Sequence[str],
    bars: Sequence[Bars],
    *,
    title: str,
    description: str = "",
    heading: str | None = None,
    subheading: str | None = None,
    x_label: str = "",
    width: float = 540,
    bar_height: float = 15,
    value_format: Format | None = None,
    legend: bool = True,
) -> Drawing:
    """Draw one bundle of horizontal bars per group; negative values go left of the zero line.

    The height follows from the number of bars. Group names stand at the left, cut with an ellipsis past a
    third of the width; the full name shows on hover.
    """
    values = [value for part in bars for value in part.values if is_number(value)]
    write = value_format or tick_format(values or [0.0, 1.0])
    slot = bar_height * max(1, len(bars)) + 14
    drawing = Drawing(width, 0)
    drawing.title, drawing.description = title, description
    top = _head(drawing, bars, heading, subheading, x_label, legend and len(bars) > 1, width)
    drawing.height = top + slot * len(groups) + 2
    names = [shorten(group, TEXT_SIZE, width / 3) for group in groups]
    left = max((text_width(name, TEXT_SIZE) for name in names), default=0.0) + 12
    room = max((text_width(write(value), SMALL_SIZE) for value in values), default=0.0) + 8
    low, high = min([0.0, *values]), max([0.0, *values])
    start = left + (room if low < 0 else 0)
    x_axis = Scale(
        low, high if high > low else low + 1.0, start, width - (room if high > 0 or low == 0 else 4)
    )
    zero = x_axis.at(0)
    for place, (group, name) in enumerate(zip(groups, names, strict=True)):
        first = top + place * slot + 7
        middle = first + bar_height * len(bars) / 2
        drawing.text(
            left - 12, middle + 4, name, size=TEXT_SIZE, anchor="end", tip=group if name != group else None
        )
        for index, part in enumerate(bars):
            y, value = first + index * bar_height, part.values[place]
            tip = ", ".join(text for text in (part.name, group) if text)
            if not is_number(value):
                drawing.text(zero + 5, y + bar_height / 2 + 4, "–", fill="muted", tip=f"{tip}: no value")
                continue
            x = x_axis.at(value)
            drawing.add(
                "rect", fill=part.colour or SERIES[index % len(SERIES)], x=min(x, zero), y=y + 0.75,
                width=max(abs(x - zero), 1), height=bar_height - 1.5, rx=1.5, css_class="bar",
                tip=f"{tip}: {write(value)}",
            )  # fmt: skip
            anchor, offset = ("end", -5.0) if value < 0 else ("start", 5.0)
            drawing.text(x + offset, y + bar_height / 2 + 4, write(value), anchor=anchor)
    drawing.line(zero, top, zero, drawing.height, stroke="axis")
    return drawing


def _head(
    drawing: Drawing,
    bars: Sequence[Bars],
    heading: str | None,
    subheading: str | None,
    label: str,
    legend: bool,
    width: float,
) -> float:
    """Heading, legend and axis label from the top down; returns where the plot begins."""
    top = 0.0
    if heading:
        drawing.text(0, 13, shorten(heading, HEADING_SIZE, width), size=HEADING_SIZE, weight="600")
        if subheading:
            drawing.text(width, 13, subheading, fill="muted", anchor="end")
        top = 22
    if legend:
        x, row = 0.0, 0
        for index, part in enumerate(bars):
            name = shorten(part.name, TEXT_SIZE, width - 20)
            needed = 17 + text_width(name, TEXT_SIZE) + 18
            if x > 0 and x + needed - 18 > width:
                x, row = 0.0, row + 1
            y = top + 19 * row
            colour = part.colour or SERIES[index % len(SERIES)]
            drawing.add("rect", fill=colour, x=x, y=y + 4, width=11, height=11, rx=2)
            drawing.text(x + 17, y + 13, name, size=TEXT_SIZE)
            x += needed
        top += 19.0 * (row + 1) + 5
    if label:
        drawing.text(0, top + 11, shorten(label, SMALL_SIZE, width), fill="muted")
        top += 16
    return top + 7


def _upright(
    drawing: Drawing,
    part: Bars,
    index: int,
    place: int,
    x: float,
    size: float,
    y_axis: Scale,
    write: Format,
    fits: bool,
    tip: str,
) -> None:
    value, zero = part.values[place], y_axis.at(0)
    if not is_number(value):
        drawing.text(x + size / 2, zero - 5, "–", fill="muted", anchor="middle", tip=f"{tip}: no value")
        return
    y = y_axis.at(value)
    drawing.add(
        "rect", fill=part.colour or SERIES[index % len(SERIES)], x=x, y=min(y, zero), width=max(size, 0.5),
        height=max(abs(zero - y), 0.75), rx=min(1.5, size / 4), css_class="bar", tip=f"{tip}: {write(value)}",
    )  # fmt: skip
    if fits:
        drawing.text(x + size / 2, y - 4 if value >= 0 else y + 12, write(value), anchor="middle")


def _group_labels(drawing: Drawing, groups: Sequence[str], left: float, slot: float, bottom: float) -> None:
    """Names under the groups: all where they fit, every n-th of short ones, cut where they are long."""
    widest = max((text_width(group, SMALL_SIZE) for group in groups), default=0.0)
    every = 1
    if widest + 4 > slot and widest < 30:
        every = next(
            n for n in (2, 4, 5, 8, 10, 16, 20, 32, 50, 64, 100, 1000) if widest + 4 <= slot * n or n == 1000
        )
    for place in range(0, len(groups), every):
        name = shorten(groups[place], SMALL_SIZE, max(slot * every - 3, 12))
        tip = groups[place] if name != groups[place] else None
        drawing.text(left + (place + 0.5) * slot, bottom + 15, name, fill="muted", anchor="middle", tip=tip)
