"""What a report says of single tokens: the ids that belong to experts, texts token by token, routes that settled.

Shape legend: N tokens with a row of their own, K choices, E experts, V ids that occur.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from moekit.data.tokenizer import Tokenizer
from moekit.explain.measures import chosen_by, counts_by, saturation
from moekit.observe.record import RoutingRecord

TEXTS, LENGTH = 24, 160
# numbers that all texts together may have: experts, weights, entropies, margins of each token and layer
NUMBERS = 240_000
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


def characteristic_tokens(
    experts: np.ndarray, ids: np.ndarray, n_experts: int, tokenizer: Tokenizer | None = None,
    *, most: int = 12, least: int = 4, score: float = 3.0,
) -> list[list[list[Any]]]:  # fmt: skip
    """For each expert the ids that come to it more often than its load would have it: [text, tokens, share of the id].

    They are ordered by z = (n - N p) / sqrt(N p (1 - p)), where the id has N tokens, n of them chose the expert, and a
    share p of all tokens did.

    Args:
        experts: `[N, K]`. ids: `[N]`, below 0 where unknown. n_experts: E.
        tokenizer: without one, ids are shown as numbers.
        most: ids of an expert. least: ids with fewer tokens are left out. score: and those with a smaller z.

    >>> choices = np.array([[0]] * 9 + [[1]] * 9)
    >>> characteristic_tokens(choices, np.array([7] * 9 + [8] * 9), 2, least=4, score=2.0)
    [[['7', 9, 1.0]], [['8', 9, 1.0]]]
    """
    kept = ids >= 0
    experts, ids = experts[kept], ids[kept]
    if len(ids) == 0:
        return [[] for _ in range(n_experts)]
    known, place, occurs = np.unique(ids, return_inverse=True, return_counts=True)
    chosen = chosen_by(experts, n_experts)
    table = counts_by(place, len(known), chosen)
    often = occurs >= least
    known, table, occurs = known[often], table[often], occurs[often]
    p = chosen.mean(axis=0, dtype=np.float64)
    spread = np.sqrt(np.maximum(occurs[:, None] * p * (1 - p), 1e-12))
    z = (table - occurs[:, None] * p) / spread
    found = []
    for expert in range(n_experts):
        order = np.argsort(-z[:, expert], kind="stable")[:most]
        found.append([
            [shown(int(known[row]), tokenizer), int(table[row, expert]), float(table[row, expert] / occurs[row])]
            for row in order if z[row, expert] >= score
        ])  # fmt: skip
    return found


def shown(token: int, tokenizer: Tokenizer | None) -> str:
    """The text of an id; its number where there is no tokenizer, and beside what is a part of a character."""
    if tokenizer is None or not 0 <= token < tokenizer.vocab_size:
        return str(token)
    text = tokenizer.decode([token])
    return f"{text} #{token}" if REPLACEMENT in text or not text else text


def pieces(ids: list[int], tokenizer: Tokenizer | None, breaks: list[bool]) -> list[str]:
    """The text of each token of a sequence; a character that several make stands at the last of them, before it "".

    Args: ids; tokenizer; breaks: whether tokens are missing before this one.
    """
    if tokenizer is None:
        return [str(token) for token in ids]
    found: list[str] = []
    open_ids: list[int] = []
    for place, token in enumerate(ids):
        if breaks[place] and open_ids:
            open_ids = []
            found[-1] = found[-1] or REPLACEMENT
        if not 0 <= token < tokenizer.vocab_size:
            found.append("?")
            continue
        open_ids.append(token)
        text = tokenizer.decode(open_ids)
        if text.endswith(REPLACEMENT) and len(open_ids) < 4 and place + 1 < len(ids):
            found.append("")
            continue
        found.append(text)
        open_ids = []
    return found


def sample_texts(
    record: RoutingRecord, tokenizer: Tokenizer | None = None, *, texts: int = TEXTS, length: int = LENGTH,
    seed: int = 0,
) -> list[dict[str, Any]]:  # fmt: skip
    """Some texts with every choice: as many of each group, drawn among the longer ones.

    Each has `group` (a name), `text` (its number), `tokens`, `ids`, `gap` (whether tokens are missing before this one),
    and `layers`: for each `experts`, `weights` (lists without what is empty), `entropy`, `margin`.
    """
    if record.n_token_rows == 0:
        return []
    of_text, of_group = record.arrays["token/text"], record.arrays["token/group"]
    wide = sum(
        2 * record.of(layer, "token/experts").shape[1] + 2
        for layer in range(len(record.layers))
        if record.has(layer, "token/experts")
    )
    length = min(length, max(NUMBERS // max(texts * wide, 1), 16))
    rng = np.random.Generator(np.random.PCG64(seed))
    known, first, counts = np.unique(of_text, return_index=True, return_counts=True)
    groups = of_group[first]
    present = np.unique(groups)
    each = max(1, texts // len(present))
    chosen: list[int] = []
    for group in present[:texts]:
        mine = np.flatnonzero(groups == group)
        long = mine[counts[mine] >= min(length, np.median(counts[mine]))]
        chosen += rng.permutation(long)[:each].tolist()
    found = []
    for place in chosen:
        rows = np.flatnonzero(of_text == known[place])[:length]
        found.append(_text(record, tokenizer, rows, str(record.groups[groups[place]]), int(known[place])))
    return found


def _text(
    record: RoutingRecord, tokenizer: Tokenizer | None, rows: np.ndarray, group: str, number: int
) -> dict[str, Any]:
    ids = record.arrays["token/id"][rows].tolist()
    position = record.arrays["token/position"][rows]
    gap = [False, *((np.diff(position) != 1) & (position[1:] != 0)).tolist()]
    layers: list[dict[str, Any] | None] = []
    for layer in range(len(record.layers)):
        if not record.has(layer, "token/experts"):
            layers.append(None)
            continue
        experts = record.of(layer, "token/experts")[rows].tolist()
        weights = record.of(layer, "token/weights")[rows].astype(np.float64)
        layers.append({
            "experts": [[one for one in row if one >= 0] for row in experts],
            "weights": [
                [round(value, 3) for value, one in zip(row, chosen, strict=True) if one >= 0]
                for row, chosen in zip(weights.tolist(), experts, strict=True)
            ],
            "entropy": record.of(layer, "token/entropy")[rows].astype(np.float64).round(3).tolist(),
            "margin": record.of(layer, "token/margin")[rows].astype(np.float64).round(3).tolist(),
        })  # fmt: skip
    return {
        "group": group, "text": number, "tokens": pieces(ids, tokenizer, gap), "ids": ids, "gap": gap, "layers": layers
    }  # fmt: skip


def saturation_by_step(record: RoutingRecord, layer: int, least: int = 50) -> dict[str, Any] | None:
    """Share of the last step's choices that the same tokens made at each earlier step; None where none were read twice.

    Tokens are the same where text, position and id are. A step counts with `least` of them.
    """
    if not record.has(layer, "token/experts") or "token/step" not in record.arrays:
        return None
    steps = record.arrays["token/step"]
    known = np.unique(steps)
    if len(known) < 2:
        return None
    names = ("text", "position", "id")
    keys = np.stack([record.arrays[f"token/{name}"] for name in names], axis=1)
    _, key = np.unique(keys, axis=0, return_inverse=True)
    experts = record.of(layer, "token/experts")
    last = np.flatnonzero(steps == known[-1])
    found: dict[str, Any] = {"step": [], "share": []}
    for step in known:
        mine = np.flatnonzero(steps == step)
        _, now, then = np.intersect1d(key[last], key[mine], return_indices=True)
        if len(now) >= least:
            found["step"].append(int(step))
            found["share"].append(saturation(experts[mine[then]], experts[last[now]]))
    return found if len(found["step"]) > 1 else None
