"""Designs found by `moekit design` against the default recipes, at equal active parameters, on tasks of the catalogue.

    python benchmarks/design_tasks.py                          # the full figures, into docs/results/design-tasks.json
    python benchmarks/design_tasks.py --small --out /tmp/small # to see that all runs: printed, and written there alone

Each search chooses on validation examples. What the table holds are whole runs of the chosen design and of the default
from scratch, with seeds that nothing was chosen by; the test examples are looked at there alone. A search that was
interrupted goes on with the same command. Lost comparisons stand in the table like the others.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from common import write_result

from moekit.cli.output import duration
from moekit.config.atomic import write_json
from moekit.design.search import Plan, search
from moekit.recipes.designing import subject_of

TASKS = (
    "knowledge-graph:nations",
    "knowledge-graph:umls",
    "knowledge-graph:kinships",
    "spoken-digits",
    "digits:mnist-10k",
)
# a search's time for each task, its trials where that is shorter, and the seeds of the finals
FULL: dict[str, Any] = {"time": "90m", "trials": 60, "seeds": 5, "finalists": 5, "repeats": 2}
SMALL: dict[str, Any] = {"time": "8m", "trials": 14, "seeds": 3, "finalists": 2, "repeats": 1}
COLUMNS = ["task", "figure", "default", "designed", "difference ± standard error", "on validation", "active", "design",
           "result"]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tasks", nargs="+", default=list(TASKS))
    parser.add_argument("--out", type=Path, default=Path("runs/design-tasks"), help="folder of the searches")
    parser.add_argument("--small", action="store_true", help="few trials; docs/results stays as it is")
    parser.add_argument("--time", help="of each search, such as 30m")
    parser.add_argument("--workers", type=int, default=1)
    given = parser.parse_args()
    size = {**(SMALL if given.small else FULL), **({"time": given.time} if given.time else {})}
    plan = Plan(
        "design", f"active=default,time={size['time']}", trials=size["trials"], seeds=size["seeds"],
        finalists=size["finalists"], repeats=size["repeats"],
    )  # fmt: skip
    reports = {}
    for task in given.tasks:
        folder = given.out / task.replace(":", "-")
        print(f"{task}: {folder}", flush=True)
        reports[task] = search(
            subject_of(task),
            plan,
            folder,
            workers=given.workers,
            say=lambda text: print("  " + text, flush=True),
        )
        print(f"{task}: {reports[task]['verdict']}", flush=True)
    rows = [row_of(task, report) for task, report in reports.items()]
    won = sum(row[-1] == "designed" for row in rows)
    note = (
        f"Of {len(rows)} tasks the design found wins {won} on test examples. Active parameters are at most the "
        f"default's. Trials are half of a whole run, at most {size['trials']} in {size['time']} for each task; what "
        f"stands here are whole runs with {size['seeds']} fresh seeds, mean ± deviation. It is a tie where the "
        "difference is within two standard errors. " + " ".join(spent(task, report) for task, report in reports.items())
    )  # fmt: skip
    if given.small:
        write_json(given.out / "design-tasks.json", {"note": note, "columns": COLUMNS, "rows": rows})
        print(note, *(" | ".join(row) for row in rows), sep="\n")
        return
    write_result(
        "design-tasks", "Automatic design against the default recipes", "python benchmarks/design_tasks.py", note,
        COLUMNS, rows, designs={task: report["best"] for task, report in reports.items()},
    )  # fmt: skip


def row_of(task: str, report: dict[str, Any]) -> list[str]:
    """One task: figures on test examples, on validation examples, sizes, and who won on test examples."""
    finals = report["finals"]["figures"]
    test, held = finals.get(f"test {report['key']}"), finals.get(f"validation {report['key']}")
    if test is None or held is None:
        return [task, report["key"], *["–"] * (len(COLUMNS) - 3), "not finished"]
    sign = 1 if report["higher"] else -1
    small = test["error"] is None or abs(test["difference"]) <= 2 * test["error"]
    result = "tie" if small else "designed" if sign * test["difference"] > 0 else "default"
    found = next(one for one in report["designs"] if one["id"] == report["finals"]["chosen"])
    shape = ", ".join(f"{name} {value}" for name, value in found["features"].items() if name != "coefficient")
    error = "" if test["error"] is None else f" ± {test['error']:.4f}"
    return [
        task, report["key"], spread(test, "default"), spread(test, "chosen"), f"{test['difference']:+.4f}{error}",
        f"{spread(held, 'default')} → {spread(held, 'chosen')}",
        f"{report['default']['cost']['active']:,} → {found['cost']['active']:,}", shape, result,
    ]  # fmt: skip


def spread(figure: dict[str, Any], name: str) -> str:
    more = figure[f"{name}_deviation"]
    return f"{figure[name]:.4f}" + (f" ± {more:.4f}" if more is not None else "")


def spent(task: str, report: dict[str, Any]) -> str:
    ended = report["ended"]
    return f"{task}: {len(report['trials'])} trials ({ended['pruned']} given up) in {duration(report['seconds'])}."


if __name__ == "__main__":
    main()
