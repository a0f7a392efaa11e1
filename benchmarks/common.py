"""What the benchmarks share: result files, and rows that an interrupted benchmark finds again."""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # as the command line does; see moekit.cli.main

from moekit.config.atomic import write_json

RESULTS = Path(__file__).parent.parent / "docs" / "results"


def write_result(
    name: str, title: str, command: str, note: str, columns: list[str], rows: list[list[str]],
    into: Path | None = None, **more: Any,
) -> None:  # fmt: skip
    """One file under docs/results, from which the tables of the documentation are made; or in the folder `into`."""
    result = {
        "title": title,
        "command": command,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "note": note,
        "table": {"columns": columns, "rows": rows},
        **more,
    }
    path = (RESULTS if into is None else into) / f"{name}.json"
    write_json(path, result)
    print(f"wrote {path}")


def kept(path: Path, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What lies at `path`, made first where nothing does: a row of a benchmark that may be interrupted."""
    if path.is_file():
        return dict(json.loads(path.read_text("utf-8")))
    result = make()
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, result)
    print(
        path.stem,
        {key: value for key, value in result.items() if not isinstance(value, (list, dict))},
        flush=True,
    )
    return result


def mean_and_deviation(values: list[float], digits: int = 4) -> str:
    """ "1.2345 ± 0.0012" of several values, the plain number of one."""
    mean = f"{statistics.fmean(values):.{digits}f}"
    return f"{mean} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean
