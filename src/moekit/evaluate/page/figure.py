"""The picture for a README: the losses of all models beside what the experts of one layer do."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moekit.evaluate.charts import draw_multiples
from moekit.evaluate.charts.numbers import format_count
from moekit.evaluate.page.headline import are_equal, make_headline, present
from moekit.evaluate.page.losses import draw_loss
from moekit.evaluate.page.routing import draw_experts, full_colour, is_fixed, overlap
from moekit.evaluate.page.schema import check_report

_HEIGHT = 392.0


def summary_figure(report: Mapping[str, Any]) -> str:
    """One SVG file of 908 x 420 pixels for light and dark pages: loss over tokens, and experts by domain.

    The heat map shows the layer whose domains differ most in their experts, among those that learn their routing
    if there are any; without routing data the loss takes the whole width.

    Raises:
        DataError: if a key of the report is missing or wrong.
    """
    check_report(report)
    table = report["experts_by_domain"] or {"layers": [], "domains": []}
    layers = [layer for layer in table["layers"] if layer["share"] and layer["share"][0]]
    has_curves = any(report["models"][name]["curve"] for name in present(report))
    equal = len(present(report)) > 1 and are_equal(report, "active_parameters")
    heading = "Loss at equal active parameters" if equal else "Loss during training"
    panels = []
    if has_curves:
        width = 528.0 if layers else 880.0
        panels.append(
            draw_loss(
                report, "tokens", "training tokens", 1.0, width, format_count, height=_HEIGHT,
                heading=heading,
            )
        )  # fmt: skip
    if layers:
        learned = [layer for layer in layers if not is_fixed(layer)]
        layer = min(learned or layers, key=lambda one: overlap(one["share"]) or 0.0)
        n_experts = len(layer["share"][0])
        room = _HEIGHT - 68
        room -= 0 if room / n_experts >= 13 else 28  # cells too low for values get a key below them
        panels.append(
            draw_experts(
                table["domains"], layer, full_colour([layer]), 880.0 - 528.0 - 36.0, transposed=True,
                heading=f"Experts by domain, layer {layer['layer']}", cell_height=room / n_experts,
            )
        )  # fmt: skip
    verdict = make_headline(report).verdict
    sheet = draw_multiples(panels, columns=2, title="moekit quickstart", description=verdict, gap=36)
    return sheet.to_svg(standalone=True)
