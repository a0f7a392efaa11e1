"""Why a language model says what it says of one text: experts of each token, and what each of them does to it.

The report is JSON-ready:

| key | what |
| --- | --- |
| `version`, `moekit_version`, `created`, `title`, `source` | of this schema, of moekit, date and time, the model |
| `kind`, `instead`, `scope` | "text" or "task"; what stands in an expert's place; what was switched off |
| `verdict`, `details`, `notes` | sentences: the result, what qualifies it, what could not be said |
| `measures` | list of `key`, `title`, `unit`, `words`: what `effects` are changes of |
| `layers` | list of `name`, `router`, `n_experts`, `labels` |
| `texts` | list, see below: the text, or each example of a task |
| `experts` | list of `text`, `layer`, `expert`, `label`, `tokens`, and means: `weight`, `effects` by measure |
| `swaps` | list of `layer`, `one`, `other`, `moved` tokens, `changes` of each token, `mean` |
| `cost` | `edits`, `tokens_read`, `seconds` |

Of a text: `group` (its name), `text` (its number), `tokens`, `ids`, `gap`, `answers` (a text: for each token `next`,
`log_probability`, `probability`, `rank` of the token that follows, `top` and `top_probability` of the one that is
expected; a task: for each target what `moekit predict` says) and `layers`: for each `experts`, `weights`, `entropy`,
`margin` (distance in probability of the last chosen expert to the next best) and `next_best` of each token, and
`effects`: by measure a list like `experts`, null where nothing follows. An effect is the answer without the expert less
the answer with it: below 0 where the expert helps.

Shape legend: S tokens, K choices of a token, V vocabulary.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from typing import Any

import torch
from torch import Tensor

from moekit import __version__
from moekit.config.atomic import json_ready
from moekit.config.errors import ConfigError, require
from moekit.data.tokenizer import Tokenizer
from moekit.explain.edits import Instead, Swap
from moekit.explain.effects import LIMIT, Ablation, Cell, Reading, Scope, next_best
from moekit.explain.summary_tokens import pieces
from moekit.models.language_model import LanguageModel
from moekit.observe.choices import NONE, choices_of
from moekit.observe.recorder import layers_of

VERSION = 1
# numbers of logits that one pass may hold
LOGITS = 32_000_000
IN_WORDS = {
    "nothing": "nothing stands in its place",
    "next": "the token’s next best expert takes its place",
    "share": "the token’s other experts have its weight",
}

Values = Callable[[Cell, Tensor], dict[str, list[float | None]]]


def explain_text(
    model: LanguageModel, tokenizer: Tokenizer, text: str, *, instead: Instead = "nothing", scope: Scope = "both",
    swaps: Sequence[tuple[int, int, int]] = (), limit: int = LIMIT, title: str = "", source: str = "",
) -> dict[str, Any]:  # fmt: skip
    """The report of one text, by the schema above.

    Args:
        model: with sparse layers.
        tokenizer: of the model.
        text: begins a document, as in training.
        instead: what stands in the place of an expert that is switched off, see `Off`.
        scope: "token" switches each expert off for each token by itself, "text" for all tokens, "both", or "none".
        swaps: (layer, expert, other expert) that exchange their tokens, each swap by itself.
        limit: tokens that may be read in all.
        title, source: of the model.

    Errors: `ConfigError` for a dense model, a text that is empty or longer than the model reads, or more reading than
    `limit` allows.
    """
    began = time.perf_counter()
    ids = [*(tokenizer.begin_ids or (tokenizer.end_id,)), *tokenizer.encode(text)]
    require(len(text) > 0, "text", repr(text), "must hold at least one character")
    longest = model.config.max_seq_len
    require(
        len(ids) <= longest, "text", f"{len(ids):,} tokens", f"must have at most {longest:,}", "Shorten it"
    )
    device = next(model.parameters()).device
    read = _Reader(model.eval(), torch.tensor(ids, device=device))
    at_once = max(1, min(4096, LOGITS // model.config.vocab_size))
    ablation = Ablation(model, read, instead, limit, at_once)
    n = len(ids)
    plain = ablation.plain.answers.view(n, 2)

    def values(cell: Cell, change: Tensor) -> dict[str, list[float | None]]:
        each = change.view(n, 2)
        if cell.token is None:
            return {"text": [*each[:-1, 0].tolist(), None], "text_top": each[:, 1].tolist()}
        return {
            "token": [None if cell.token + 1 == n else float(each[cell.token, 0])],
            "top": [float(each[cell.token, 1])], "later": [float(each[cell.token + 1 : -1, 0].sum())],
        }  # fmt: skip

    layers, experts, edits = layer_effects(ablation, scope, values, n)
    gaps = [False] * n
    shown = pieces(ids, tokenizer, gaps)
    report = frame(
        model, title, source, "text", instead, scope,
        measures=[one for one in _MEASURES if any(one["key"] in layer["effects"] for layer in layers)],
        texts=[{
            "group": title, "text": 0, "tokens": shown, "ids": ids, "gap": gaps,
            "answers": _answers(plain, read.logits, ids, shown, tokenizer), "layers": layers,
        }],
        experts=[{"text": 0, **one} for one in experts],
        swaps=[_swap(ablation, plain, *one) for one in swaps],
        cost={"edits": edits + len(swaps), "tokens_read": ablation.tokens_read, "seconds": time.perf_counter() - began},
    )  # fmt: skip
    report["verdict"], report["details"] = _in_words(report)
    return ready(report)


_MEASURES = (
    {"key": "token", "title": "for this token alone, on the next token", "unit": "nats",
     "words": "Change of the log-probability of the token that follows, without the expert at this token alone."},
    {"key": "top", "title": "for this token alone, on the expected token", "unit": "nats",
     "words": "Change of the log-probability of the token that the model held for the most probable one."},
    {"key": "later", "title": "for this token alone, on all later tokens", "unit": "nats",
     "words": "Sum of the changes of all tokens after the next one: what attention carries on."},
    {"key": "text", "title": "for all tokens, on the next token", "unit": "nats",
     "words": "Change of the log-probability of the token that follows, without the expert at every token."},
    {"key": "text_top", "title": "for all tokens, on the expected token", "unit": "nats",
     "words": "The same for the token that the model held for the most probable one."},
)  # fmt: skip


class _Reader:
    """Reads copies of one text; answers are the log-probabilities of the next and of the expected token, one by one."""

    def __init__(self, model: LanguageModel, ids: Tensor) -> None:
        self.model, self.ids = model, ids
        self.logits: Tensor | None = None
        self.asked: Tensor | None = None

    def __call__(self, copies: int) -> Reading:
        out = self.model(self.ids.expand(copies, -1))
        assert out.logits is not None
        logits = out.logits.float()  # [N, S, V]
        if self.asked is None:
            self.logits = logits[0]
            top = logits[0].argmax(dim=-1)
            # nothing follows the last token: it is asked for what it expects
            following = torch.cat([self.ids[1:], top[-1:]])
            self.asked = torch.stack([following, top], dim=1)  # [S, 2]
        chosen = logits.gather(2, self.asked.expand(copies, -1, -1)) - logits.logsumexp(dim=-1, keepdim=True)
        return Reading(chosen.flatten(1), out.routing)


def layer_effects(
    ablation: Ablation, scope: Scope, values: Values, n: int
) -> tuple[list[dict[str, Any]], list[dict[str, Any]], int]:
    """Of each layer what its tokens chose and what that does; a list of experts by what they do; and edits made.

    Args:
        ablation: of one input.
        scope: see `explain_text`.
        values: gives by measure what a cell's change of the answers `[A]` is: one number, or one for each token.
        n: tokens of the input; a layer that routes the whole of it says the same of each.
    """
    plans = ablation.plain.plans
    cells = [] if scope == "none" else ablation.cells(tokens=scope != "text", text=scope != "token")
    changes = ablation.answers(cells) - ablation.plain.answers.cpu()
    layers: list[dict[str, Any]] = []
    for number, plan in enumerate(plans):
        choices, (other, margin) = choices_of(plan), next_best(plan)
        layers.append({
            "experts": ablation.chosen(number),
            "weights": [
                row[: sum(one != NONE for one in chosen)]
                for row, chosen in zip(choices.weights.tolist(), choices.experts.tolist(), strict=True)
            ],
            "entropy": choices.entropy.tolist(), "margin": margin, "next_best": other, "effects": {},
        })  # fmt: skip
    for cell, change in zip(cells, changes, strict=True):
        layer = layers[cell.layer]
        for key, found in values(cell, change).items():
            into = layer["effects"].setdefault(key, [[None] * len(row) for row in layer["experts"]])
            for token, row in enumerate(layer["experts"]):
                if cell.expert in row and cell.token in (None, token):
                    into[token][row.index(cell.expert)] = found[token if len(found) > 1 else 0]
    experts = _by_expert(ablation, layers)
    for layer in layers:
        if len(layer["experts"]) == 1 < n:
            for key in ("experts", "weights", "entropy", "margin", "next_best"):
                layer[key] = layer[key] * n
            layer["effects"] = {key: rows * n for key, rows in layer["effects"].items()}
    return layers, experts, len(cells)


def _by_expert(ablation: Ablation, layers: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each expert that was chosen, with its tokens and the mean of each effect over them; the strongest first."""
    names = layers_of(ablation.model)
    found = []
    for number, layer in enumerate(layers):
        for expert in sorted({expert for row in layer["experts"] for expert in row}):
            places = [
                (token, row.index(expert)) for token, row in enumerate(layer["experts"]) if expert in row
            ]
            effects = {
                key: _mean([rows[token][rank] for token, rank in places if rows[token][rank] is not None])
                for key, rows in layer["effects"].items()
            }
            found.append({
                "layer": number, "expert": expert, "label": names[number].label(expert), "tokens": len(places),
                "weight": sum(layer["weights"][token][rank] for token, rank in places) / len(places),
                "effects": effects,
            })  # fmt: skip
    return sorted(
        found, key=lambda one: -max((abs(v or 0) for v in one["effects"].values()), default=one["tokens"])
    )


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _swap(ablation: Ablation, plain: Tensor, layer: int, one: int, other: int) -> dict[str, Any]:
    after = ablation.edited(layer, Swap(one, other)).answers.view(len(plain), 2)
    changes = [*(after - plain)[:-1, 0].tolist(), None]
    moved = sum(one in row or other in row for row in ablation.chosen(layer))
    return {
        "layer": layer, "one": one, "other": other, "moved": moved, "changes": changes,
        "mean": _mean(changes[:-1]),
    }  # fmt: skip


