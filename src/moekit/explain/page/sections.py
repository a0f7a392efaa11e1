"""The sections of the page: what stands in its HTML; figures are drawn by its script from the report."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moekit.evaluate.charts.numbers import format_count, format_number, format_percent, is_number
from moekit.evaluate.charts.theme import escape
from moekit.evaluate.page.blocks import section
from moekit.explain.page.ablation import ablation, headline
from moekit.explain.page.blocks import figure, number_cell, share_cell, sortable
from moekit.explain.verdict import is_unsupported

Report = Mapping[str, Any]


def tiles(report: Report) -> str:
    """The figures that one looks for first."""
    layers = report["layers"]

    def worst(key: str, of: Any) -> float | None:
        values = [layer[key] for layer in layers if is_number(layer[key])]
        return of(values) if values else None

    claims = [layer["claim"] for layer in layers if layer["claim"]]
    values = [
        (format_count(report["n_tokens"]), "tokens read"),
        (f"{report['n_experts']}", f"experts in {len(layers)} layer{'s' if len(layers) > 1 else ''}"),
        (format_number(worst("load_entropy", min)), "lowest load entropy (1 is even)"),
        (format_number(worst("max_violation", max), 2), "largest max violation (0 is even)"),
        (str(sum(len(layer["dead"]) for layer in layers)), "dead experts"),
        (format_percent(worst("drop_share", max)), "most choices dropped"),
    ]
    if claims:
        values.append(
            (f"{sum(one['holds'] for one in claims)} of {len(claims)}", "layers that tell groups apart")
        )
    tested = headline(report)
    values += [] if tested is None else [tested]
    cells = "".join(f"<div><dd>{escape(value)}</dd><dt>{escape(name)}</dt></div>" for value, name in values)
    return f'<dl class="tiles">{cells}</dl>'


def alarm_list(report: Report) -> str:
    """Alarms with their remedies, or that there is none."""
    if not report["alarms"]:
        none = "No expert is dead or overloaded, no layer has collapsed, and few or no choices were dropped."
        return f'<ul class="alarms"><li class="good"><b>No alarm</b>{none}</li></ul>'
    items = "".join(
        f"<li><b>{escape(alarm['kind'].capitalize())}</b>{escape(alarm['words'])}<span>{escape(alarm['remedy'])}</span></li>"
        for alarm in report["alarms"]
    )
    return f'<ul class="alarms">{items}</ul>'


def sections(report: Report) -> list[tuple[str, str, str]]:
    """(identity, title, HTML) of each section that the report has something for."""
    has = {
        key: any(layer[key] for layer in report["layers"])
        for key in (
            "vocabulary",
            "co_activation",
            "flow",
            "entropy_by_frequency",
            "history",
            "saturation",
            "tokens",
        )
    }
    claims = any(layer["claim"] for layer in report["layers"])
    found = [("load", "Load", _load(report))]
    if len(report["shown_groups"]) > 1:
        found.append(("groups", "Specialisation", _groups(report, claims)))
    if has["vocabulary"] or has["tokens"]:
        found.append(("vocabulary", "Words", _words(has)))
    if has["co_activation"] or has["flow"]:
        found.append(("together", "Experts together", _together(has)))
    if has["entropy_by_frequency"]:
        found.append(("certainty", "Certainty", section(
            "certainty", "How sure the router is",
            "Entropy of the router’s probabilities over the experts: 0 where it knows one expert alone, larger where "
            "it hesitates. A router that has learned single words is surer of frequent ones.",
            figure("frequency", "Mean entropy of tokens whose id occurs so often among the rows."),
        )))  # fmt: skip
    if has["history"] or has["saturation"]:
        found.append(("training", "Training", _training(report, has)))
    if report["texts"]:
        found.append(("texts", "Texts", _texts()))
    found.append(("measures", "Measures", _measures()))
    return found


def _load(report: Report) -> str:
    rows = [
        (
            str(number), escape(layer["router"]), str(layer["n_experts"] - layer["n_null"]),
            number_cell(layer["load_entropy"]), number_cell(layer["max_violation"], 2),
            number_cell(layer["violation_of_batches"], 2), number_cell(layer["route_entropy"], 2),
            number_cell(layer["margin"]),
            share_cell(layer["drop_share"]), number_cell(float(len(layer["dead"])), 0),
            number_cell(float(len(layer["overloaded"])), 0),
        )
        for number, layer in enumerate(report["layers"])
    ]  # fmt: skip
    head = (
        "layer", "router", "experts", "load entropy", "max violation", "of a batch", "route entropy", "margin",
        "dropped", "dead", "overloaded",
    )  # fmt: skip
    return section(
        "load", "Load of the experts",
        "Each cell says how many choices an expert was given, against the mean of its layer: 1 is even, 2 is twice as "
        "many. The darker the more.",
        figure("load", "Choices before capacity, of all tokens."),
        sortable("Layers", head, rows),
    )  # fmt: skip


def _groups(report: Report, claims: bool) -> str:
    content = [
        figure(
            "groups", "A row adds up to 100%; cells are in %. Experts stand by the group that uses them most."
        )
    ]
    if claims:
        rows = []
        for number, layer in enumerate(report["layers"]):
            claim = layer["claim"]
            if claim is None:
                continue
            missed = claim["holds"] and is_unsupported(claim)
            said = escape(claim["words"])
            rows.append((
                str(number), escape(layer["router"]), share_cell(claim["value"], 2),
                f"{format_percent(claim['low'], 2)} to {format_percent(claim['high'], 2)}",
                share_cell(claim["permuted"], 2), share_cell(claim["random"], 2),
                f'<span class="missed">⚠ {said}</span>' if missed else said,
            ))  # fmt: skip
        head = (
            "layer", "router", "information", "95% interval", "groups permuted", "choices drawn", "what it says",
        )  # fmt: skip
        content += [
            figure("claims", "A claim holds where the lower end of its interval lies above both nulls."),
            sortable("Claims of specialisation", head, rows),
        ]
    if report["causes"]:
        content.append(ablation(report))
    return section(
        "groups", "Specialisation by group",
        "What share of a group’s choices each expert answers. The information is how much the expert says of the "
        "group, as a share of all there is to say: 0% where all groups use the experts alike, 100% where the "
        "expert gives the group away. Small samples have some by chance; the two nulls have as much.",
        *content,
    )  # fmt: skip


def _words(has: Mapping[str, bool]) -> str:
    content = []
    if has["vocabulary"]:
        content.append(figure(
            "vocabulary",
            "By word: the share of an id’s tokens that chose the expert, averaged over the expert’s tokens. Common "
            "choices: of two tokens with the same id in different places, and of any two tokens. A router that goes by "
            "the word alone has 100% of the former.",
        ))  # fmt: skip
    if has["tokens"]:
        head = "".join(
            f'<th scope="col"{" class=n" if place in (1, 2) else ""}>{word}</th>'
            for place, word in enumerate(
                (
                    "expert",
                    "load",
                    "by word read",
                    "group that uses it most",
                    "tokens that come to it more than by chance",
                )
            )
        )
        content.append(
            '<div id="words"><div class="bar"><h3>Tokens of each expert</h3><span class="save"></span></div>'
            '<div class="scroll tall">'
            f'<table class="text sortable"><thead><tr>{head}</tr></thead><tbody></tbody></table></div></div>'
        )
    return section("vocabulary", "Words and experts", "Which tokens each expert reads.", *content)


def _together(has: Mapping[str, bool]) -> str:
    content = []
    if has["co_activation"]:
        content.append(
            figure("pairs", "In %: of the tokens of the row’s expert, how many chose the column’s too.")
        )
    if has["flow"]:
        content.append(figure("flow", "Tokens by their heaviest expert in a layer and in the next one."))
    return section("together", "Experts together", "Which experts work on the same tokens.", *content)


def _training(report: Report, has: Mapping[str, bool]) -> str:
    content = []
    if has["history"]:
        content += [figure("history-load_entropy", ""), figure("history-max_violation", "")]
        if any(layer["history"] and layer["history"]["entropy"] for layer in report["layers"]):
            content.append(figure("history-entropy", ""))
    if has["saturation"]:
        content.append(figure("saturation", "Of the same tokens, read again at earlier steps."))
    return section("training", "During training", "How the routing became what it is.", *content)


def _texts() -> str:
    return section(
        "texts", "Texts, token by token",
        "Each token stands over its heaviest expert in the layer, with a colour for every eighth expert; … means that "
        "tokens between were not recorded, · is a part of a character.",
        '<div id="reading"><div class="bar"><h3></h3><span class="save"></span></div><div class="reading"></div>'
        '<pre class="detail" aria-live="polite"></pre></div>',
    )  # fmt: skip


_TERMS = (
    (
        "Load entropy",
        "Entropy of the load over its largest possible value; 1 means that all experts get the same.",
    ),
    (
        "Max violation",
        "(largest load − mean load) / mean load, of all choices; “of a batch”: the mean of single batches.",
    ),
    ("Route entropy", "Entropy of the router’s probabilities for a token, in nats, averaged."),
    ("Margin", "Lead of the largest probability over the second largest, averaged over tokens."),
    ("Dropped", "Share of the choices that found their expert full."),
    ("Dead, overloaded", "Experts below 1% of the mean load, and above twice the mean load."),
    ("Information on the group", "Mutual information of expert and group over the entropy of the groups."),
    (
        "Groups permuted",
        "95th percentile of the same figure with the groups exchanged at random among the texts.",
    ),
    (
        "Choices drawn",
        "95th percentile of the same figure of a router that draws experts with the layer’s load.",
    ),
    (
        "Interval",
        "95% over texts drawn with replacement, freed from the upward bias that the figure has in small samples.",
    ),
)


def _measures() -> str:
    items = "".join(f"<div><dt>{escape(term)}</dt><dd>{escape(words)}</dd></div>" for term, words in _TERMS)
    return section("measures", "Measures", "", f'<dl class="glossary">{items}</dl>')
