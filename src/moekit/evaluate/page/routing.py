"""The sections on the experts of the MoE: how evenly they are used, and which domains they serve."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

from moekit.evaluate.charts import Bars, Drawing, Reference, Series, draw_bars, draw_heat_map, draw_lines
from moekit.evaluate.charts.numbers import format_count, format_number, format_percent, is_number
from moekit.evaluate.charts.theme import escape
from moekit.evaluate.page.blocks import WIDE, facts, figure, grid, section

Report = Mapping[str, Any]
Share = Sequence[Sequence[float | None]]
_PANEL = 256.0


def load_section(report: Report) -> str:
    """Load of each expert in each layer around the even share, and the balance figures."""
    balance = report["balance"]
    if not balance or not balance["layers"]:
        return ""
    layers = balance["layers"]
    highest = max(
        [load for layer in layers for load in layer["load"] if is_number(load)]
        + [1.15 / max(1, len(layer["load"])) for layer in layers]
    )

    few = len(layers) <= 2
    panel_width = WIDE if few else _PANEL

    def panel(layer: Mapping[str, Any]) -> str:
        return figure(lambda width: _draw_load(layer, highest, width), wide=panel_width)

    n_experts = sum(len(layer["load"]) for layer in layers)
    dead = balance["dead_experts"]
    figures = [
        ("max violation", format_number(balance["max_violation"], 3)),
        ("load entropy (1 is even)", format_number(balance["load_entropy"], 3)),
        ("dead experts", f"{format_count(dead)} of {n_experts}" if is_number(dead) else "–"),
        ("dropped tokens", format_percent(balance["dropped_share"])),
    ]
    intro = (
        "Each bar is the share of routed tokens that an expert received on the validation text; the dashed "
        "line is the even share. Max violation says by how much the busiest expert lies above the mean: 0 is "
        "perfect, 0.10 means 10% more."
    )
    if any(is_fixed(layer) for layer in layers):
        intro += (
            " A hash router sends each token id to experts of its own, decided before training; frequent tokens "
            "therefore load theirs more, and nothing evens that."
        )
    history = [point for point in balance.get("history") or [] if is_number(point["max_violation"])]
    course = ""
    if len(history) > 1:
        course = figure(lambda width: _draw_history(history, width), wide=760.0)
    return section(
        "load",
        "Load of the experts",
        intro,
        facts(figures),
        grid([panel(layer) for layer in layers], "two" if few else "four"),
        course,
    )


def layer_name(layer: Mapping[str, Any]) -> str:
    """The number of a layer and, where the report says it, the rule of its router.

    >>> layer_name({"layer": 0, "router": "hash"}), layer_name({"layer": 1})
    ('Layer 0, hash', 'Layer 1')
    """
    return f"Layer {layer['layer']}" + (f", {layer['router']}" if layer.get("router") else "")


def is_fixed(layer: Mapping[str, Any]) -> bool:
    """Whether the layer's router learns nothing: what its experts serve was decided before training."""
    return layer.get("router") in ("hash", "random")


def _draw_load(layer: Mapping[str, Any], highest: float, width: float) -> Drawing:
    load, violation = layer["load"], format_number(layer["max_violation"], 3)
    even = 1 / max(1, len(load))
    return draw_bars(
        [str(index) for index in range(len(load))],
        [Bars("", [None if value is None else value * 100 for value in load], "s1")],
        title=f"Load per expert, {layer_name(layer).lower()}",
        description=f"The even share is {even:.1%}; max violation {violation}.",
        heading=layer_name(layer),
        subheading=f"max violation {violation}",
        x_label="expert",
        width=width,
        height=176,
        y_max=highest * 100,
        y_format=lambda value: f"{value:g}%",
        value_format=lambda value: f"{value:.2f}%",
        reference=Reference(even * 100, ""),
        show_values=False,
    )


def _draw_history(history: Sequence[Mapping[str, Any]], width: float) -> Drawing:
    positive = all(point["max_violation"] > 0 for point in history)
    line = Series("MoE", [p["step"] for p in history], [p["max_violation"] for p in history], colour="s1")
    return draw_lines(
        [line],
        title="Max violation during training",
        heading="Max violation during training",
        x_label="training step",
        y_label="log scale" if positive else "",
        width=width,
        height=200,
        x_limits=(0.0, None),
        y_limits=None if positive else (0.0, None),
        y_log=positive,
        value_format=lambda value: format_number(value, 3),
        labels="none",
    )


