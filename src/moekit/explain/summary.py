"""A routing record made small: the figures of every layer, what they say, and some texts token by token.

The report is JSON-ready and its size depends on layers, experts and groups, not on tokens: where the record has more
rows of tokens than `ROWS`, what needs single tokens is worked out from rows that lie evenly in it.

| key | what |
| --- | --- |
| `version`, `moekit_version`, `created` | of this schema, of moekit, date and time |
| `title`, `source`, `info` | name of the run or record, where the record comes from, what else it says |
| `groups`, `group_tokens` | names of the groups of tokens, and how many tokens each has |
| `shown_groups` | names of the rows of `shares`: the groups, the smaller ones of very many put together |
| `n_tokens`, `n_layers`, `n_experts` | tokens that counted, sparse layers, experts of all layers, null ones left out |
| `sampling` | `rows` in the record, `used` of them, `texts` of the claims, `seed`, `words`: the same as a sentence |
| `verdict`, `details` | the result in a sentence, and sentences that qualify it |
| `alarms` | list: `kind` ("dead", "overloaded", "collapsed", "dropped"), `layer`, `experts`, `words`, `remedy` |
| `layers` | list, see below |
| `texts` | list, see `moekit.explain.summary_tokens.sample_texts` |
| `causes` | list of `moekit.explain.specialists.Verdict` as mappings; null where no expert was switched off |

Of a layer (null where the record lacks what it needs):

| key | what |
| --- | --- |
| `name`, `router`, `n_experts`, `n_null`, `labels` | as in the record; E experts with null ones, a label for each |
| `load`, `load_entropy`, `max_violation` | of the choices before capacity; `[E]` shares, and see `measures` |
| `violation_of_batches` | mean max violation of single batches |
| `dead`, `overloaded` | experts below 1 % of the mean load, and above twice the mean |
| `route_entropy`, `route_entropy_share`, `margin` | mean of tokens: nats, over log E, lead of the best probability |
| `drop_share` | share of the choices that found their expert full |
| `shares` | `[G, E]` share of the choices of each of `shown_groups` |
| `claim` | specialisation by group: `value`, `low`, `high`, `permuted`, `random`, `holds`, `ablation`, `words` |
| `vocabulary` | mean vocabulary specialisation by `input`, `target`, `predicted` ids, and `of_experts` `[E]` of each |
| `stability` | `same`, `any`: common choices of tokens of one id, and of any two |
| `entropy_by_frequency` | list of [least, most occurrences, mean entropy] |
| `co_activation` | `experts` shown (the most used), `share` of the row's tokens that chose the column's too |
| `flow` | `links` [from, to, tokens], the largest; `covered` share of all `total` tokens; last layer: null |
| `history` | `step`, `load_entropy`, `max_violation`, `entropy` |
| `saturation` | `step`, `share` of the last choices that were made already at that step |
| `tokens` | for each expert a list of [text, its tokens here, share of the id's tokens] |
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from typing import Any

import numpy as np

from moekit import __version__
from moekit.config.atomic import json_ready
from moekit.data.tokenizer import Tokenizer
from moekit.explain import measures
from moekit.explain.nulls import specialisation_claim
from moekit.explain.specialists import Verdict
from moekit.explain.summary_tokens import characteristic_tokens, sample_texts, saturation_by_step
from moekit.explain.verdict import ablation_of, alarms_of, claim_in_words, details_of, verdict_of
from moekit.observe.record import RoutingRecord

VERSION = 2
ROWS = 50_000
ROUNDS = 100
# at most: texts in a claim, experts in a square of pairs, links of a flow, moments of a history, groups
TEXTS, SQUARE, LINKS, MOMENTS, GROUPS = 1000, 64, 120, 200, 24
# ids of all experts of all layers together
IDS = 30_000


def summarise(
    record: RoutingRecord, *, tokenizer: Tokenizer | None = None, samples: RoutingRecord | None = None,
    verdicts: Sequence[Verdict] | None = None, title: str = "", seed: int = 0,
) -> dict[str, Any]:  # fmt: skip
    """The report of a record, by the schema above.

    Args:
        record: of at least one sparse layer.
        tokenizer: says what ids stand for; without one they are shown as numbers.
        samples: a record of the same layers whose texts are shown token by token; those of `record` by default, in
            which tokens may be missing.
        verdicts: what `CausalCheck` found; None where no expert was switched off.
        title: of the run.
        seed: of samples and nulls.
    """
    rows, texts = _rows(record, seed)
    layers = [
        _layer(record, number, rows, texts, tokenizer, verdicts, seed) for number in range(len(record.layers))
    ]
    report: dict[str, Any] = {
        "version": VERSION, "moekit_version": __version__,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "title": title or str(record.info.get("run", "")), "source": record.source, "info": dict(record.info),
        "groups": list(record.groups), "group_tokens": record.arrays["tokens"].tolist(),
        "shown_groups": _shown_groups(record)[0], "n_tokens": record.n_tokens, "n_layers": len(layers),
        "n_experts": sum(one.n_experts - one.n_null_experts for one in record.layers),
        "sampling": {
            "rows": record.n_token_rows, "used": len(rows), "texts": len(np.unique(_ids(record, texts, "text"))),
            "seed": seed,
        },
        "layers": layers,
        "texts": sample_texts(samples if samples is not None else record, tokenizer, seed=seed),
        "causes": None if verdicts is None else [asdict(one) for one in verdicts],
    }  # fmt: skip
    report["sampling"]["words"] = _sampling_in_words(report)
    report["alarms"] = alarms_of(report)
    report["verdict"], report["details"] = verdict_of(report), details_of(report)
    ready: dict[str, Any] = json_ready(_rounded(report))
    return ready


def _rows(record: RoutingRecord, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Numbers of the rows that measures of tokens use, and of those of them that claims over texts use.

    Of several moments of training only the last one: earlier routes are those of another model.
    """
    n = record.n_token_rows
    if n == 0:
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    rows = np.arange(n)
    steps = record.arrays.get("token/step")
    if steps is not None and record.source == "training":
        rows = np.flatnonzero(steps == steps.max())
    rng = np.random.Generator(np.random.PCG64(seed))
    rows = evenly(rows, ROWS, rng)
    text = record.arrays["token/text"][rows]
    known = np.unique(text)
    return rows, rows[np.isin(text, evenly(known, TEXTS, rng))]


def evenly(items: np.ndarray, most: int, rng: np.random.Generator) -> np.ndarray:
    """`most` of the items, one drawn from each of as many equal stretches; all where there are no more.

    >>> evenly(np.arange(10), 5, np.random.Generator(np.random.PCG64(0))).size
    5
    """
    if len(items) <= most:
        return items
    edges = np.linspace(0, len(items), most + 1)
    return np.asarray(items[(edges[:-1] + rng.random(most) * np.diff(edges)).astype(np.int64)])


def _shown_groups(record: RoutingRecord) -> tuple[list[str], np.ndarray]:
    """Names of the groups that are shown, and the place of each group `[G]` among them."""
    tokens = record.arrays["tokens"]
    if len(tokens) <= GROUPS:
        return list(record.groups), np.arange(len(tokens))
    kept = np.sort(np.argsort(-tokens, kind="stable")[: GROUPS - 1])
    place = np.full(len(tokens), GROUPS - 1)
    place[kept] = np.arange(len(kept))
    return [*(record.groups[group] for group in kept), f"{len(tokens) - len(kept)} smaller groups"], place


def _ids(record: RoutingRecord, rows: np.ndarray, name: str) -> np.ndarray:
    return record.arrays[f"token/{name}"][rows] if len(rows) else np.zeros(0, np.int64)


def _layer(
    record: RoutingRecord, number: int, rows: np.ndarray, texts: np.ndarray, tokenizer: Tokenizer | None,
    verdicts: Sequence[Verdict] | None, seed: int,
) -> dict[str, Any]:  # fmt: skip
    info = record.layers[number]
    real = info.n_experts - info.n_null_experts
    requested, counts = record.of(number, "requested"), record.of(number, "counts")
    shown = np.zeros((len(_shown_groups(record)[0]), info.n_experts), dtype=np.int64)
    np.add.at(shown, _shown_groups(record)[1], counts)
    asked = requested[:real]  # null experts are not meant to have the load of the others
    found: dict[str, Any] = {
        "name": info.name, "router": info.router, "n_experts": info.n_experts, "n_null": info.n_null_experts,
        "labels": [info.label(expert) for expert in range(info.n_experts)],
        "load": measures.load(requested), "load_entropy": measures.load_entropy(asked),
        "max_violation": measures.max_violation(asked), "violation_of_batches": None,
        "dead": measures.dead_experts(asked) if asked.sum() else [],
        "overloaded": measures.overloaded_experts(asked) if asked.sum() else [],
        "route_entropy": None, "route_entropy_share": None, "margin": None,
        "drop_share": float(record.of(number, "dropped")[0] / max(requested.sum(), 1)) if record.has(number, "dropped")
        else None,
        "shares": measures.group_shares(shown),
        "claim": None, "vocabulary": None, "stability": None, "entropy_by_frequency": None, "co_activation": None,
        "flow": None, "history": _history(record, number, real), "saturation": saturation_by_step(record, number),
        "tokens": None,
    }  # fmt: skip
    if record.has(number, "violation") and record.of(number, "violation")[1] > 0:
        total, batches = record.of(number, "violation")
        found["violation_of_batches"] = total / batches
    if record.has(number, "entropy"):
        tokens = max(record.n_tokens, 1)
        found["route_entropy"] = record.of(number, "entropy").sum() / tokens
        found["margin"] = record.of(number, "margin").sum() / tokens
        if info.n_experts > 1:
            found["route_entropy_share"] = found["route_entropy"] / np.log(info.n_experts)
    if record.has(number, "pairs"):
        found["co_activation"] = _co_activation(record.of(number, "pairs"))
    if record.has(number, "flow"):
        found["flow"] = _flow(record.of(number, "flow"))
    if len(rows) and record.has(number, "token/experts"):
        found |= _of_tokens(record, number, rows, texts, tokenizer, seed)
    if found["claim"] is not None:
        found["claim"]["ablation"] = ablation_of(verdicts, number)
        found["claim"]["words"] = claim_in_words(found["claim"])
    return found


