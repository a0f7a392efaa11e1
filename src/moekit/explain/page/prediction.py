"""The page of single predictions: the text by expert, what each expert does to the answer, and the answers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moekit.evaluate.charts.numbers import format_number, format_percent
from moekit.evaluate.charts.theme import escape
from moekit.evaluate.page.blocks import section
from moekit.explain.page.blocks import Cell, figure, number_cell, share_cell, sortable
from moekit.explain.page.document import framed
from moekit.explain.predictions import visible

SCRIPTS = ("core.js", "charts.js", "figures.js", "prediction.js", "text.js", "main.js")
# rows of the table of experts
EXPERTS = 200

Report = Mapping[str, Any]


def render_prediction_page(report: Report) -> str:
    """One self-contained HTML page for a report of `explain_text` or `explain_examples`."""
    cost = report["cost"]
    footer = (
        f"{cost['edits']:,} experts were switched off one by one; {cost['tokens_read']:,} tokens were read in "
        f"{cost['seconds']:.1f} s."
    )
    return framed(report, SCRIPTS, _tiles(report), _sections(report), footer)


def _tiles(report: Report) -> str:
    texts, n_layers = report["texts"], len(report["texts"][0]["layers"])
    values = [
        (f"{sum(len(text['tokens']) for text in texts)}", "tokens"),
        (f"{len({(one['layer'], one['expert']) for one in report['experts']})}",
         f"experts asked in {n_layers} sparse layer{'' if n_layers == 1 else 's'}"),
        (f"{report['cost']['edits']:,}", "times an expert was switched off"),
    ]  # fmt: skip
    if report["kind"] == "text":
        known = [one for one in texts[0]["answers"] if one["next"] is not None]
        if known:
            first = sum(one["rank"] == 1 for one in known) / len(known)
            values.append((format_percent(first, 0), "of the tokens were expected"))
    else:
        values += [
            (format_percent(answer["probability"]), f"{name}: {answer['prediction']}")
            for name, answer in texts[0]["answers"].items()
            if "probability" in answer
        ]
    cells = "".join(f"<div><dd>{escape(value)}</dd><dt>{escape(name)}</dt></div>" for value, name in values)
    notes = "".join(f"<li>{escape(note)}</li>" for note in report["notes"])
    return f'<dl class="tiles">{cells}</dl>' + (f'<ul class="alarms">{notes}</ul>' if notes else "")


def _sections(report: Report) -> list[tuple[str, str, str]]:
    found = [("texts", "Text", section(
        "texts", "The text by expert",
        "Each token stands over its heaviest expert in the layer. Point at a token for all of its experts, their "
        "weights, and how the answer changes without them.",
        '<div id="reading"><div class="bar"><h3></h3><span class="save"></span></div><div class="reading"></div>'
        '<pre class="detail" aria-live="polite"></pre></div>',
    ))]  # fmt: skip
    if report["measures"]:
        found.append(("effects", "Effects", section(
            "effects", "What each expert does",
            "The answer without an expert less the answer with it. Blue, below 0: the expert helps, without it the "
            "answer would be less probable. Orange, above 0: it stands in the way. "
            f"Where an expert is switched off, {escape(report['instead_words'])}.",
            figure("effects", "The strongest expert of each token and layer; colours end at the 97th percentile."),
            _experts(report),
        )))  # fmt: skip
    found.append(("answers", "Answers", _answers(report)))
    if report["swaps"]:
        found.append(("swaps", "Swaps", _swaps(report)))
    if report["measures"]:
        terms = [(f"{one['title'].capitalize()}, {one['unit']}", one["words"]) for one in report["measures"]]
        items = "".join(
            f"<div><dt>{escape(term)}</dt><dd>{escape(words)}</dd></div>" for term, words in terms
        )
        more = (
            "<div><dt>Margin</dt><dd>Probability of the last expert that the token chose less that of the best one "
            "that it did not. Below 0 where a balancing bias turned the order round.</dd></div>"
        )
        glossary = f'<dl class="glossary">{items}{more}</dl>'
        found.append(("measures", "Measures", section("measures", "Measures", "", glossary)))
    return found


def _experts(report: Report) -> str:
    several = len(report["texts"]) > 1
    head = [*(["example"] if several else []), "layer", "expert", "tokens", "mean weight"]
    head += [f"{one['title']}, {one['unit']}" for one in report["measures"]]
    rows: list[tuple[Cell, ...]] = []
    for one in report["experts"][:EXPERTS]:
        effects = [number_cell(one["effects"].get(measure["key"]), 4) for measure in report["measures"]]
        first = [str(one["text"] + 1)] if several else []
        rows.append((
            *first, str(one["layer"]), escape(one["label"]), number_cell(float(one["tokens"]), 0),
            number_cell(one["weight"], 2), *effects,
        ))  # fmt: skip
    return sortable("Experts, means over their tokens", head, rows)


def _answers(report: Report) -> str:
    if report["kind"] == "text":
        text = report["texts"][0]
        rows: list[tuple[Cell, ...]] = [
            (
                str(place), f"<code>{escape(visible(text['tokens'][place]))}</code>",
                f"<code>{escape(visible(answer['next']))}</code>" if answer["next"] is not None else "–",
                share_cell(answer["probability"]), number_cell(answer["log_probability"]),
                number_cell(None if answer["rank"] is None else float(answer["rank"]), 0),
                f"<code>{escape(visible(answer['top']))}</code>", share_cell(answer["top_probability"]),
            )
            for place, answer in enumerate(text["answers"])
        ]  # fmt: skip
        head = ["", "token", "next", "probability", "log", "place", "expected", "its probability"]
        return section("answers", "What the model expects", "", sortable("Next tokens", head, rows))
    rows = [
        (str(text["text"] + 1), escape(name), escape(_said(answer)), share_cell(answer.get("probability")))
        for text in report["texts"]
        for name, answer in text["answers"].items()
    ]
    head = ["example", "target", "answer", "probability"]
    return section("answers", "Answers", "", sortable("Answers", head, rows))


def _said(answer: Mapping[str, Any]) -> str:
    said = answer.get("text", answer["prediction"])
    if isinstance(said, float):
        return format_number(said, 4)
    return ", ".join(map(str, said)) if isinstance(said, list) else str(said)


def _swaps(report: Report) -> str:
    text, rows = report["texts"][0], []
    for swap in report["swaps"]:
        known = [(abs(change), place) for place, change in enumerate(swap["changes"]) if change is not None]
        place = max(known)[1] if known else 0
        rows.append((
            str(swap["layer"]), f"{swap['one']} and {swap['other']}", number_cell(float(swap["moved"]), 0),
            number_cell(swap["mean"], 4),
            f"<code>{escape(visible(text['tokens'][place]))}</code> {format_number(swap['changes'][place], 3)}",
        ))  # fmt: skip
    head = ["layer", "experts", "tokens moved", "mean change, nats", "largest change, behind"]
    return section(
        "swaps", "Experts exchanged",
        "Two experts of a layer exchange their tokens; the change is that of the log-probability of the next token.",
        sortable("Swaps", head, rows),
    )  # fmt: skip
