"""Line charts: several series over one axis, with gaps, shaded ranges, reference lines and marked points."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from moekit.evaluate.charts.annotations import Box, Mark, Reference, draw_mark, draw_reference
from moekit.evaluate.charts.canvas import HEADING_SIZE, SMALL_SIZE, TEXT_SIZE, Drawing
from moekit.evaluate.charts.numbers import is_number
from moekit.evaluate.charts.scale import Format, Scale, make_scale, tick_format, ticks
from moekit.evaluate.charts.theme import DASHES, SERIES, shorten, text_width

Values = Sequence[float | None]
_MAX_HOVER_BANDS = 80
_SMALLEST_PLOT = 90.0


@dataclass(frozen=True)
class Series:
    """One line: `y` over `x`, of equal length; None and NaN leave a gap.

    Attributes:
        colour: a name of `theme.COLOURS`; by default the next series colour.
        dash: an SVG dash pattern; by default one per series, so that lines differ without colour.
        low, high: a range shaded around the line (several seeds, a confidence interval).
        note: shown after the name in the legend, such as the last value.
        faint: thin and pale, without a legend entry: the raw values behind a smoothed line.
    """

    name: str
    x: Values
    y: Values
    colour: str | None = None
    dash: str | None = None
    low: Values | None = None
    high: Values | None = None
    faint: bool = False
    note: str = ""


def line_chart(series: Sequence[Series], *, title: str, standalone: bool = False, **options: object) -> str:
    """A line chart as SVG; `options` are those of `draw_lines`."""
    drawing = draw_lines(series, title=title, **options)  # type: ignore[arg-type]
    return drawing.to_svg(standalone=standalone)


def draw_lines(
    series: Sequence[Series],
    *,
    title: str,
    description: str = "",
    heading: str | None = None,
    x_label: str = "",
    y_label: str = "",
    width: float = 540,
    height: float = 320,
    x_log: bool = False,
    y_log: bool = False,
    x_limits: tuple[float | None, float | None] | None = None,
    y_limits: tuple[float | None, float | None] | None = None,
    x_format: Format | None = None,
    y_format: Format | None = None,
    value_format: Format | None = None,
    references: Sequence[Reference] = (),
    marks: Sequence[Mark] = (),
    labels: str = "legend",
) -> Drawing:
    """Draw lines on a canvas of `width` x `height` pixels.

    Args:
        title, description: for readers who cannot see the chart; `heading` is drawn above it.
        x_limits, y_limits: low and high ends of the axes, None for the data's; lines are clipped to them.
        x_format, y_format: how ticks are written; `value_format` how values are written on hover.
        labels: "legend" above the plot, "direct" beside the line ends, or "none".
    """
    drawing = Drawing(width, height)
    drawing.title, drawing.description = title, description
    named = [(line, _style(line, index)) for index, line in enumerate(series)]
    shown = [(line, style) for line, style in named if not line.faint]
    top = 0.0
    if heading:
        drawing.text(0, 13, shorten(heading, HEADING_SIZE, width), size=HEADING_SIZE, weight="600")
        top = 24
    if labels == "legend":
        top += _legend(drawing, shown, width, top)
    if y_label:
        drawing.text(0, top + 11, shorten(y_label, SMALL_SIZE, width), fill="muted")
        top += 16
    top += 7
    below = 40 if x_label else 24
    drawing.height = height = max(height, top + _SMALLEST_PLOT + below)  # a long legend must not eat the plot
    bottom = height - below

    every_y = [value for line in series for part in (line.y, line.low, line.high) for value in part or ()]
    every_y += [reference.y for reference in references]
    y_axis = make_scale(every_y, bottom, top, log=y_log, limits=y_limits)
    y_ticks = ticks(y_axis, max(2, round((bottom - top) / 48)))
    y_text = [(value, (y_format or tick_format(y_ticks, y_log))(value)) for value in y_ticks]
    left = max([text_width(text, SMALL_SIZE) for _, text in y_text], default=0.0) + 8
    right = width - 10
    if labels == "direct":
        right = width - min(
            width * 0.4, max([1.1 * text_width(line.name, TEXT_SIZE) for line, _ in shown], default=0.0) + 14
        )
    every_x = [value for line in series for value in line.x]
    x_axis = make_scale(every_x, left, right, log=x_log, limits=x_limits, padding=0.0)

    _axes(drawing, x_axis, y_axis, y_text, x_label, x_format, width)
    if not any(
        x_axis.shows(x) and y_axis.shows(y) for line in series for x, y in zip(line.x, line.y, strict=True)
    ):
        drawing.text((left + right) / 2, (top + bottom) / 2, "no values", fill="muted", anchor="middle")
        return drawing
    taken: list[Box] = []
    for reference in references:
        if y_axis.shows(reference.y):
            taken.append(draw_reference(drawing, reference, x_axis, y_axis))
    with drawing.clipped(left, top - 4, right - left + 6, bottom - top + 5):
        for line, (colour, dash) in named:
            _line(drawing, line, colour, dash, x_axis, y_axis)
    _line_ends(drawing, shown, x_axis, y_axis, labels == "direct", width)
    _hover(drawing, shown, x_axis, y_axis, x_label, x_format, value_format or tick_format(y_ticks, y_log))
    points = [(x_axis.at(x), y_axis.at(y)) for line in series for x, y in _placed(line, x_axis, y_axis)]
    for mark in marks:
        if x_axis.shows(mark.x) and y_axis.shows(mark.y):
            taken.append(draw_mark(drawing, mark, x_axis, y_axis, points, taken))
    return drawing


def _style(line: Series, index: int) -> tuple[str, str]:
    return (
        line.colour or SERIES[index % len(SERIES)],
        line.dash if line.dash is not None else DASHES[index % len(DASHES)],
    )


def _placed(line: Series, x_axis: Scale, y_axis: Scale) -> list[tuple[float, float]]:
    """The points of `line` that both axes can place."""
    pairs = zip(line.x, line.y, strict=True)
    return [(x, y) for x, y in pairs if is_number(x) and is_number(y) and x_axis.shows(x) and y_axis.shows(y)]


def _legend(drawing: Drawing, shown: list[tuple[Series, tuple[str, str]]], width: float, top: float) -> float:
    """Names with a piece of their line, wrapped to the width; returns the height used."""
    x, row = 0.0, 0
    for line, (colour, dash) in shown:
        full = f"{line.name} {line.note}".strip()
        name = shorten(full, TEXT_SIZE, width - 34)
        needed = 28 + text_width(name, TEXT_SIZE) + 18
        if x > 0 and x + needed - 18 > width:
            x, row = 0.0, row + 1
        y = top + 19 * row + 9
        drawing.line(x, y, x + 22, y, stroke=colour, thickness=2.5, dash=dash)
        drawing.text(x + 28, y + 4, name, size=TEXT_SIZE, tip=full if name != full else None)
        x += needed
    return 19.0 * (row + 1) + 5 if shown else 0.0


def _axes(
    drawing: Drawing,
    x_axis: Scale,
    y_axis: Scale,
    y_text: list[tuple[float, str]],
    x_label: str,
    x_format: Format | None,
    width: float,
) -> None:
    left, right, bottom = x_axis.start, x_axis.end, y_axis.start
    for value, text in y_text:
        y = y_axis.at(value)
        drawing.line(left, y, right, y)
        drawing.text(left - 8, y + 4, text, fill="muted", anchor="end")
    values = ticks(x_axis, max(2, round((right - left) / 85)))
    write = x_format or tick_format(values, x_axis.log)
    last_end = -1e9
    for value in values:
        x, text = x_axis.at(value), write(value)
        half = text_width(text, SMALL_SIZE) / 2
        middle = min(max(x, half), width - half)
        if middle - half < last_end + 6:
            continue
        last_end = middle + half
        drawing.line(x, bottom, x, bottom + 4, stroke="axis")
        drawing.text(middle, bottom + 17, text, fill="muted", anchor="middle")
    drawing.line(left, bottom, right, bottom, stroke="axis")
    if x_label:
        drawing.text(
            (left + right) / 2,
            bottom + 35,
            shorten(x_label, SMALL_SIZE, width),
            fill="muted",
            anchor="middle",
        )


def _line(drawing: Drawing, line: Series, colour: str, dash: str, x_axis: Scale, y_axis: Scale) -> None:
    if line.low is not None and line.high is not None:
        edges = [
            (x_axis.at(x), y_axis.at(low), y_axis.at(high))
            for x, low, high in zip(line.x, line.low, line.high, strict=True)
            if is_number(x) and is_number(low) and is_number(high)
            and x_axis.shows(x) and y_axis.shows(low) and y_axis.shows(high)
        ]  # fmt: skip
        outline = [(x, high) for x, _, high in edges] + [(x, low) for x, low, _ in reversed(edges)]
        if edges:
            points = " ".join(f"{x:.1f},{y:.1f}" for x, y in outline)
            drawing.add("polygon", fill=colour, points=points, fill_opacity=0.16, css_class="range")
    pieces: list[list[str]] = [[]]
    for x, y in zip(line.x, line.y, strict=True):
        if is_number(x) and is_number(y) and x_axis.shows(x) and y_axis.shows(y):
            pieces[-1].append(f"{x_axis.at(x):.1f} {y_axis.at(y):.1f}")
        elif pieces[-1]:
            pieces.append([])
    path = "".join("M" + "L".join(piece) for piece in pieces if len(piece) > 1)
    if path:
        drawing.add(
            "path", stroke=colour, fill="none", d=path, css_class="series", stroke_linejoin="round",
            stroke_linecap=None if dash else "round", stroke_dasharray=None if line.faint else dash or None,
            stroke_width=1 if line.faint else 2, stroke_opacity=0.3 if line.faint else None,
        )  # fmt: skip
    for piece in pieces:
        if len(piece) == 1:
            x_text, y_text = piece[0].split()
            drawing.add("circle", fill=colour, cx=float(x_text), cy=float(y_text), r=3, css_class="series")


def _line_ends(
    drawing: Drawing,
    shown: list[tuple[Series, tuple[str, str]]],
    x_axis: Scale,
    y_axis: Scale,
    direct: bool,
    width: float,
) -> None:
    """A dot at the end of each line and, where labels are direct, the names beside them, kept apart."""
    labels: list[tuple[float, float, str, str, str]] = []
    for line, (colour, _) in shown:
        placed = _placed(line, x_axis, y_axis)
        if not placed:
            continue
        x, y = x_axis.at(placed[-1][0]), y_axis.at(placed[-1][1])
        if x <= x_axis.end + 1 and y_axis.end - 1 <= y <= y_axis.start + 1:
            drawing.add("circle", fill=colour, stroke="surface", cx=x, cy=y, r=3.5, stroke_width=1.2)
        labels.append((min(max(y, y_axis.end), y_axis.start), x, line.name, colour, line.name))
    if not direct:
        return
    gap, previous = TEXT_SIZE + 3, -1e9
    labels.sort()
    heights = []
    for y, *_ in labels:
        previous = max(y, previous + gap)
        heights.append(previous)
    overflow = max(0.0, (heights[-1] if heights else 0.0) - y_axis.start)
    for index in range(len(heights) - 1, -1, -1):
        limit = heights[index + 1] - gap if index + 1 < len(heights) else y_axis.start
        heights[index] = min(heights[index], limit) if overflow else heights[index]
    for (_, _, name, colour, full), y in zip(labels, heights, strict=True):
        text = shorten(name, 1.1 * TEXT_SIZE, width - x_axis.end - 9)
        drawing.text(
            x_axis.end + 9,
            y + 4,
            text,
            size=TEXT_SIZE,
            fill=colour,
            weight="600",
            tip=full if text != full else None,
        )


def _hover(
    drawing: Drawing,
    shown: list[tuple[Series, tuple[str, str]]],
    x_axis: Scale,
    y_axis: Scale,
    x_label: str,
    x_format: Format | None,
    value_format: Format,
) -> None:
    """Invisible columns that tell, on hover, the values of all lines at that place."""
    every = [_placed(line, x_axis, y_axis) for line, _ in shown]
    longest = sorted({x for x, _ in max(every, key=len, default=[])})
    end = max((x for placed in every for x, _ in placed), default=0.0)
    stride = -(-len(longest) // _MAX_HOVER_BANDS) or 1
    stops = longest[::-1][::stride][::-1]
    if stops and stops[-1] < end:
        stops.append(end)
    write = x_format or tick_format(stops)
    for index, stop in enumerate(stops):
        middle = x_axis.at(stop)
        if not x_axis.start - 1 <= middle <= x_axis.end + 1:
            continue
        before = (x_axis.at(stops[index - 1]) + middle) / 2 if index else middle - 6
        after = (x_axis.at(stops[index + 1]) + middle) / 2 if index + 1 < len(stops) else middle + 6
        before = max(before, x_axis.start)
        rows = [f"{write(stop)} {x_label}".strip()]
        for (line, _), placed in zip(shown, every, strict=True):
            near = min(placed, key=lambda point: abs(x_axis.at(point[0]) - middle), default=None)
            if near and abs(x_axis.at(near[0]) - middle) <= max(after - before, 8):
                rows.append(f"{line.name}: {value_format(near[1])}")
        drawing.add(
            "rect", x=before, y=y_axis.end, width=max(after - before, 1), height=y_axis.start - y_axis.end,
            fill="ink", fill_opacity=0, css_class="hit", tip="\n".join(rows),
        )  # fmt: skip
