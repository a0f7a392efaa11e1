"""Why a trained task answers as it does: experts of each token of an input, and what each does to the answer.

Shape legend: N copies, S tokens of the input, A targets that have one number to ask for.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moekit.config.errors import ConfigError
from moekit.data.encoding.fields import FieldsEncoder
from moekit.data.encoding.targets import ClassEncoder, NumberEncoder, TagsEncoder, TargetEncoder
from moekit.data.encoding.text import TextEncoder, Tokens
from moekit.data.encoding.whole import EncodedExamples
from moekit.data.encoding.words import WordsEncoder, words_in
from moekit.data.examples import Examples
from moekit.data.task_loader import batch_of
from moekit.explain.edits import Instead
from moekit.explain.effects import LIMIT, Ablation, Cell, Reading, Scope
from moekit.explain.predictions import frame, layer_effects, ready, strongest, visible
from moekit.models.task_model import TaskOutput
from moekit.observe.tasks import token_ids
from moekit.train.run import LoadedTask

# examples of a file that are explained
EXAMPLES = 8


def explain_examples(
    task: LoadedTask, examples: Examples, *, instead: Instead = "nothing", scope: Scope = "both",
    limit: int = LIMIT, source: str = "",
) -> dict[str, Any]:  # fmt: skip
    """The report of the first examples, by the schema of `moekit.explain.predictions`.

    A measure's key is SCOPE:WHAT:TARGET: the change of the `probability` of the predicted class (with several classes
    at once, of the most probable one) and of its `odds` (log-odds, in which a sure answer has room to change), or of
    the predicted `number` in its own units; of tags of the mean `lead` that a word's tag has over the next best.

    Args:
        task: a run.
        examples: with or without answers.
        instead, scope: as for `explain_text`.
        limit: tokens that may be read for one example.
        source: of the run.

    Errors: `ConfigError` for a dense model, no examples, or more reading than `limit` allows.
    """
    began = time.perf_counter()
    if len(examples) == 0:
        raise ConfigError("there is no example to explain")
    encoded = task.encoding.encode(examples, targets=False)
    asked = {
        name: encoder for name, encoder in task.encoding.targets.items()
        if isinstance(encoder, ClassEncoder | NumberEncoder | TagsEncoder)
    }  # fmt: skip
    task.model.eval()
    texts, experts, edits, tokens_read = [], [], 0, 0
    for row in range(min(len(encoded), EXAMPLES)):
        read = _Reader(task, encoded, row, asked)
        ablation = Ablation(task.model, read, instead, limit)
        n = ablation.length

        def values(cell: Cell, change: Tensor) -> dict[str, list[float | None]]:
            kind = "text" if cell.token is None else "token"
            return {f"{kind}:{key}": [float(one)] for key, one in zip(_keys(asked), change, strict=True)}

        layers, found, made = layer_effects(ablation, scope if asked else "none", values, n)
        names, ids = _tokens(task, encoded, row, read.first, n)
        texts.append({
            "group": f"example {row + 1}", "text": row, "tokens": names, "ids": ids, "gap": [False] * n,
            "answers": read.answers, "layers": layers,
        })  # fmt: skip
        experts += [{"text": row, **one} for one in found]
        edits, tokens_read = edits + made, tokens_read + ablation.tokens_read
    report = frame(
        task.model, task.folder.name, source, "task", instead, scope,
        measures=_measures(asked, scope), texts=texts, experts=experts, swaps=[],
        cost={"edits": edits, "tokens_read": tokens_read, "seconds": time.perf_counter() - began},
    )  # fmt: skip
    others = [name for name in task.encoding.targets if name not in asked]
    if others:
        report["notes"].append(
            f"Effects are measured on classes, tags and numbers; of {', '.join(others)} the routing alone is shown."
        )
    if len(encoded) > EXAMPLES:
        report["notes"].append(f"Of {len(encoded):,} examples the first {EXAMPLES} are explained.")
    report["verdict"], report["details"] = _in_words(report)
    return ready(report)


class _Reader:
    """Reads copies of one example; answers are what `_number_of` asks for. Keeps the first reading."""

    def __init__(
        self, task: LoadedTask, encoded: EncodedExamples, row: int, asked: Mapping[str, TargetEncoder]
    ) -> None:  # fmt: skip
        self.task, self.encoded, self.row, self.asked = task, encoded, row, asked
        self.first: TaskOutput | None = None
        self.answers: dict[str, dict[str, Any]] = {}
        self.places: dict[str, Tensor] = {}

    def __call__(self, copies: int) -> Reading:
        device = next(self.task.model.parameters()).device
        batch = batch_of(self.encoded, np.full(copies, self.row)).to(device)
        out: TaskOutput = self.task.model(batch.inputs)
        if self.first is None:
            self.first = out
            for name, encoder in self.task.encoding.targets.items():
                said = encoder.answers(out.answers[name], 0)
                self.answers[name] = encoder.completed(
                    said, self.row, self.encoded.inputs, self.encoded.examples
                )
            self.places = {
                name: _place(encoder, out.answers[name][0], self.encoded, self.row)
                for name, encoder in self.asked.items()
            }
        numbers = [
            _numbers(self.asked[name], out.answers[name], place) for name, place in self.places.items()
        ]
        return Reading(torch.cat(numbers, dim=1) if numbers else torch.zeros(copies, 0), out.routing)


def _place(encoder: TargetEncoder, answer: Tensor, encoded: EncodedExamples, row: int) -> Tensor:
    """What is predicted: the number of the class, or `[W, 2]` token and tag of each word that is read."""
    best = answer.float().argmax(dim=-1).cpu()
    if not isinstance(encoder, TagsEncoder):
        return best
    words = encoded.inputs[encoder.config.input]
    assert isinstance(words, Tokens)
    firsts = torch.tensor([place for place in words.firsts[row].tolist() if 0 <= place < len(best)])
    return torch.stack([firsts, best[firsts]], dim=1)


def _numbers(encoder: TargetEncoder, answer: Tensor, place: Tensor) -> Tensor:
    """`[N, 1 or 2]` what is asked of a head's answer, see `_WHATS`."""
    if isinstance(encoder, NumberEncoder):
        return encoder.in_units(answer.cpu())[:, :1]
    logits = answer.float().cpu()
    if isinstance(encoder, TagsEncoder):
        of_words = logits[:, place[:, 0]]  # [N, W, C]
        chosen = place[:, 1].expand(len(logits), -1)[..., None]
        others = of_words.scatter(2, chosen, -torch.inf).amax(dim=2)
        return (of_words.gather(2, chosen)[..., 0] - others).mean(dim=1, keepdim=True)
    number = int(place)
    own = logits[:, number]
    others = torch.cat([logits[:, :number], logits[:, number + 1 :]], dim=1)
    multi = isinstance(encoder, ClassEncoder) and encoder.config.multi
    odds = own if multi else own - others.logsumexp(dim=1)
    return torch.stack([odds.sigmoid(), odds], dim=1)


