"""The page of one task's run: its figures, and which experts served which examples."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moekit.evaluate.charts import Drawing, draw_heat_map, format_count, format_number, format_percent
from moekit.evaluate.charts.theme import escape
from moekit.evaluate.page.blocks import figure, grid, section, table
from moekit.evaluate.page.document import plain_page


def render_task_page(report: Mapping[str, Any]) -> str:
    """One HTML page that asks the network for nothing.

    Args:
        report: what `moekit.recipes.task_report.evaluate_task` gives.
    """
    measured = ", ".join(f"{name} {format_number(value)}" for name, value in _main(report).items())
    return plain_page(
        f"{report['name']}: {measured}", "moekit evaluate", f"{report['name']}: {measured}",
        _tiles(report), _metrics(report), *(_experts(one) for one in report["experts_by"]), _made(report),
    )  # fmt: skip


def _main(report: Mapping[str, Any]) -> dict[str, float]:
    """The first metric of each target; the first of all where none belongs to a target."""
    found: dict[str, tuple[str, float]] = {}
    of_targets = {key: value for key, value in report["metrics"].items() if "." in key}
    for key, value in of_targets.items() or list(report["metrics"].items())[:1]:
        found.setdefault(key.split(".")[0], (key.replace(".", " "), value))
    return dict(found.values())


def _tiles(report: Mapping[str, Any]) -> str:
    found = [
        (f"{report['examples']:,}", f"examples of {report['of']}"),
        (format_count(report["active_parameters"]), "active parameters"),
        (format_count(report["total_parameters"]), "parameters in all"),
    ]
    items = "".join(f"<div><dd>{escape(value)}</dd><dt>{escape(name)}</dt></div>" for value, name in found)
    return f'<dl class="tiles">{items}</dl>'


def _metrics(report: Mapping[str, Any]) -> str:
    rows = [
        [escape(name.replace(".", ": ", 1)), format_number(value, 4)]
        for name, value in report["metrics"].items()
    ]
    return section("metrics", "Figures", "", table(["metric", "value"], rows))


def _experts(by: Mapping[str, Any]) -> str:
    names = [f"{value} ({n:,})" for value, n in zip(by["values"], by["examples"], strict=True)]
    n_experts = max((len(row) for layer in by["layers"] for row in layer["shares"]), default=0)
    highest = max((share for layer in by["layers"] for row in layer["shares"] for share in row), default=1.0)

    def drawn(layer: Mapping[str, Any]) -> str:
        experts = layer["names"] or [str(expert) for expert in range(n_experts)]

        def draw(width: float) -> Drawing:
            return draw_heat_map(
                [row[: len(experts)] for row in layer["shares"]], names, experts,
                title=f"{layer['name']} by {by['column']}", heading=layer["name"], width=width, high=highest,
                row_tip=by["column"], column_tip="expert", x_label="" if layer["names"] else "expert",
                value_format=lambda value: format_percent(value, 0), cell_height=24, key_label="of the tokens' weights",
                note=f"difference {layer['difference']:.3f}, by chance up to {layer['chance']:.3f}",
            )  # fmt: skip

        return figure(draw)

    above = [layer["name"] for layer in by["layers"] if layer["difference"] > layer["chance"]]
    verdict = (
        f"Examples with other values of {by['column']} use other experts, by more than chance explains, in "
        f"{len(above)} of {len(by['layers'])} layers."
    )
    intro = (
        f"{verdict} Shares of the experts in the tokens' weights, for each value of {by['column']}; in brackets how "
        "many examples have it. The difference is how far the shares of an example's value lie from those of all "
        "examples (0 to 1); chance is the largest difference of twenty shuffles. It says what goes together, not why."
    )
    return section(
        f"by-{by['column']}", f"Experts by {by['column']}", escape(intro), grid(map(drawn, by["layers"]))
    )


def _made(report: Mapping[str, Any]) -> str:
    sources = "; ".join(report["sources"])
    intro = (
        f"Run {report['run']}, step {report['step']:,}. Data: {sources}. "
        "Every number stands in the JSON file beside it."
    )
    return section("made", "How this was made", escape(intro))
