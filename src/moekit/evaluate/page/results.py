"""The sections on quality and cost: key figures, summary table, loss curves, bits per byte, generalisation."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from moekit.evaluate.charts import (
    Bars,
    Drawing,
    Mark,
    Reference,
    Series,
    draw_bars,
    draw_horizontal_bars,
    draw_lines,
)
from moekit.evaluate.charts.numbers import (
    format_bytes,
    format_change,
    format_count,
    format_duration,
    format_number,
    format_percent,
    is_number,
)
from moekit.evaluate.charts.theme import escape
from moekit.evaluate.page.blocks import NARROW, figure, grid, section
from moekit.evaluate.page.curves import final_loss, loss_key, points, reach, smoothed
from moekit.evaluate.page.headline import present, relative
from moekit.evaluate.page.schema import MODEL_COLOURS, MODEL_DASHES, MODEL_NAMES

Report = Mapping[str, Any]
_HIDDEN_START = (
    0.08  # share of training whose losses, far above the rest, are cut off at the top of the chart
)


def tiles(report: Report) -> str:
    """Up to four key figures, each with what it means."""
    shares = report["to_dense_loss"] or {}
    change = relative(report, "moe", "dense")
    against = relative(report, "moe", "transformer_xl")
    steps, seconds = shares.get("steps_share"), shares.get("seconds_share")
    violation = (report["balance"] or {}).get("max_violation")
    found = [
        (format_change(change), "bits per byte against the dense twin") if is_number(change) else None,
        (format_change(against), "bits per byte against Transformer-XL") if is_number(against) else None,
        (format_percent(steps, 0), "of the dense twin’s steps to its final loss")
        if is_number(steps)
        else None,
        (format_percent(seconds, 0), "of the dense twin’s seconds to its final loss")
        if is_number(seconds)
        else None,
        (format_number(violation, 2), "max violation: the busiest expert above the mean")
        if is_number(violation)
        else None,
    ]
    shown = [pair for pair in found if pair]
    if not shown:
        return ""
    items = "".join(
        f"<div><dd>{escape(value)}</dd><dt>{escape(meaning)}</dt></div>" for value, meaning in shown
    )
    return f'<dl class="tiles">{items}</dl>'


def domains_of(report: Report) -> list[str]:
    """The domains that were evaluated, in the corpus's order."""
    scored = {key for model in report["models"].values() for key in model["bits_per_byte"]} - {"mean"}
    listed = [domain for domain in report["corpus"]["domains"] if domain in scored]
    return listed + sorted(scored - set(listed))