def _answers(
    plain: Tensor, logits: Tensor | None, ids: Sequence[int], shown: Sequence[str], tokenizer: Tokenizer
) -> list[dict[str, Any]]:
    assert logits is not None
    found = []
    for place in range(len(ids)):
        top = int(logits[place].argmax())
        answer = {
            "next": None, "log_probability": None, "probability": None, "rank": None,
            "top": tokenizer.decode([top]), "top_probability": float(plain[place, 1].exp()),
        }  # fmt: skip
        if place + 1 < len(ids):
            mine = logits[place, ids[place + 1]]
            answer |= {
                "next": shown[place + 1], "log_probability": float(plain[place, 0]),
                "probability": float(plain[place, 0].exp()), "rank": 1 + int((logits[place] > mine).sum()),
            }  # fmt: skip
        found.append(answer)
    return found


def frame(
    model: Any, title: str, source: str, kind: str, instead: str, scope: str, **parts: Any
) -> dict[str, Any]:
    """A report with what every one has."""
    return {
        "version": VERSION, "moekit_version": __version__,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "title": title, "source": source, "kind": kind, "instead": instead, "instead_words": IN_WORDS[instead],
        "scope": scope, "notes": [],
        "layers": [
            {"name": one.name, "router": one.router, "n_experts": one.n_experts,
             "labels": [one.label(expert) for expert in range(one.n_experts)]}
            for one in layers_of(model)[: len(parts["texts"][0]["layers"])]
        ],
        **parts,
    }  # fmt: skip


