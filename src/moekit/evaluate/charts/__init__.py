"""Charts as SVG strings in plain Python: light and dark, readable without colour, no dependency.

>>> loss = Series("MoE", [0, 1, 2], [3.0, 2.5, 2.2])
>>> svg = line_chart([loss], title="Loss", x_label="tokens", standalone=True)
>>> svg.startswith("<svg")
True

Every function takes `standalone`: True for a file of its own (a README, a slide), which then carries its
colours for light and dark and a background; False for a chart inside a page, which takes its colours from the
CSS variables of `theme.css_variables` and falls back to the light ones.
"""

from moekit.evaluate.charts.annotations import Mark, Reference
from moekit.evaluate.charts.bars import Bars, bar_chart, draw_bars, draw_horizontal_bars, horizontal_bars
from moekit.evaluate.charts.canvas import Drawing
from moekit.evaluate.charts.heatmap import draw_heat_map, heat_map
from moekit.evaluate.charts.lines import Series, draw_lines, line_chart
from moekit.evaluate.charts.multiples import draw_multiples, small_multiples
from moekit.evaluate.charts.numbers import (
    format_bytes,
    format_change,
    format_count,
    format_duration,
    format_number,
    format_percent,
)

__all__ = [
    "Bars",
    "Drawing",
    "Mark",
    "Reference",
    "Series",
    "bar_chart",
    "draw_bars",
    "draw_heat_map",
    "draw_horizontal_bars",
    "draw_lines",
    "draw_multiples",
    "format_bytes",
    "format_change",
    "format_count",
    "format_duration",
    "format_number",
    "format_percent",
    "heat_map",
    "horizontal_bars",
    "line_chart",
    "small_multiples",
]
