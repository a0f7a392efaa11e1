"""What the benchmarks share: result files and a cached quickstart setting."""

from __future__ import annotations

import json
import os
import statistics
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # as the command line does; see moekit.cli.main

from moekit.config.atomic import write_json
from moekit.config.train import RunConfig
from moekit.data.prepare import PreparedData, prepare
from moekit.evaluate.metrics import balance_summary, evaluate_split, experts_by_domain, mean_bits_per_byte
from moekit.evaluate.run import setting_of
from moekit.train.run import load_run, train_run

RESULTS = Path(__file__).parent.parent / "docs" / "results"


def write_result(
    name: str, title: str, command: str, note: str, columns: list[str], rows: list[list[str]], **more: Any
) -> None:
    """One file under docs/results, from which the tables of the documentation are generated."""
    result = {
        "title": title,
        "command": command,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "note": note,
        "table": {"columns": columns, "rows": rows},
        **more,
    }
    write_json(RESULTS / f"{name}.json", result)
    print(f"wrote {RESULTS / f'{name}.json'}")


def train_and_evaluate(config: RunConfig, data: PreparedData | None = None) -> dict[str, Any]:
    """Train one run and evaluate it on the whole validation set: loss, bits per byte, balance, seconds."""
    data = data if data is not None else prepare(config.data)
    folder = train_run(config, data=data, quiet=True).folder
    run = load_run(folder)
    results = evaluate_split(run.model, data.validation, data.tokenizer, setting_of(run))
    tokens = sum(result.n_tokens for result in results.values())
    return {
        "loss": sum(result.loss * result.n_tokens for result in results.values()) / tokens,
        "bits_per_byte": {"mean": mean_bits_per_byte(results)}
        | {d: r.bits_per_byte for d, r in results.items()},
        "balance": balance_summary(results),
        "experts_by_domain": experts_by_domain(results),
        "seconds": json.loads((folder / "final.json").read_text())["train_seconds"],
        "steps": run.step,
    }


def mean_and_deviation(values: list[float], digits: int = 4) -> str:
    """ "1.2345 ± 0.0012" of several values, the plain number of one."""
    mean = f"{statistics.fmean(values):.{digits}f}"
    return f"{mean} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean
