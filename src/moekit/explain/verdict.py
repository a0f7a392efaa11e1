"""What a report's figures say, in words: the result, alarms with what to do about them, claims and their causes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from moekit.explain.rulings import CONTRARY, SUPPORTED

if TYPE_CHECKING:  # it needs torch, which a page that is only read does without
    from moekit.explain.specialists import Verdict

# routers whose choices nothing trains
FIXED = ("hash", "random")
COLLAPSED_ENTROPY, MUCH_DROPPED = 0.6, 0.05
UNSUPPORTED = "not supported by ablation"
# what stands in the place of experts that are switched off
PLACES = {
    "nothing": "with nothing in their place",
    "next": "with the next best",
    "share": "with their weight given away",
}


def layer_in_words(report: Mapping[str, Any], number: int) -> str:
    """As in "layer 1 (softmax)"."""
    return f"layer {number} ({report['layers'][number]['router']})"


def alarms_of(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What is wrong with the routing, each with what to do about it."""
    found = []
    more = "Turn up model.moe.balance"
    if report["source"] == "foreign":
        more = "Train with more weight on its balance loss (router_aux_loss_coef in most families)"
    for number, layer in enumerate(report["layers"]):
        where, fixed = layer_in_words(report, number), layer["router"] in FIXED
        top = {max(range(len(row)), key=list(row).__getitem__) for row in layer["shares"] if sum(row) > 0}
        if layer["load_entropy"] < COLLAPSED_ENTROPY and len(top) == 1 and layer["n_experts"] > 1:
            found.append(_alarm(
                "collapsed", number, sorted(top),
                f"{where} has collapsed: its load entropy is {layer['load_entropy']:.2f} of 1, and expert "
                f"{layer['labels'][min(top)]} is the first of every group.",
                "Hash and random routers spread ids, not tokens: take a learned router for text with few ids." if fixed
                else "Train with a stronger balance (model.moe.balance), a lower learning rate at the start, or "
                "another router; moekit league compares them.",
            ))  # fmt: skip
        if layer["dead"]:
            found.append(_alarm(
                "dead", number, layer["dead"],
                f"{where}: {_experts(layer, layer['dead'])} {'has' if len(layer['dead']) == 1 else 'have'} less than "
                "1% of the mean load.",
                "Their ids do not occur in this text. Measure on text of all domains before you remove them." if fixed
                else f"{more} and train on, or remove them: moekit compress prune.",
            ))  # fmt: skip
        if layer["overloaded"]:
            found.append(_alarm(
                "overloaded", number, layer["overloaded"],
                f"{where}: {_experts(layer, layer['overloaded'])} {'has' if len(layer['overloaded']) == 1 else 'have'} "
                "more than twice the mean load.",
                "A frequent id lies there, which nothing evens: a learned router with a balance would." if fixed
                else f"{more}; on several devices the busiest expert sets the time of a step.",
            ))  # fmt: skip
        if layer["drop_share"] and layer["drop_share"] > MUCH_DROPPED:
            found.append(_alarm(
                "dropped", number, [],
                f"{where} drops {layer['drop_share']:.1%} of its choices: their experts were full.",
                "Set model.moe.capacity_factor to null, which drops nothing, or raise it.",
            ))  # fmt: skip
    order = ("collapsed", "dead", "overloaded", "dropped")
    return sorted(found, key=lambda alarm: order.index(alarm["kind"]))


def _alarm(kind: str, layer: int, experts: Sequence[int], words: str, remedy: str) -> dict[str, Any]:
    return {
        "kind": kind, "layer": layer, "experts": list(experts), "words": words[0].upper() + words[1:], "remedy": remedy
    }  # fmt: skip


def _experts(layer: Mapping[str, Any], numbers: Sequence[int], most: int = 8) -> str:
    names = ", ".join(layer["labels"][number] for number in numbers[:most])
    more = f" and {len(numbers) - most} more" if len(numbers) > most else ""
    return f"{'expert' if len(numbers) == 1 else 'experts'} {names}{more}"


def ablation_of(verdicts: Sequence[Verdict] | None, layer: int) -> list[dict[str, Any]] | None:
    """For each way of switching off, `instead`: groups that were `tested`, `supported` and `contrary`."""
    mine = [one for one in verdicts or () if one.layer == layer]
    return [
        {
            "instead": instead,
            "tested": sum(one.instead == instead for one in mine),
            "supported": sum(one.supported for one in mine if one.instead == instead),
            "contrary": sum(one.contrary for one in mine if one.instead == instead),
        }
        for instead in dict.fromkeys(one.instead for one in mine)
    ] or None


def is_unsupported(claim: Mapping[str, Any]) -> bool:
    """Whether experts were switched off and no group missed its own as it should, in whichever way."""
    return claim["ablation"] is not None and not any(way["supported"] for way in claim["ablation"])


def claim_in_words(claim: Mapping[str, Any]) -> str:
    """Whether the layer's experts tell the groups apart, and whether switching them off shows it too."""
    if not claim["holds"]:
        return "not above chance"
    if claim["ablation"] is None:
        return "above both nulls; not tested by ablation"
    contrary = max(way["contrary"] for way in claim["ablation"])
    against = f"; contrary for {contrary} of {claim['ablation'][0]['tested']} groups" if contrary else ""
    if is_unsupported(claim):
        return UNSUPPORTED + against
    parts = [
        f"{way['supported']} of {way['tested']} groups {PLACES[way['instead']]}" for way in claim["ablation"]
    ]
    return f"above both nulls, supported by ablation for {', '.join(parts)}{against}"


def verdict_of(report: Mapping[str, Any]) -> str:
    """One sentence on balance and one on specialisation."""
    layers, n = report["layers"], report["n_layers"]
    kinds = {alarm["kind"] for alarm in report["alarms"]}
    if "collapsed" in kinds:
        number = len({alarm["layer"] for alarm in report["alarms"] if alarm["kind"] == "collapsed"})
        balance = f"Routing has collapsed in {number} of {_layers(n)}"
    elif kinds & {"dead", "overloaded"}:
        dead = sum(len(layer["dead"]) for layer in layers)
        over = sum(len(layer["overloaded"]) for layer in layers)
        parts = [f"{dead} dead" if dead else "", f"{over} overloaded" if over else ""]
        balance = f"{' and '.join(filter(None, parts))} of {report['n_experts']} experts"
    else:
        balance = "Experts share the load without any dead or overloaded"
    claims = [layer["claim"] for layer in layers if layer["claim"] is not None]
    if not claims:
        return f"{balance}."
    held = sum(claim["holds"] for claim in claims)
    if held == 0:
        return f"{balance}; no layer tells the groups apart better than chance."
    missed = sum(claim["holds"] and is_unsupported(claim) for claim in claims)
    text = f"{balance}; {held} of {_layers(len(claims))} {'tells' if held == 1 else 'tell'} the groups apart"
    text += f", {missed} of them {UNSUPPORTED}" if missed else ""
    tested = report["causes"] or ()
    if tested:
        first = tested[0]["instead"]
        mine = [one["ruling"] for one in tested if one["instead"] == first]
        contrary = f", {mine.count(CONTRARY)} contrary" if CONTRARY in mine else ""
        held = mine.count(SUPPORTED)
        text += f". Ablation supports {held} of {len(mine)} groups’ own experts {PLACES[first]}{contrary}"
    return f"{text}."


def _layers(number: int) -> str:
    return f"{number} sparse {'layer' if number == 1 else 'layers'}"


def details_of(report: Mapping[str, Any]) -> list[str]:
    """Sentences that qualify the verdict."""
    found = []
    if any(layer["claim"] is not None for layer in report["layers"]):
        asked = report["causes"] is not None
        found.append(
            "Experts that were switched off show what is cause: see “Specialisation”." if asked else
            "That an expert is asked by one group more than by others is a correlation, not yet a cause."
            if report["source"] == "foreign" else
            "That an expert is asked by one group more than by others is a correlation; moekit explain RUN --causes "
            "switches experts off and measures what the groups miss."
        )  # fmt: skip
    fixed = [str(n) for n, layer in enumerate(report["layers"]) if layer["router"] in FIXED]
    if fixed:
        found.append(
            f"The routes of layer{'s' if len(fixed) > 1 else ''} {', '.join(fixed)} were decided before training: what "
            "their experts serve are the groups’ words."
        )
    return found
