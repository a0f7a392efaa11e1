"""What the benchmarks share: result files."""

from __future__ import annotations

import os
import statistics
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # as the command line does; see moekit.cli.main

from moekit.config.atomic import write_json

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


def mean_and_deviation(values: list[float], digits: int = 4) -> str:
    """ "1.2345 ± 0.0012" of several values, the plain number of one."""
    mean = f"{statistics.fmean(values):.{digits}f}"
    return f"{mean} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean
