"""What a quickstart report holds. The file is JSON; a page can be drawn from any that `check_report` accepts.

```
schema            "moekit.quickstart/1"
moekit_version    str
command           str       the command that repeats the run
created           str       ISO 8601
machine           {cpu, cores, memory_bytes, torch, precision, device}
corpus            {name, sources: [{name, origin, licence, note}], domains: [str],
                   held_out_domain: str | null, train_tokens, validation_tokens, bytes: {domain: int},
                   vocab_size, note}
settings          {steps, batch_size, seq_len, seed, lr: {model: float}, ...any more, shown as they are}
models            {dense | transformer_xl | moe: model}; at least one
  model           {bits_per_byte: {mean, <domain>: float ...}   on the validation documents
                   active_parameters, total_parameters, flops_per_token, tokens,
                   train_tokens_per_second, inference_tokens_per_second, peak_memory_bytes, train_seconds,
                   final_loss: float                            nats a token, at the last step
                   gap: {train, validation, held_out}           bits a byte
                   curve: [{step, tokens, seconds, loss, validation_loss}]   nats a token; step rises
                   sample: str, description: str}
to_dense_loss     {steps_share, seconds_share}: of what the dense twin took in all, for the MoE to reach the
                  dense twin's final loss; null where it never did or where one of the two is missing
balance           of the MoE on the validation set, or null without one:
                  {max_violation (of the worst layer), load_entropy (mean over layers, divided by the log of
                   the number of experts: 1 is even),
                   dead_experts, dropped_share,
                   layers: [{layer: int, router: name, load: [share per expert], max_violation}],
                   history: [{step, max_violation}]}
experts_by_domain {domains: [str], layers: [{layer: int, router: name, share: [[share per expert] per domain]}]},
                  each row summing to 1, or null
notes             [str]
```

A number that was not measured is null; so is the whole of `balance`, `experts_by_domain` or `to_dense_loss`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from moekit.config.errors import DataError, nearest

SCHEMA = "moekit.quickstart/1"
MODELS = ("moe", "dense", "transformer_xl")
MODEL_NAMES = {"moe": "MoE", "dense": "Dense twin", "transformer_xl": "Transformer-XL"}
MODEL_COLOURS = {"moe": "s1", "dense": "s2", "transformer_xl": "s3"}
MODEL_DASHES = {"moe": "", "dense": "6 3", "transformer_xl": "2 3"}

_Rule = Any  # a name of a check below, a dict of rules, a list with one rule, or a tuple ("each", rule)
_CURVE = {
    "step": "count",
    "tokens": "count",
    "seconds": "number?",
    "loss": "number?",
    "validation_loss?": "number?",
}
_MODEL = {
    "bits_per_byte": ("each", "number?"),
    "active_parameters": "count",
    "total_parameters": "count",
    "flops_per_token": "number?",
    "tokens": "count",
    "train_tokens_per_second": "number?",
    "inference_tokens_per_second": "number?",
    "peak_memory_bytes": "number?",
    "train_seconds": "number?",
    "final_loss": "number?",
    "gap": {"train": "number?", "validation": "number?", "held_out": "number?"},
    "curve": [_CURVE],
    "sample": "text",
    "description": "text",
}
_BALANCE = {
    "max_violation": "number?",
    "load_entropy": "number?",
    "dead_experts": "number?",
    "dropped_share": "number?",
    "layers": [{"layer": "count", "router?": "text", "load": ["number?"], "max_violation": "number?"}],
    "history?": [{"step": "count", "max_violation": "number?"}],
}
_REPORT = {
    "schema": "text",
    "moekit_version": "text",
    "command": "text",
    "created": "text",
    "machine": {
        "cpu": "text",
        "cores": "number?",
        "memory_bytes": "number?",
        "torch": "text",
        "precision": "text",
        "device": "text",
    },
    "corpus": {
        "name": "text",
        "sources": [{"name": "text", "origin": "text", "licence": "text", "note?": "text"}],
        "domains": ["text"],
        "held_out_domain": "text?",
        "train_tokens": "count",
        "validation_tokens": "count",
        "bytes": ("each", "number?"),
        "vocab_size": "count",
        "note?": "text",
    },
    "settings": {
        "steps": "count", "batch_size": "count", "seq_len": "count", "seed": "count",
        "lr": ("each", "number?"),
    },
    "models": ("each", _MODEL),
    "to_dense_loss": ("maybe", {"steps_share": "number?", "seconds_share": "number?"}),
    "balance": ("maybe", _BALANCE),
    "experts_by_domain": (
        "maybe", {"domains": ["text"], "layers": [{"layer": "count", "router?": "text", "share": [["number?"]]}]},
    ),
    "notes": ["text"],
}  # fmt: skip


def check_report(report: Mapping[str, Any]) -> None:
    """Raise `DataError` naming every key of `report` that is missing or wrong.

    >>> report_problems({"schema": "moekit.quickstart/1"})[:2]
    ['moekit_version is missing', 'command is missing']
    """
    problems = report_problems(report)
    if problems:
        shown = problems[:12] + (["..."] if len(problems) > 12 else [])
        faults = "1 fault" if len(problems) == 1 else f"{len(problems)} faults"
        raise DataError(f"the report has {faults}:\n  " + "\n  ".join(shown))


def report_problems(report: object) -> list[str]:
    """One sentence for each missing or wrong key of a report; empty if the report is sound."""
    problems: list[str] = []
    _check(report, _REPORT, "", problems)
    if not isinstance(report, Mapping) or problems:
        return problems
    if report["schema"] != SCHEMA:
        problems.append(f"schema must be {SCHEMA!r}; got {report['schema']!r}")
    models = report["models"]
    problems += [
        f"models.{name} is unknown: {nearest(name, MODELS)}" for name in models if name not in MODELS
    ]
    if not models:
        problems.append(f"models must hold at least one of {', '.join(MODELS)}; got none")
    for name, model in models.items():
        if "mean" not in model["bits_per_byte"]:
            problems.append(f"models.{name}.bits_per_byte.mean is missing")
        steps = [point["step"] for point in model["curve"]]
        if steps != sorted(set(steps)):
            problems.append(f"models.{name}.curve must rise in step; got {steps[:6]!r}")
    if report["experts_by_domain"]:
        _check_shares(report["experts_by_domain"], problems)
    return problems


def _check_shares(table: Mapping[str, Any], problems: list[str]) -> None:
    n_domains = len(table["domains"])
    for index, layer in enumerate(table["layers"]):
        rows = layer["share"]
        where = f"experts_by_domain.layers[{index}].share"
        if len(rows) != n_domains:
            problems.append(f"{where} must have one row per domain ({n_domains}); got {len(rows)}")
        if len({len(row) for row in rows}) > 1:
            problems.append(f"{where} must have rows of equal length; got {[len(row) for row in rows]}")


def _check(value: object, rule: _Rule, path: str, problems: list[str]) -> None:
    if isinstance(rule, str):
        wanted = _WANTED[rule.rstrip("?")]
        if not (value is None and rule.endswith("?")) and not wanted[1](value):
            or_null = " or null" if rule.endswith("?") else ""
            problems.append(f"{path} must be {wanted[0]}{or_null}; got {_shown(value)}")
    elif isinstance(rule, list):
        if not isinstance(value, (list, tuple)):
            problems.append(f"{path} must be a list; got {_shown(value)}")
            return
        for index, item in enumerate(value):
            _check(item, rule[0], f"{path}[{index}]", problems)
    elif isinstance(rule, tuple):
        kind, inner = rule
        if kind == "maybe":
            if value is not None:
                _check(value, inner, path, problems)
        elif not isinstance(value, Mapping):
            problems.append(f"{path} must be an object; got {_shown(value)}")
        else:
            for key, item in value.items():
                _check(item, inner, f"{path}.{key}", problems)
    else:
        _check_object(value, rule, path, problems)


def _check_object(value: object, rule: dict[str, _Rule], path: str, problems: list[str]) -> None:
    if not isinstance(value, Mapping):
        problems.append(f"{path or 'the report'} must be an object; got {_shown(value)}")
        return
    known = [key.rstrip("?") for key in rule]
    for key, inner in rule.items():
        name = key.rstrip("?")
        where = f"{path}.{name}" if path else name
        if name in value:
            _check(value[name], inner, where, problems)
        elif not key.endswith("?"):
            stray = [str(other) for other in value if other not in known]
            close = [other for other in stray if nearest(other, [name]).startswith("did you mean")]
            problems.append(f"{where} is missing" + (f"; there is {close[0]!r}" if close else ""))


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _is_number(value: object) -> bool:
    """NaN and infinities are allowed here: a diverged run must still be reported."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


_WANTED = {
    "text": ("text", lambda value: isinstance(value, str)),
    "number": ("a number", _is_number),
    "count": (
        "a number of zero or more",
        lambda value: _is_number(value) and math.isfinite(value) and value >= 0,
    ),
}
