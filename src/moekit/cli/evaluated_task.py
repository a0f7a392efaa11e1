"""What `moekit evaluate` does with the run of a task."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

# of a report, what is drawn on the page in place of being printed
FIGURES = ("experts_by", "sources")


def is_task(run: Path) -> bool:
    """Whether a folder is the run of a task."""
    return (run / "encoding.json").is_file()


def evaluated_task(run: Path, file: Path | None, by: tuple[str, ...], page: Path | None) -> dict[str, Any]:
    """The report of the run, written as a page too where one is named."""
    from moekit.recipes.task_report import evaluate_task

    return evaluate_task(run, file=file, by=by, page=page)


def experts_in_words(tables: Iterable[Mapping[str, Any]]) -> Iterator[str]:
    """A sentence for each column that experts were compared by."""
    if tables:
        from moekit.recipes.experts_of_columns import in_words

        yield from in_words(tables)
