"""Tables in the pages equal the results that they come from; the script refuses what is wrong."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
specification = importlib.util.spec_from_file_location(
    "generate_tables", ROOT / "docs" / "generate_tables.py"
)
assert specification is not None
assert specification.loader is not None
tables = importlib.util.module_from_spec(specification)
specification.loader.exec_module(tables)

RESULT = {
    "command": "moekit league",
    "created": "2026-01-31",
    "title": "League",
    "note": "One seed.",
    "table": {
        "columns": ["router", "loss", "tokens", "won"],
        "rows": [["softmax", 3.21456, 1234567, True], ["a|b", None, 8, False]],
    },
}
TABLE = """**League**

| router | loss | tokens | won |
| --- | ---: | ---: | --- |
| softmax | 3.215 | 1,234,567 | yes |
| a&#124;b | – | 8 | no |

One seed.

Made by `moekit league` on 2026-01-31.
"""


@pytest.fixture
def checkout(tmp_path) -> Path:
    (tmp_path / "docs" / "results").mkdir(parents=True)
    (tmp_path / "docs" / "results" / "league.json").write_text(json.dumps(RESULT))
    (tmp_path / "README.md").write_text("# x\n\n<!-- table: league -->\nold\n<!-- /table -->\nafter\n")
    return tmp_path


def test_the_tables_of_this_checkout_equal_their_results(capsys):
    assert tables.main(["--check"]) == 0, capsys.readouterr().out


def test_every_result_of_this_checkout_is_whole():
    for path in (ROOT / "docs" / "results").glob("*.json"):
        result = tables.load(path, "test")
        assert result["command"]
        assert result["created"]
        assert result["table"]["rows"]


def test_a_block_is_filled(checkout, capsys):
    assert tables.main(["--root", str(checkout)]) == 0
    text = (checkout / "README.md").read_text()
    assert text == f"# x\n\n<!-- table: league -->\n{TABLE}<!-- /table -->\nafter\n"
    assert tables.main(["--root", str(checkout), "--check"]) == 0


def test_check_sees_an_old_table_and_changes_nothing(checkout, capsys):
    before = (checkout / "README.md").read_text()
    assert tables.main(["--root", str(checkout), "--check"]) == 1
    assert "README.md: out of date" in capsys.readouterr().out
    assert (checkout / "README.md").read_text() == before


@pytest.mark.parametrize(
    ("page", "result", "words"),
    [
        ("<!-- table: other -->\n<!-- /table -->", RESULT, "no other.json"),
        ("<!-- table: league -->\n", RESULT, "not closed"),
        (
            "<!-- table: league -->\n<!-- /table -->",
            {"title": "x"},
            "league.json lacks command, created, note, table",
        ),
        (
            "<!-- table: league -->\n<!-- /table -->",
            {**RESULT, "table": {"columns": ["a", "b"], "rows": [[1]]}},
            "row 1 has 1 cells; there are 2 columns",
        ),
    ],
)
def test_what_is_wrong_is_named(checkout, capsys, page, result, words):
    (checkout / "README.md").write_text(page)
    (checkout / "docs" / "results" / "league.json").write_text(json.dumps(result))
    assert tables.main(["--root", str(checkout)]) == 1
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (1.93812, "1.938"),
        (0.04, "0.04"),
        (12345.6, "12,346"),
        (0.0, "0"),
        (1e-5, "1e-05"),
        ("1.2 ± 0.1", "1.2 ± 0.1"),
        (-3, "-3"),
    ],
)
def test_cells(value, shown):
    assert tables.cell(value) == shown


def test_numbers_written_as_text_stand_right_too():
    result = {
        **RESULT,
        "table": {"columns": ["a", "b"], "rows": [["x", "3.21 ± 0.01"], ["y", "–"], ["z", "1,204"]]},
    }
    assert "| --- | ---: |" in tables.render(result)