def ready(value: Any) -> Any:
    """Numbers with five significant digits, and what JSON cannot hold as null."""

    def rounded(one: Any) -> Any:
        if isinstance(one, dict):
            return {key: rounded(item) for key, item in one.items()}
        if isinstance(one, list | tuple):
            return [rounded(item) for item in one]
        return float(f"{one:.5g}") if isinstance(one, float) else one

    return json_ready(rounded(value))


def strongest(report: dict[str, Any], key: str, text: int = 0) -> tuple[float, int, int, int] | None:
    """(effect, token, layer, expert) of the single choice that an answer leans on most, or None."""
    found = [
        (effect, token, number, layer["experts"][token][rank])
        for number, layer in enumerate(report["texts"][text]["layers"])
        for token, row in enumerate(layer["effects"].get(key, ()))
        for rank, effect in enumerate(row)
        if effect is not None
    ]
    return min(found, default=None)


def _in_words(report: dict[str, Any]) -> tuple[str, list[str]]:
    text = report["texts"][0]
    known = [one["log_probability"] for one in text["answers"] if one["log_probability"] is not None]
    mean = sum(known) / max(len(known), 1)
    verdict = f"{len(text['tokens'])} tokens, {-mean:.2f} nats a token"
    switched_off = report["scope"] != "none"
    details = [f"Where an expert is switched off, {report['instead_words']}."] if switched_off else []
    key = "token" if report["scope"] in ("both", "token") else "text"
    most = strongest(report, key)
    if most is not None and most[0] < 0 and most[1] + 1 < len(text["tokens"]):
        (effect, token, layer, expert), pieces = most, text["tokens"]
        label = report["layers"][layer]["labels"][expert]
        verdict += (
            f"; the largest single effect: without expert {label} of layer {layer}, “{visible(pieces[token + 1])}” "
            f"behind “{visible(pieces[token])}” loses {-effect:.2f} nats"
        )
    return verdict + ".", details


def visible(piece: str) -> str:
    """A token on one line.

    >>> visible("\\n  a b"), visible("")
    ('↵␣×2a b', '·')
    """
    found = piece.replace("\n", "↵").replace("\t", "⇥") or "·"
    return re.sub(" {2,}", lambda run: f"␣×{len(run[0])}", found)


def parse_swap(text: str) -> tuple[int, int, int]:
    """LAYER:EXPERT:EXPERT.

    >>> parse_swap("2:5:9")
    (2, 5, 9)
    """
    parts = text.split(":")
    if len(parts) != 3 or not all(part.isdigit() for part in parts):
        raise ConfigError(f"--swap must be LAYER:EXPERT:EXPERT, such as 2:5:9; got {text}")
    layer, one, other = map(int, parts)
    return layer, one, other
