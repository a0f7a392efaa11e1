"""What `moekit bench SUBJECT --json` prints.

```
schema            "moekit.bench/1"
subject           layer | decode | step | model
moekit_version    str
command           str       the command that repeats it
created           str       ISO 8601
machine           {cpu, cores, features: [str], memory_bytes, torch, threads, omp_wait_policy: str | null}
peers             {distribution: version}          of the libraries that were compared with
settings          {seed, repeats, warmup, ...}     what was asked for
cases             [case]
  case            {name, shape: {...}, limits, contestants, refused, skipped, best_peer, moekit_speedup}
  limits          {flops_per_second, bytes_per_second}: the median round of a large matrix product and of reading a
                  large buffer, which took their turns with the contestants; null where the case does not need it
  contestants     [contestant], in the order of their turns
    contestant    {name, role: moekit | peer | dense,
                   seconds: {median, first_quartile, third_quartile, samples: [float]}    a sample for each round
                   ratio                             its median to that of the first contestant of moekit
                   work: {flops, bytes, tokens}      of one run; 0 where it is not counted
                   flops_per_second, bytes_per_second, tokens_per_second, flops_share, bytes_share: of the limits
                   peak_memory_bytes                 beside weights and inputs, where it was asked for
                   deviations: {output: {whole, row, allowed_whole, allowed_row, share_of_rows}}}
                                                     see moekit.evaluate.bench.checks
  refused         {contestant: what is wrong with its answer}; these have no times
  skipped         {contestant: why it takes no part}
  best_peer       name of the fastest contestant of role "peer"
  moekit_speedup  its median to moekit's; above 1 moekit is faster
```

What was not measured is null.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from typing import Any

import torch

from moekit import __version__
from moekit.config.errors import DataError, WrongResultError
from moekit.evaluate.bench.compare import Case
from moekit.evaluate.bench.peers import SUBJECTS, versions
from moekit.evaluate.machine import cores, cpu_features, cpu_name, memory

SCHEMA = "moekit.bench/1"

_NUMBER: tuple[type, ...] = (int, float)
_OPTIONAL = (int, float, type(None))
_TOP: dict[str, Any] = {
    "schema": str, "subject": str, "moekit_version": str, "command": str, "created": str, "peers": dict,
    "settings": dict, "cases": list,
    "machine": {"cpu": str, "cores": int, "features": list, "memory_bytes": int, "torch": str, "threads": int,
                "omp_wait_policy": (str, type(None))},
}  # fmt: skip
_CASE: dict[str, Any] = {
    "name": str, "shape": dict, "contestants": list, "refused": dict, "skipped": dict,
    "limits": {"flops_per_second": _OPTIONAL, "bytes_per_second": _OPTIONAL},
    "best_peer": (str, type(None)), "moekit_speedup": _OPTIONAL,
}  # fmt: skip
_CONTESTANT: dict[str, Any] = {
    "name": str, "role": str, "ratio": _OPTIONAL, "deviations": dict,
    "seconds": {"median": _NUMBER, "first_quartile": _NUMBER, "third_quartile": _NUMBER, "samples": list},
    "work": {"flops": _NUMBER, "bytes": _NUMBER, "tokens": int},
    "flops_per_second": _OPTIONAL, "bytes_per_second": _OPTIONAL, "tokens_per_second": _OPTIONAL,
    "flops_share": _OPTIONAL, "bytes_share": _OPTIONAL, "peak_memory_bytes": _OPTIONAL,
}  # fmt: skip
_DEVIATION: dict[str, Any] = dict.fromkeys(
    ("whole", "row", "allowed_whole", "allowed_row", "share_of_rows"), _OPTIONAL
)


def bench_result(
    subject: str, cases: Sequence[Case], settings: Mapping[str, Any], peers: Sequence[str], command: str
) -> dict[str, Any]:
    """The whole answer; call it while torch still has the threads that were measured."""
    features = [name for name, has in cpu_features().items() if has]
    return {
        "schema": SCHEMA,
        "subject": subject,
        "moekit_version": __version__,
        "command": command,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": {
            "cpu": cpu_name(),
            "cores": cores().usable,
            "features": features,
            "memory_bytes": memory().total,
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
            "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY"),
        },
        "peers": versions(peers),
        "settings": dict(settings),
        "cases": list(cases),
    }


def check_result(result: Mapping[str, Any]) -> None:
    """Raise `DataError` unless `result` follows the schema, naming the first place where it does not."""
    _check("result", result, _TOP)
    if result["schema"] != SCHEMA:
        raise DataError(
            f"result.schema must be {SCHEMA}; got {result['schema']!r}. Read it with another version"
        )
    if result["subject"] not in SUBJECTS:
        raise DataError(f"result.subject must be one of {', '.join(SUBJECTS)}; got {result['subject']!r}")
    for number, case in enumerate(result["cases"]):
        _check(f"cases[{number}]", case, _CASE)
        for contestant in case["contestants"]:
            where = f"cases[{number}].{contestant.get('name', '?')}"
            _check(where, contestant, _CONTESTANT)
            for output, deviation in contestant["deviations"].items():
                _check(f"{where}.deviations.{output}", deviation, _DEVIATION)


def fail_on_refused(result: Mapping[str, Any]) -> None:
    """Raise `WrongResultError` where a contestant was refused; the others' times stand."""
    lines = [
        f"{name} ({case['name']}): {reason}"
        for case in result["cases"]
        for name, reason in case["refused"].items()
    ]
    if lines:
        raise WrongResultError(
            f"an answer differs from the float32 reference, so its times are not reported: {'; '.join(lines)}"
        )


def _check(where: str, value: Any, rule: Mapping[str, Any]) -> None:
    if not isinstance(value, Mapping):
        raise DataError(f"{where} must be a group of fields; got {type(value).__name__}")
    if set(value) != set(rule):
        missing, unknown = sorted(set(rule) - set(value)), sorted(set(value) - set(rule))
        raise DataError(f"{where} must hold {', '.join(rule)}; missing: {missing}, unknown: {unknown}")
    for name, kind in rule.items():
        if isinstance(kind, Mapping):
            _check(f"{where}.{name}", value[name], kind)
        elif not isinstance(value[name], kind):
            raise DataError(f"{where}.{name} must be {_words(kind)}; got {value[name]!r}")


def _words(kind: type | tuple[type, ...]) -> str:
    return " or ".join(each.__name__ for each in (kind if isinstance(kind, tuple) else (kind,)))
