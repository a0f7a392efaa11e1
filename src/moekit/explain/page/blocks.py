"""Pieces of HTML that the sections of the observatory share: the place of a figure, and tables that sort."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from moekit.evaluate.charts.numbers import format_number, format_percent, is_number
from moekit.evaluate.charts.theme import escape

Cell = tuple[str, float | None] | str


def figure(kind: str, caption: str) -> str:
    """The place of a figure that the script draws."""
    return (
        f'<figure class="chart" data-chart="{kind}"><div class="bar"><h3></h3><span class="save"></span></div>'
        f'<div class="plot" role="img"></div><figcaption>{caption}</figcaption></figure>'
    )


def sortable(name: str, head: Sequence[str], rows: Iterable[Sequence[Cell]]) -> str:
    """A table that sorts by a click on a heading; cells are HTML, or a number with how it is written."""

    def cell(value: Cell, label: str) -> str:
        if isinstance(value, str):
            return f'<td data-label="{label}">{value}</td>'
        number = "" if value[1] is None else repr(float(value[1]))
        return f'<td class="n" data-label="{label}" data-value="{number}">{value[0]}</td>'

    body, numeric, n_rows = "", set(), 0
    for first, *rest in rows:
        n_rows += 1
        numeric |= {place for place, value in enumerate(rest) if not isinstance(value, str)}
        cells = "".join(cell(value, escape(label)) for value, label in zip(rest, head[1:], strict=True))
        body += f'<tr><th scope="row">{first}</th>{cells}</tr>'
    columns = "".join(
        f'<th scope="col"{" class=n" if place - 1 in numeric else ""}>{escape(word)}</th>'
        for place, word in enumerate(head)
    )
    return (
        f'<div data-table="{escape(name)}"><div class="bar"><h3>{escape(name)}</h3><span class="save"></span></div>'
        f'<div class="scroll{" tall" if n_rows > 24 else ""}"><table class="text sortable">'
        f"<thead><tr>{columns}</tr></thead><tbody>{body}</tbody></table></div></div>"
    )


def number_cell(value: float | None, digits: int = 3) -> Cell:
    """A number as a cell of `sortable`."""
    return format_number(value, digits), value if is_number(value) else None


def share_cell(value: float | None, digits: int = 1) -> Cell:
    """A share as a cell of `sortable`, in percent."""
    return format_percent(value, digits), value if is_number(value) else None
