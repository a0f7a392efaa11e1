"""Pieces of HTML that the sections share: headings, figures for wide and narrow windows, tables, lists."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from moekit.evaluate.charts.canvas import Drawing
from moekit.evaluate.charts.theme import escape

WIDE, NARROW = 540.0, 356.0
Draw = Callable[[float], Drawing]


def section(identity: str, title: str, intro: str, *content: str) -> str:
    """A section with a heading and an introduction (plain text, or HTML that the caller has escaped)."""
    lead = f"<p>{intro}</p>" if intro else ""
    return f'<section id="{identity}"><h2>{escape(title)}</h2>{lead}{"".join(content)}</section>\n'


def figure(draw: Draw, caption: str = "", wide: float = WIDE) -> str:
    """A chart drawn twice, for wide and for narrow windows, so that its letters keep their size."""
    below = f"<figcaption>{caption}</figcaption>" if caption else ""
    return (
        f'<figure><div class="wide">{draw(wide).to_svg()}</div>'
        f'<div class="narrow">{draw(NARROW).to_svg()}</div>{below}</figure>'
    )


def grid(figures: Iterable[str], css_class: str = "two") -> str:
    """Figures side by side where there is room."""
    return f'<div class="grid {css_class}">{"".join(figures)}</div>'


def facts(pairs: Sequence[tuple[str, str]]) -> str:
    """A list of names and values; both are escaped."""
    rows = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in pairs)
    return f'<dl class="facts">{rows}</dl>'


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of text: cells are HTML that the caller has escaped, the first of each row is its heading.

    In a narrow window each row becomes a paragraph, with the names of the columns before the values.
    """
    columns = "".join(f'<th scope="col">{cell}</th>' for cell in head)
    labels = [escape(cell) for cell in head]
    body = ""
    for first, *rest in rows:
        cells = "".join(
            f'<td data-label="{label}">{cell}</td>' for label, cell in zip(labels[1:], rest, strict=True)
        )
        body += f'<tr><th scope="row">{first}</th>{cells}</tr>'
    return (
        f'<div class="scroll"><table class="text"><thead><tr>{columns}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )
