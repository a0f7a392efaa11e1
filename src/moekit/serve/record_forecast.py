"""What a routing record says of experts in memory: which are used most, and what share a cache would hold.

Shape legend: N tokens with a row of their own, K choices, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from moekit.config.errors import require
from moekit.observe.record import RoutingRecord
from moekit.serve.eviction import POLICIES, belady_hits, hits_of, make_policy
from moekit.serve.expert_store import ExpertKey
from moekit.serve.memory_plan import MemoryPlan


def uses_of(record: RoutingRecord, n_experts: Sequence[int]) -> dict[ExpertKey, float]:
    """How often each expert was used. `n_experts` are those of the model's sparse layers.

    Errors: `ConfigError` for the record of another model.
    """
    layers = [layer.n_experts - layer.n_null_experts for layer in record.layers]
    require(layers == list(n_experts), "record", layers,
            f"must be of a model with these experts in its layers: {list(n_experts)}")  # fmt: skip
    uses: dict[ExpertKey, float] = {}
    for layer, n in enumerate(n_experts):
        counts = record.counts(layer)[:n]
        uses |= {(layer, expert): float(count) for expert, count in enumerate(counts) if count}
    return uses


def tokens_in_order(record: RoutingRecord) -> list[list[tuple[ExpertKey, ...]]]:
    """For each token, text by text, what each layer needed: a trace of generating these texts token by token."""
    if record.n_token_rows == 0:
        return []
    order = np.lexsort((record.arrays["token/position"], record.arrays["token/text"]))
    experts = [record.of(layer, "token/experts")[order] for layer in range(len(record.layers))]
    real = [layer.n_experts - layer.n_null_experts for layer in record.layers]
    return [
        [
            tuple((layer, int(expert)) for expert in of_layer[token] if 0 <= expert < real[layer])
            for layer, of_layer in enumerate(experts)
        ]
        for token in range(len(order))
    ]


def forecast(record: RoutingRecord, plan: MemoryPlan) -> dict[str, Any]:
    """Hit rates to be expected on text like that of the record, token by token and without reading ahead; JSON-ready.

    By policy where the record has tokens with rows of their own ("belady" is the bound of all of them), and
    "most_used": the share of uses that fell to the experts of which the slots hold as many, were they never changed.
    """
    sizes = [layer.n_experts - layer.n_null_experts for layer in record.layers]
    uses, tokens = uses_of(record, sizes), tokens_in_order(record)
    hits: dict[str, float] = dict.fromkeys((*POLICIES, "belady", "most_used"), 0.0)
    needed = 0
    all_uses = sum(uses.values())
    for form in plan.forms:
        counts = sorted((count for key, count in uses.items() if key[0] in form.layers), reverse=True)
        hits["most_used"] += sum(counts[: form.slots])
        trace = [group for token in tokens for group in token if group and group[0][0] in form.layers]
        for name in POLICIES:
            rule = make_policy(name, form.top_k * len(form.layers))
            hits[name] += hits_of(trace, form.slots, rule)[0]
        found, n = belady_hits(trace, form.slots)
        hits["belady"] += found
        needed += n
    rates = {name: hits[name] / needed for name in (*POLICIES, "belady")} if needed else {}
    if all_uses:
        rates["most_used"] = hits["most_used"] / all_uses
    return {"tokens": record.n_tokens, "tokens_in_order": len(tokens), "hit_rate": rates}