def summary_section(report: Report) -> str:
    """The table of all models: quality, size, speed, memory, time."""
    names = present(report)
    head = "".join(
        f'<th scope="col"><span class="swatch {MODEL_COLOURS[name]}"></span>{MODEL_NAMES[name]}</th>'
        for name in names
    )
    bits: list[tuple[str, str, Callable[[Any], str], str]] = [
        (field if field != "mean" else "mean", f"bits_per_byte.{field}", format_number, "low")
        for field in ["mean", *domains_of(report)]
    ]
    groups: list[tuple[str, list[tuple[str, str, Callable[[Any], str], str]]]] = [
        ("Bits per byte on validation text; lower is better", bits),
        (
            "Size",
            [
                ("active parameters", "active_parameters", format_count, ""),
                ("total parameters", "total_parameters", format_count, ""),
                ("FLOPs per token, forward", "flops_per_token", format_count, ""),
            ],
        ),
        (
            "Speed and memory",
            [
                ("training tokens per second", "train_tokens_per_second", format_count, "high"),
                ("inference tokens per second", "inference_tokens_per_second", format_count, "high"),
                ("peak memory", "peak_memory_bytes", format_bytes, "low"),
                ("training time", "train_seconds", format_duration, "low"),
            ],
        ),
    ]
    body = ""
    for title, rows in groups:
        body += f'<tr class="group"><th colspan="{len(names) + 1}" scope="colgroup">{escape(title)}</th></tr>'
        for label, path, write, better in rows:
            body += (
                f'<tr><th scope="row">{escape(label)}</th>{_cells(report, names, path, write, better)}</tr>'
            )
    table = (
        f'<div class="scroll"><table class="summary"><thead><tr><td></td>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )
    note = "Small print under a value: its difference to the dense twin. " if "dense" in names else ""
    return section("summary", "Results", f"{note}The best of each row is bold.", table)


def _cells(report: Report, names: Sequence[str], path: str, write: Callable[[Any], str], better: str) -> str:
    field, _, key = path.partition(".")
    values = [report["models"][name].get(field) for name in names]
    values = [value.get(key) if key else value for value in values]
    finite = [value for value in values if is_number(value)]
    best = (min(finite) if better == "low" else max(finite)) if better and len(finite) > 1 else None
    cells = ""
    for name, value in zip(names, values, strict=True):
        text = escape(write(value))
        if best is not None and write(value) == write(best):
            text = f"<b>{text}</b>"
        share = relative(report, name, "dense", key) if key and name != "dense" else None
        if share is not None:
            text += f"<small>{format_change(share)}</small>"
        cells += f"<td>{text}</td>"
    return cells


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
    intro = f"Loss on {kind} text, in nats per token, over tokens seen (left) and over time (right)."
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
    labels: str = "legend",
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
        final = f" {format_number(y[-1], 3)}" if y and labels == "legend" else ""
        lines.append(Series(f"{MODEL_NAMES[name]}{final}", [v / unit for v in x], y, colour, dash))
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
        labels=labels,
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


def domains_section(report: Report) -> str:
    """Bits per byte of each domain, and each domain's difference to the dense twin."""
    names, domains = present(report), domains_of(report)
    if not domains:
        return ""
    groups = [*domains, "mean"]
    bars = [
        Bars(MODEL_NAMES[n], [report["models"][n]["bits_per_byte"].get(g) for g in groups], MODEL_COLOURS[n])
        for n in names
    ]
    figures = [_grouped(groups, bars, "Bits per byte by domain", "bits per byte, lower is better")]
    others = [name for name in names if name != "dense"]
    if "dense" in names and others:
        changes = []
        for name in others:
            shares = [relative(report, name, "dense", group) for group in groups]
            percents = [None if share is None else share * 100 for share in shares]
            changes.append(Bars(MODEL_NAMES[name], percents, MODEL_COLOURS[name]))

        def draw(width: float) -> Drawing:
            return draw_horizontal_bars(
                groups,
                changes,
                title="Difference to the dense twin in bits per byte",
                description="Negative: fewer bits than the dense twin.",
                heading="Difference to the dense twin",
                x_label="percent; left of the line is better than the dense twin",
                width=width,
                value_format=lambda value: format_change(value / 100),
                bar_height=18,
            )

        figures.append(figure(draw))
    intro = (
        "How many bits a model needs on average to encode one byte of unseen text. Bytes, unlike tokens, do not "
        "depend on the tokenizer, so languages and models can be compared."
    )
    return section("domains", "Bits per byte by domain", intro, grid(figures))


def _grouped(groups: Sequence[str], bars: Sequence[Bars], title: str, label: str) -> str:
    """Upright bars where the values fit above them, horizontal ones in a narrow window or with many groups."""

    def draw(width: float) -> Drawing:
        if width <= NARROW or len(groups) * len(bars) > 15:
            return draw_horizontal_bars(
                groups,
                bars,
                title=title,
                heading=title,
                x_label=label,
                width=width,
                value_format=format_number,
            )
        return draw_bars(
            groups, bars, title=title, heading=title, y_label=label, width=width, value_format=format_number
        )

    return figure(draw)


def gap_section(report: Report) -> str:
    """Bits per byte on training text, on validation text and on a domain never trained on."""
    names = present(report)
    held_out = report["corpus"]["held_out_domain"]
    fields = [("train", "training text"), ("validation", "validation text")]
    if any(is_number(report["models"][name]["gap"]["held_out"]) for name in names):
        fields.append(("held_out", "held-out text"))
    bars = [
        Bars(
            MODEL_NAMES[name],
            [report["models"][name]["gap"][field] for field, _ in fields],
            MODEL_COLOURS[name],
        )
        for name in names
    ]
    if not any(is_number(value) for part in bars for value in part.values):
        return ""
    gaps = []
    for name in names:
        gap = report["models"][name]["gap"]
        if is_number(gap["train"]) and is_number(gap["validation"]):
            gaps.append(f"{MODEL_NAMES[name]} {_signed(gap['validation'] - gap['train'])}")
    intro = "A model that learns its training text by heart shows it as a gap between training and validation text."
    said = (
        f"<p>Gap from training to validation text, in bits per byte: {', '.join(gaps)}.</p>" if gaps else ""
    )
    if len(fields) == 3:
        said += (
            f"<p>No model trained on {escape(held_out) if held_out else 'the held-out domain'}; its level also says "
            "how hard that text is, so compare models within it, not it with the other text.</p>"
        )
    chart = _grouped([label for _, label in fields], bars, "Bits per byte by kind of text", "bits per byte")
    return section(
        "generalisation", "Generalisation", intro, f'<div class="grid two">{chart}<div>{said}</div></div>'
    )


def _signed(value: float) -> str:
    return ("+" if value > 0 else "") + format_number(value)
