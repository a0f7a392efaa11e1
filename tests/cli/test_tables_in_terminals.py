"""Tables of results in terminals of any width."""

from __future__ import annotations

import pytest

from moekit.cli.output import print_result

RESULT = {
    "title": "Slots", "note": "As it is.",
    "table": {
        "columns": ["model", "area exact_match", "device exact_match", "content exact_match", "active", "total"],
        "rows": [["crf", "0.7312 ± 0.0032", "0.8", "0.9", "–", "–"],
                 ["**MoE**", "0.7412 ± 0.0042", "0.81", "0.91", "1", "2"]],
    },
}  # fmt: skip


@pytest.mark.parametrize("width", [200, 70])
def test_figures_stay_whole(monkeypatch, capsys, width):
    monkeypatch.setenv("COLUMNS", str(width))
    print_result(RESULT)
    said = capsys.readouterr().out
    for text in (
        "Slots",
        "As it is.",
        "content exact_match",
        "0.7312 ± 0.0032",
        "0.7412 ± 0.0042",
        "MoE",
        "crf",
    ):
        assert text in said
    assert "**" not in said
    assert "…" not in said
    assert max(map(len, said.splitlines())) <= width
    # models below each other in a wide terminal, beside each other in a narrow one
    assert any("crf" in line and "MoE" in line for line in said.splitlines()) == (width == 70)


def test_a_table_that_fits_in_no_way_is_paragraphs(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "60")
    rows = [[f"recipe {number}", *["0.1234 ± 0.0001"] * 5] for number in range(40)]
    print_result({**RESULT, "table": {**RESULT["table"], "rows": rows}})
    said = capsys.readouterr().out.splitlines()
    assert max(map(len, said)) <= 60
    place = said.index("recipe 7")
    assert said[place + 1] == "  area exact_match: 0.1234 ± 0.0001"
    assert said[place + 5] == "  total: 0.1234 ± 0.0001"
