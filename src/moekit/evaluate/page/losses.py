"""The section on the loss curves, over tokens and over time."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from moekit.evaluate.charts import Drawing, Mark, Reference, Series, draw_lines
from moekit.evaluate.charts.numbers import format_count, format_number, format_percent, is_number
from moekit.evaluate.page.blocks import figure, grid, section
from moekit.evaluate.page.curves import final_loss, loss_key, points, reach, smoothed
from moekit.evaluate.page.headline import present
from moekit.evaluate.page.schema import MODEL_COLOURS, MODEL_DASHES, MODEL_NAMES

Report = Mapping[str, Any]
_HIDDEN_START = 0.08  # share of training whose losses, far above the rest, are cut off at the top


def curves_section(report: Report) -> str:
    """Loss over tokens and over seconds, with the place where the MoE reaches the dense twin's final loss."""
    models = {name: report["models"][name] for name in present(report) if report["models"][name]["curve"]}
    if not models:
        return ""
    key = loss_key(models)
    kind = "validation" if key == "validation_loss" else "training"
    seconds = [point["seconds"] for model in models.values() for point in model["curve"]]
    longest = max((value for value in seconds if is_number(value)), default=0.0)
    unit, size = (
        ("minutes", 60.0) if longest > 180 else ("hours", 3600.0) if longest > 10_800 else ("seconds", 1.0)
    )
    over_tokens = figure(
        lambda width: draw_loss(report, "tokens", "training tokens", 1.0, width, format_count)
    )
    over_time = figure(lambda width: draw_loss(report, "seconds", f"{unit} of training", size, width, None))
    intro = f"Loss on {kind} text, in nats per token, over tokens seen and over time."
    if key == "loss":
        intro += " No validation losses were recorded; the lines are averages over a twelfth of the run."
    if _limits(models, key)[1] is not None:
        intro += f" The first {_HIDDEN_START:.0%} of training lies above the charts."
    return section("curves", "Loss during training", intro, grid([over_tokens, over_time]))


def _limits(models: Mapping[str, Mapping[str, Any]], key: str) -> tuple[float | None, float | None]:
    """A range for the losses that leaves out the steep start, if the curves are long enough to have one."""
    lows, highs = [], []
    for model in models.values():
        x, y = smoothed(model["curve"], key, "tokens")
        late = [value for place, value in zip(x, y, strict=True) if place >= _HIDDEN_START * x[-1]]
        if len(y) < 8 or len(late) == len(y):
            return (None, None)
        lows.append(min(y))
        highs.append(max(late))
    low, high = min(lows), max(highs)
    return (low - 0.12 * (high - low), high) if high > low else (None, None)


def draw_loss(
    report: Report,
    axis: str,
    x_label: str,
    unit: float,
    width: float,
    x_format: Callable[[float], str] | None,
    *,
    height: float = 330,
    heading: str | None = None,
) -> Drawing:
    """Loss of each model over `axis` ("tokens" or "seconds", divided by `unit`)."""
    models = {name: report["models"][name] for name in present(report) if report["models"][name]["curve"]}
    key = loss_key(models)
    lines = []
    for name, model in models.items():
        colour, dash = MODEL_COLOURS[name], MODEL_DASHES[name]
        x, y = smoothed(model["curve"], key, axis)
        if key == "loss":
            raw = points(model["curve"], key, axis)[1]
            lines.append(Series(name, [v / unit for v in x], raw, colour=colour, faint=True))
        final = format_number(y[-1]) if y else ""
        lines.append(Series(MODEL_NAMES[name], [v / unit for v in x], y, colour, dash, note=final))
    references, marks = _crossing(models, key, axis, unit)
    ends = ", ".join(
        f"{MODEL_NAMES[n]} {format_number(final_loss(m['curve'], key))}" for n, m in models.items()
    )
    kind = "validation" if key == "validation_loss" else "training"
    return draw_lines(
        lines,
        title=f"{kind} loss over {x_label}",
        description=f"Final losses in nats per token: {ends}.",
        heading=heading,
        x_label=x_label,
        y_label=f"{kind} loss, nats per token",
        width=width,
        height=height,
        x_limits=(0.0, None),
        y_limits=_limits(models, key),
        x_format=x_format,
        value_format=format_number,
        references=references,
        marks=marks,
    )


def _crossing(
    models: Mapping[str, Mapping[str, Any]], key: str, axis: str, unit: float
) -> tuple[list[Reference], list[Mark]]:
    """The dense twin's final loss as a line, and the point where the MoE comes down to it."""
    target = final_loss(models["dense"]["curve"], key) if "dense" in models else None
    if target is None or len(models) < 2:
        return [], []
    references = [Reference(target, f"dense twin’s final loss {format_number(target)}")]
    whole = points(models["dense"]["curve"], key, axis)[0]
    place = reach(models["moe"]["curve"], target, axis, key) if "moe" in models else None
    if place is None or not whole or whole[-1] <= 0:
        return references, []
    noun = "time" if axis == "seconds" else "tokens"
    label = f"MoE is there after {format_percent(place / whole[-1], 0)}\nof the dense twin’s {noun}"
    return references, [Mark(place / unit, target, label, MODEL_COLOURS["moe"])]
