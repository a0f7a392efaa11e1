"""The sections on quality and cost: key figures, summary table, bits per byte by domain, generalisation."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from moekit.evaluate.charts import (
    Bars,
    Drawing,
    draw_bars,
    draw_horizontal_bars,
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
from moekit.evaluate.page.headline import present, relative
from moekit.evaluate.page.schema import MODEL_COLOURS, MODEL_NAMES

Report = Mapping[str, Any]


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
        f'<th scope="col"><span class="swatch {MODEL_COLOURS[name]}"></span>{_hyphenated(name)}</th>'
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


def _hyphenated(name: str) -> str:
    """A model's name, with a place to break Transformer-XL in the narrow columns of a phone."""
    return MODEL_NAMES[name].replace("Transformer", "Trans&shy;former")


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
        "How many bits a model needs on average to encode one byte of unseen text. Bytes, unlike tokens, do "
        "not depend on the tokenizer, so languages and models can be compared."
    )
    return section("domains", "Bits per byte by domain", intro, grid(figures))


def _grouped(groups: Sequence[str], bars: Sequence[Bars], title: str, label: str) -> str:
    """Upright bars; horizontal ones in a narrow window or where the values would not fit above them."""

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
    intro = "A model that learns its training text by heart does much better on it than on validation text."
    said = (
        f"<p>Gap from training to validation text, in bits per byte: {', '.join(gaps)}.</p>" if gaps else ""
    )
    if len(fields) == 3:
        said += (
            f"<p>No model trained on {escape(held_out or 'the held-out domain')}; its level also says "
            "how hard that text is, so compare the models on it, not it with the other texts.</p>"
        )
    chart = _grouped([label for _, label in fields], bars, "Bits per byte by kind of text", "bits per byte")
    return section(
        "generalisation", "Generalisation", intro, f'<div class="grid two">{chart}<div>{said}</div></div>'
    )


def _signed(value: float) -> str:
    return ("+" if value > 0 else "") + format_number(value)
