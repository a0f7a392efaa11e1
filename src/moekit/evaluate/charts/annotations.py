"""What a line chart says beyond its lines: reference lines and marked points, with labels that keep clear."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

from moekit.evaluate.charts.canvas import SMALL_SIZE, Drawing
from moekit.evaluate.charts.scale import Scale
from moekit.evaluate.charts.theme import shorten, text_width

Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Reference:
    """A horizontal line at `y` with a label."""

    y: float
    label: str


@dataclass(frozen=True)
class Mark:
    """A point set apart, with a label of one or more lines."""

    x: float
    y: float
    label: str
    colour: str = "ink"


def draw_reference(drawing: Drawing, reference: Reference, x_axis: Scale, y_axis: Scale) -> Box:
    """Dashed line with its label at the left end, below the line where there is room."""
    y = y_axis.at(reference.y)
    label = shorten(reference.label, SMALL_SIZE, x_axis.end - x_axis.start - 12)
    drawing.line(x_axis.start, y, x_axis.end, y, stroke="muted", dash="3 3")
    baseline = y + 14 if y + 18 < y_axis.start else y - 6
    drawing.text(x_axis.start + 6, baseline, label, fill="muted", halo=True)
    return (x_axis.start + 6, baseline - 10, x_axis.start + 6 + text_width(label, SMALL_SIZE), baseline + 3)


def draw_mark(
    drawing: Drawing,
    mark: Mark,
    x_axis: Scale,
    y_axis: Scale,
    points: list[tuple[float, float]],
    taken: list[Box],
) -> Box:
    """A ring with its label where it hides the fewest points, joined by a short leader."""
    x, y = x_axis.at(mark.x), y_axis.at(mark.y)
    rows = mark.label.split("\n")
    wide = max(text_width(row, SMALL_SIZE) for row in rows)
    high = 14.0 * len(rows)
    best: tuple[float, Box] | None = None
    for dx, dy in product((10, 24, 44, 0, -10, -24, -44), (-18, -32, -50, -72, 14, 28)):
        x0 = x + dx if dx > 0 else x - wide / 2 if dx == 0 else x + dx - wide
        y0 = y + dy - high if dy < 0 else y + dy
        box = (x0, y0, x0 + wide, y0 + high)
        hidden = sum(
            1 for px, py in points if x0 - 4 <= px <= x0 + wide + 4 and y0 - 4 <= py <= y0 + high + 4
        )
        outside = max(0.0, x_axis.start - x0) + max(0.0, x0 + wide - x_axis.end - 8)
        outside += max(0.0, y_axis.end - y0) + max(0.0, y0 + high - y_axis.start)
        overlaps = sum(
            1 for a in taken if a[0] < box[2] and box[0] < a[2] and a[1] < box[3] and box[1] < a[3]
        )
        cost = 30 * hidden + 12 * outside + 200 * overlaps + abs(dx) * 0.4 + abs(dy) * 0.6
        if best is None or cost < best[0]:
            best = (cost, box)
    assert best is not None  # the product above is not empty
    box = best[1]
    touch_x = min(max(x, box[0]), box[2])
    touch_y = box[3] - 1 if box[3] < y else box[1] + 2
    drawing.line(x, y, touch_x, touch_y, stroke="muted")
    drawing.add(
        "circle",
        fill="surface",
        stroke=mark.colour,
        cx=x,
        cy=y,
        r=5,
        stroke_width=2.2,
        css_class="mark",
        tip=mark.label,
    )
    for index, row in enumerate(rows):
        # the box is as wide as the text in the widest face: keep the end at the ring's side in place
        end = box[2] <= x
        drawing.text(
            box[2] if end else box[0], box[1] + 11 + 14 * index, row, halo=True,
            anchor="end" if end else "start", weight="600" if index == 0 else None,
        )  # fmt: skip
    return box
