"""Small multiples: several drawings in a grid, as one chart."""

from __future__ import annotations

from collections.abc import Sequence

from moekit.evaluate.charts.canvas import Drawing


def small_multiples(
    drawings: Sequence[Drawing],
    *,
    columns: int,
    title: str,
    description: str = "",
    gap: float = 28,
    standalone: bool = False,
) -> str:
    """Drawings in rows of `columns`, as one SVG."""
    drawing = draw_multiples(drawings, columns=columns, title=title, description=description, gap=gap)
    return drawing.to_svg(standalone=standalone)


def draw_multiples(
    drawings: Sequence[Drawing], *, columns: int, title: str, description: str = "", gap: float = 28
) -> Drawing:
    """Place `drawings` in reading order, each column as wide and each row as high as its largest drawing.

    >>> panels = [Drawing(100, 50), Drawing(60, 80), Drawing(90, 10)]
    >>> draw_multiples(panels, columns=2, title="three panels", gap=10).height
    100
    """
    columns = max(1, min(columns, len(drawings) or 1))
    rows = [drawings[start : start + columns] for start in range(0, len(drawings), columns)]
    widths = [
        max((row[column].width for row in rows if column < len(row)), default=0) for column in range(columns)
    ]
    heights = [max(drawing.height for drawing in row) for row in rows]
    sheet = Drawing(sum(widths) + gap * (columns - 1), sum(heights) + gap * max(0, len(rows) - 1))
    sheet.title, sheet.description = title, description
    for row_index, row in enumerate(rows):
        for column, drawing in enumerate(row):
            x = sum(widths[:column]) + gap * column
            y = sum(heights[:row_index]) + gap * row_index
            sheet.place(drawing, x, y)
    return sheet