def _of_tokens(
    record: RoutingRecord, number: int, rows: np.ndarray, texts: np.ndarray, tokenizer: Tokenizer | None, seed: int
) -> dict[str, Any]:  # fmt: skip
    """What needs the choices of single tokens."""
    n_experts, n_groups = record.layers[number].n_experts, len(record.groups)
    experts, ids = record.of(number, "token/experts")[rows], _ids(record, rows, "id")
    found: dict[str, Any] = {}
    if n_groups > 1 and len(np.unique(_ids(record, texts, "group"))) > 1:
        claim = specialisation_claim(
            record.of(number, "token/experts")[texts], _ids(record, texts, "group").astype(np.int64),
            _ids(record, texts, "text"), n_experts, n_groups, rounds=ROUNDS, seed=seed,
        )  # fmt: skip
        found["claim"] = {**asdict(claim), "holds": claim.holds}
    of_experts = {
        name: measures.vocabulary_specialisation(experts, _ids(record, rows, array), n_experts)
        for name, array in (("input", "id"), ("target", "target"), ("predicted", "predicted"))
    }
    if any(np.isfinite(each).any() for each in of_experts.values()):
        found["vocabulary"] = {
            **{name: float(np.nanmean(each)) if np.isfinite(each).any() else None for name, each in of_experts.items()},
            "of_experts": of_experts,
        }  # fmt: skip
    same, anyone = measures.route_stability(experts, ids, n_experts, seed=seed)
    if np.isfinite(same):
        found["stability"] = {"same": same, "any": anyone}
    if record.has(number, "token/entropy"):
        by = measures.entropy_by_frequency(record.of(number, "token/entropy")[rows], ids)
        found["entropy_by_frequency"] = [list(one) for one in by] or None
    most = max(3, min(12, IDS // sum(one.n_experts for one in record.layers)))
    found["tokens"] = characteristic_tokens(experts, ids, n_experts, tokenizer, most=most)
    return found


def _co_activation(pairs: np.ndarray) -> dict[str, Any] | None:
    """The most used experts against each other; None where no token has two choices."""
    used = np.diag(pairs)
    if pairs.sum() <= used.sum():
        return None
    shown = np.sort(np.argsort(-used, kind="stable")[:SQUARE])
    return {"experts": shown.tolist(), "share": measures.co_activation(pairs)[np.ix_(shown, shown)].round(3)}


def _flow(flow: np.ndarray) -> dict[str, Any] | None:
    """The largest flows between the heaviest experts of a layer and of the next."""
    total = int(flow.sum())
    if total == 0:
        return None
    largest = np.argsort(-flow, axis=None, kind="stable")[:LINKS]
    links = [
        [int(place // flow.shape[1]), int(place % flow.shape[1]), int(flow.flat[place])]
        for place in largest
        if flow.flat[place] > 0
    ]
    return {"links": links, "total": total, "covered": sum(count for _, _, count in links) / total}


def _history(record: RoutingRecord, number: int, real: int) -> dict[str, Any] | None:
    if not record.has(number, "history") or len(record.of(number, "history")) == 0:
        return None
    steps, loads = record.arrays["history/step"], record.of(number, "history")[:, :real]
    shown = np.unique(np.linspace(0, len(steps) - 1, min(MOMENTS, len(steps))).round().astype(np.int64))
    entropy = (
        record.of(number, "history_entropy")[shown].tolist()
        if record.has(number, "history_entropy")
        else None
    )
    return {
        "step": steps[shown].tolist(),
        "load_entropy": [measures.load_entropy(loads[moment]) for moment in shown],
        "max_violation": [measures.max_violation(loads[moment]) for moment in shown],
        "entropy": entropy,
    }


def _sampling_in_words(report: dict[str, Any]) -> str:
    said = report["sampling"]
    if not said["rows"]:
        return "The record has no rows of single tokens: it shows sums alone."
    of = "all" if said["used"] == said["rows"] else f"{said['used']:,} of"
    even = "" if said["used"] == said["rows"] else f", which lie evenly in the record (seed {said['seed']})"
    return (
        f"Loads and shares count all {report['n_tokens']:,} tokens. What needs single tokens was worked out from {of} "
        f"{said['rows']:,} rows of tokens{even}; claims of specialisation from {said['texts']:,} texts."
    )


def _rounded(value: Any) -> Any:
    """Five significant digits: more of them nobody reads, and the page would be twice as large."""
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, np.ndarray):
        return _rounded(value.tolist())
    if isinstance(value, list | tuple):
        return [_rounded(item) for item in value]
    if isinstance(value, bool | np.bool_):
        return bool(value)
    if isinstance(value, float | np.floating):
        return float(f"{float(value):.5g}")
    return int(value) if isinstance(value, np.integer) else value