_WHATS = {
    "probability": ("the probability of the predicted class", "probability"),
    "odds": ("the log-odds of the predicted class", "nats"),
    "lead": ("the mean lead of the words’ tags over the next best", "logits"),
    "number": ("the predicted number", "units"),
}


_ASKED: dict[type[TargetEncoder], tuple[str, ...]] = {NumberEncoder: ("number",), TagsEncoder: ("lead",)}


def _keys(asked: Mapping[str, Any]) -> list[str]:
    """WHAT:TARGET of each number that is asked for, in their order."""
    return [
        f"{what}:{name}"
        for name, encoder in asked.items()
        for what in _ASKED.get(type(encoder), ("probability", "odds"))
    ]


def _measures(asked: Mapping[str, Any], scope: str) -> list[dict[str, str]]:
    found = []
    for kind, title in (("token", "at this token alone"), ("text", "at every token")):
        if scope not in ("both", kind):
            continue
        for key in _keys(asked):
            what, _, name = key.partition(":")
            words, unit = _WHATS[what]
            words += f" of {name}" if len(asked) > 1 else ""
            found.append({
                "key": f"{kind}:{key}", "title": f"{title}, on {words}", "unit": unit,
                "words": f"Change of {words} without the expert {title}.",
            })  # fmt: skip
    return found


def _tokens(
    task: LoadedTask, encoded: EncodedExamples, row: int, out: TaskOutput | None, n: int
) -> tuple[list[str], list[int]]:
    """A name for each token of the backbone, and its id, -1 where it has none."""
    assert out is not None
    names = [f"token {place}" for place in range(n)]
    known = {
        name: _names(task.encoding.inputs.get(name), encoded.examples, row, min(place.stop, n) - place.start)
        for name, place in out.places.items()
    }
    several = sum(one is not None for one in known.values()) > 1
    for name, place in out.places.items():
        length, own = min(place.stop, n) - place.start, known[name]
        for number in range(length):
            if own is not None:
                names[place.start + number] = f"{name} {own[number]}" if several else own[number]
            else:
                names[place.start + number] = name if length == 1 else f"{name} {number}"
    ids = token_ids(batch_of(encoded, np.array([row])).inputs, out)
    return names, [-1] * n if ids is None else ids[0].tolist()


def _names(encoder: Any, examples: Examples, row: int, length: int) -> Sequence[str] | None:
    """What an input's tokens stand for; None where they have no names or do not fit."""
    found: Sequence[str] = ()
    if isinstance(encoder, TextEncoder):
        found = encoder.pieces(examples[encoder.config.column][row])
    elif isinstance(encoder, WordsEncoder):
        found = words_in(examples[encoder.config.column][row], encoder.config.unit)[:length]
    elif isinstance(encoder, FieldsEncoder):
        columns = [*encoder.config.numbers, *encoder.config.categories, *encoder.config.lists]
        found = [f"{column}={examples[column][row]}" for column in columns]
    return found if len(found) == length else None


def _in_words(report: dict[str, Any]) -> tuple[str, list[str]]:
    text = report["texts"][0]
    parts = []
    for name, answer in text["answers"].items():
        said = answer.get("text", answer["prediction"])
        said = " ".join(map(str, said)) if isinstance(said, list) else said
        sure = f" ({answer['probability']:.1%})" if "probability" in answer else ""
        said = f"{said:.4g}" if isinstance(said, float) else said
        parts.append(f"{name}: {said}{sure}")
    verdict = "; ".join(parts)
    shown = next((one for one in report["measures"] if one["unit"] != "probability"), None)
    most = None if shown is None else strongest(report, shown["key"])
    if shown is not None and most is not None and most[0] < 0:
        effect, token, layer, expert = most
        what = {"nats": "its log-odds change", "logits": "the mean lead of its tags changes"}.get(
            shown["unit"], "it changes"
        )
        unit = " nats" if shown["unit"] == "nats" else ""
        label, piece = report["layers"][layer]["labels"][expert], visible(text["tokens"][token])
        verdict += f"; without expert {label} of layer {layer} at “{piece}” {what} by {effect:+.3g}{unit}"
    return verdict + ".", [f"Where an expert is switched off, {report['instead_words']}."] if shown else []
