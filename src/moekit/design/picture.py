"""The front as a PNG file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moekit.config.atomic import new_file
from moekit.config.errors import MissingExtraError


def write_front(path: Path, report: Mapping[str, Any]) -> None:
    """Draw every design by cost and figure, the front, the default and the chosen one.

    Errors: `MissingExtraError` without matplotlib.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise MissingExtraError(
            "the picture needs matplotlib. Install it: pip install 'moekit[design]'"
        ) from None
    figure = Figure(figsize=(8, 5), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    axes, axis = figure.add_subplot(), report["axis"]
    groups = [
        ("designs", report["designs"], "o", "#9aa5b1", 22),
        ("front", report["front"], "o", "#2563eb", 40),
        ("default", [report["default"]], "s", "#d97706", 70),
        ("chosen", [report["chosen"]], "*", "#dc2626", 150),
    ]
    for label, points, marker, colour, size in groups:
        shown = [one for one in points if one is not None and one["mean"] is not None]
        x, y = [one["cost"][axis] for one in shown], [one["mean"] for one in shown]
        axes.scatter(x, y, label=label, marker=marker, color=colour, s=size)
    line = sorted((one["cost"][axis], one["mean"]) for one in report["front"])
    axes.plot(
        [x for x, _ in line], [y for _, y in line], drawstyle="steps-post", color="#2563eb", linewidth=1
    )
    axes.set_xlabel({"active": "active parameters", "examples": "training examples"}[axis])
    axes.set_ylabel(f"validation {report['key']} ({'higher' if report['higher'] else 'lower'} is better)")
    axes.set_title(f"moekit {report['kind']}: {report['title']}")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    with new_file(path) as temporary:
        figure.savefig(temporary, format="png")
