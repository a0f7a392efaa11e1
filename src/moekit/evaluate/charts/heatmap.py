"""Heat maps: a table of values as shades of one colour, with the values written where they fit."""

from __future__ import annotations

from collections.abc import Sequence

from moekit.evaluate.charts.canvas import HEADING_SIZE, SMALL_SIZE, TEXT_SIZE, Drawing
from moekit.evaluate.charts.numbers import is_number
from moekit.evaluate.charts.scale import Format
from moekit.evaluate.charts.theme import shorten, text_width

_PALEST, _FULL = 0.03, 0.97
_DARK_CELL = 0.69  # above this opacity, text in the background's shade has the higher contrast


def heat_map(
    values: Sequence[Sequence[float | None]],
    rows: Sequence[str],
    columns: Sequence[str],
    *,
    title: str,
    standalone: bool = False,
    **options: object,
) -> str:
    """A heat map as SVG; `options` are those of `draw_heat_map`."""
    drawing = draw_heat_map(values, rows, columns, title=title, **options)  # type: ignore[arg-type]
    return drawing.to_svg(standalone=standalone)


def draw_heat_map(
    values: Sequence[Sequence[float | None]],
    rows: Sequence[str],
    columns: Sequence[str],
    *,
    title: str,
    description: str = "",
    heading: str | None = None,
    subheading: str | None = None,
    x_label: str = "",
    y_label: str = "",
    width: float = 540,
    cell_height: float = 28,
    low: float = 0.0,
    high: float | None = None,
    value_format: Format | None = None,
    tip_format: Format | None = None,
    row_tip: str = "",
    column_tip: str = "",
    note: str = "",
    key: bool | None = None,
    key_label: str = "",
) -> Drawing:
    """Draw `values[row][column]`, from the background's colour at `low` to full colour at `high`.

    Args:
        low, high: ends of the colour scale, `high` the largest value by default. Give both to compare maps.
        value_format: how values are written in cells and key; `tip_format` how on hover.
        row_tip, column_tip: a word put before the row's and the column's name on hover, such as "expert".
        note: a muted line under the heading.
        key_label: what is written after the high end of the key, such as "% of tokens".
        key: draw the colour scale below; by default where the values are not written in the cells.
    """
    finite = [value for line in values for value in line if is_number(value)]
    top_value = high if high is not None else max(finite, default=1.0)
    if top_value <= low:
        top_value = low + 1.0
    write = value_format or (lambda value: f"{value:.3g}")
    show = tip_format or write
    names = [shorten(name, TEXT_SIZE, width * 0.3) for name in rows]
    left = max((text_width(name, TEXT_SIZE) for name in names), default=0.0) + 10
    if y_label:
        left = max(left, text_width(y_label, SMALL_SIZE) + 10)
    cell_width = (width - left) / max(1, len(columns))
    gap = 1.0 if min(cell_width, cell_height) >= 8 else 0.25
    drawing = Drawing(width, 0)
    drawing.title, drawing.description = title, description
    top = 0.0
    if heading:
        drawing.text(0, 13, shorten(heading, HEADING_SIZE, width), size=HEADING_SIZE, weight="600")
        if subheading:
            drawing.text(width, 13, subheading, fill="muted", anchor="end")
        top = 24
    if note:
        drawing.text(0, top + 10, shorten(note, SMALL_SIZE, width), fill="muted")
        top += 24
    _column_names(drawing, columns, left, cell_width, top + 12)
    if x_label or y_label:
        drawing.text(left - 10, top + 12, x_label or y_label, fill="muted", anchor="end")
    top += 18

    written = [write(value) for value in finite]
    size = 11.0 if max((text_width(text, 11) for text in written), default=0.0) <= cell_width - 3 else 9.5
    fits = (
        min(cell_height - 13, cell_width - 15) >= 0
        and max((text_width(text, size) for text in written), default=0.0) <= cell_width - 1
    )
    every = max(1, -(-13 // max(1, int(cell_height))))
    for row, (name, line) in enumerate(zip(rows, values, strict=True)):
        y = top + row * cell_height
        if row % every == 0:
            tip = name if names[row] != name else None
            drawing.text(
                left - 10, y + cell_height / 2 + 4, names[row], size=TEXT_SIZE, anchor="end", tip=tip
            )
        for column, value in enumerate(line):
            x = left + column * cell_width
            where = f"{row_tip} {name}, {column_tip} {columns[column]}".replace(" ,", ",").strip()
            _cell(drawing, x, y, cell_width - gap, cell_height - gap, value, low, top_value, where, show)
            if not is_number(value):
                drawing.text(x + cell_width / 2, y + cell_height / 2 + 4, "–", fill="muted", anchor="middle")
            elif fits:
                light = _shade(value, low, top_value) < _DARK_CELL
                drawing.text(
                    x + (cell_width - gap) / 2, y + (cell_height - gap) / 2 + size * 0.36, write(value),
                    size=size, fill="cell-low" if light else "cell-high", anchor="middle",
                )  # fmt: skip
    bottom = top + len(rows) * cell_height
    drawing.height = bottom + 2
    if key or (key is None and not fits):
        _key(drawing, left, bottom + 12, width, low, top_value, write, key_label)
        drawing.height = bottom + 30
    return drawing


def _shade(value: float, low: float, high: float) -> float:
    share = min(max((value - low) / (high - low), 0.0), 1.0)
    return _PALEST + (_FULL - _PALEST) * share


def _cell(
    drawing: Drawing,
    x: float,
    y: float,
    width: float,
    height: float,
    value: float | None,
    low: float,
    high: float,
    where: str,
    show: Format,
) -> None:
    radius = 2.0 if min(width, height) > 10 else None
    if not is_number(value):
        drawing.add(
            "rect", fill="track", x=x, y=y, width=width, height=height, rx=radius, tip=f"{where}: no value"
        )
        return
    drawing.add(
        "rect", fill="heat", fill_opacity=_shade(value, low, high), x=x, y=y, width=width, height=height,
        rx=radius, css_class="cell", tip=f"{where}: {show(value)}",
    )  # fmt: skip


def _column_names(drawing: Drawing, columns: Sequence[str], left: float, cell_width: float, y: float) -> None:
    widest = max((text_width(name, SMALL_SIZE) for name in columns), default=0.0)
    short = widest < 30
    every = max(1, -(-int(widest + 4) // max(1, int(cell_width)))) if short else 1
    for column in range(0, len(columns), every):
        name = columns[column] if short else shorten(columns[column], SMALL_SIZE, max(cell_width - 3, 10))
        tip = columns[column] if name != columns[column] else None
        middle = left + (column + 0.5) * cell_width
        drawing.text(middle, y, name, fill="muted", anchor="middle", tip=tip)


def _key(
    drawing: Drawing, left: float, y: float, width: float, low: float, high: float, write: Format, label: str
) -> None:
    """The colour scale: five steps between the two ends."""
    low_text, high_text = write(low), f"{write(high)}{label}"
    x = left
    drawing.text(x, y + 9, low_text, fill="muted")
    x += text_width(low_text, SMALL_SIZE) + 6
    step = min(26.0, max(8.0, (width - x) / 12))
    for index in range(5):
        shade = _shade(low + (high - low) * index / 4, low, high)
        drawing.add(
            "rect",
            fill="heat",
            fill_opacity=shade,
            x=x + index * step,
            y=y,
            width=step - 1,
            height=11,
            rx=1.5,
        )
    drawing.text(
        x + 5 * step + 5, y + 9, shorten(high_text, SMALL_SIZE, width - x - 5 * step - 5), fill="muted"
    )