def expert_order(share: Share) -> list[int]:
    """Experts sorted by the domain that uses them most, the most one-sided first within each domain.

    >>> expert_order([[0.1, 0.9], [0.8, 0.2]])
    [1, 0]
    """

    def place(expert: int) -> tuple[int, float]:
        column = [row[expert] or 0.0 for row in share]
        total = sum(column) or 1.0
        favourite = max(range(len(column)), key=column.__getitem__)
        return favourite, -column[favourite] / total

    return sorted(range(len(share[0]) if share else 0), key=place)


def overlap(share: Share) -> float | None:
    """Mean of Σ min(p, q) over all pairs of domains: 1 if they use experts alike, 0 if they share none."""
    pairs = [
        sum(min(p or 0.0, q or 0.0) for p, q in zip(first, second, strict=True))
        for first, second in combinations(share, 2)
    ]
    return sum(pairs) / len(pairs) if pairs else None


def full_colour(layers: Sequence[Mapping[str, Any]]) -> float:
    """The share drawn in full colour: the largest, or three times the even share if none is as large.

    So an even map is pale, and what stands out in it really does.
    """
    rows = [row for layer in layers for row in layer["share"]]
    shares = [value for row in rows for value in row if is_number(value)]
    return max([*shares, *(3 / len(row) for row in rows if row)], default=1.0)


def experts_section(report: Report) -> str:
    """A heat map per layer: which experts serve which domain."""
    table = report["experts_by_domain"]
    if not table or not table["layers"] or not table["domains"]:
        return ""
    highest = full_colour(table["layers"])
    maps = [
        figure(lambda width, layer=layer: draw_experts(table["domains"], layer, highest, width))  # type: ignore[misc]
        for layer in table["layers"]
    ]
    n_experts = len(table["layers"][0]["share"][0])
    intro = (
        "How to read it: each row is a domain, each column an expert; a cell says what percentage of that "
        "domain’s routed tokens the expert received, so a row adds up to 100. If the router did not tell the "
        f"domains apart, the rows would look alike, with about {100 / max(1, n_experts):.1f} in every cell. "
        "Cells that stand out in one row only are experts that serve that domain. Columns are ordered by the "
        "domain that uses the expert most."
    )
    if any(is_fixed(layer) for layer in table["layers"]):
        intro += (
            " In a layer with a hash router the differences are those of the domains’ words; in the others they were "
            "learned."
        )
    return section("experts", "Experts by domain", intro, f"<p>{_example(table)}</p>", grid(maps))


def _example(table: Mapping[str, Any]) -> str:
    """The most one-sided expert of all layers, in words."""
    best: tuple[float, str] = (0.0, "")
    for layer in [layer for layer in table["layers"] if not is_fixed(layer)] or table["layers"]:
        rows = [[value or 0.0 for value in row] for row in layer["share"]]
        for expert in range(len(rows[0]) if rows else 0):
            column = [row[expert] for row in rows]
            high, low = max(column), min(column)
            if high - low > best[0]:
                most, least = (table["domains"][column.index(value)] for value in (high, low))
                text = (
                    f"The most one-sided: expert {expert} of layer {layer['layer']} receives "
                    f"{format_percent(high)} of the routed tokens of {most} and {format_percent(low)} of "
                    f"those of {least}."
                )
                best = (high - low, text)
    return escape(best[1] or "All domains use the experts alike.")


def draw_experts(
    domains: Sequence[str],
    layer: Mapping[str, Any],
    highest: float,
    width: float,
    *,
    transposed: bool = False,
    heading: str | None = None,
    cell_height: float = 30,
) -> Drawing:
    """The heat map of one layer, domains down and experts across, or the other way round."""
    share: Share = layer["share"]
    order = expert_order(share)
    values = [[None if row[e] is None else (row[e] or 0.0) * 100 for e in order] for row in share]
    experts = [str(expert) for expert in order]
    shared = overlap(share)
    common = f"domains share {format_percent(shared, 0)} of routing" if shared is not None else ""
    options: dict[str, Any] = {
        "title": f"Experts by domain, {layer_name(layer).lower()}",
        "description": f"Percentage of each domain's routed tokens per expert; {common}.",
        "heading": heading or layer_name(layer),
        "width": width,
        "high": highest * 100,
        "value_format": lambda value: f"{value:.0f}",
        "tip_format": lambda value: f"{value:.1f}%",
        "key_label": "%" if transposed else "% of the domain’s routed tokens",
    }
    if transposed:
        columns = [list(column) for column in zip(*values, strict=True)]
        return draw_heat_map(
            columns,
            experts,
            list(domains),
            y_label="expert",
            row_tip="expert",
            note="% of each domain’s routed tokens",
            cell_height=cell_height,
            **options,
        )
    return draw_heat_map(
        values, list(domains), experts, x_label="expert", column_tip="expert", cell_height=cell_height,
        subheading=common, **options,
    )  # fmt: skip
