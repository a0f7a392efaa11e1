"""A drawing: SVG elements with named colours, which `to_svg` writes for a page or as a file of its own."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

from moekit.evaluate.charts.theme import COLOURS, FONT, escape

NAMESPACE = "http://www.w3.org/2000/svg"
TEXT_SIZE = 12.0
SMALL_SIZE = 11.0
HEADING_SIZE = 13.5


class Drawing:
    """Elements on a canvas of `width` x `height` pixels; the origin is the upper left corner.

    Colours are names of `theme.COLOURS`. A drawing can be placed inside another, which is how small multiples
    and figures of several panels are made.

    >>> drawing = Drawing(100, 20)
    >>> drawing.text(0, 12, "a < b")
    >>> "a &lt; b" in drawing.to_svg("An example")
    True
    """

    def __init__(self, width: float, height: float) -> None:
        self.width = width
        self.height = height
        self.title = ""
        self.description = ""
        self._parts: list[str] = []
        self._classes: set[str] = set()
        self._n_ids = 0

    def add(
        self,
        tag: str,
        *,
        fill: str | None = None,
        stroke: str | None = None,
        tip: str | None = None,
        content: str | None = None,
        css_class: str | None = None,
        **attributes: float | str | None,
    ) -> None:
        """Append one element; `tip` is shown on hover, `content` is its text, underscores become hyphens."""
        self._parts.append(self._open(tag, fill, stroke, css_class, attributes))
        inner = f"<title>{escape(tip)}</title>" if tip else ""
        if content is not None:
            inner += escape(content)
        self._parts[-1] += f">{inner}</{tag}>" if inner else "/>"

    def text(
        self,
        x: float,
        y: float,
        content: str,
        *,
        size: float = SMALL_SIZE,
        fill: str = "ink",
        anchor: str = "start",
        weight: str | None = None,
        tip: str | None = None,
        halo: bool = False,
    ) -> None:
        """Write `content` with its baseline at `y`; `halo` draws the background around the letters."""
        self.add(
            "text",
            fill=fill,
            stroke="surface" if halo else None,
            x=x,
            y=y,
            font_size=size,
            text_anchor=None if anchor == "start" else anchor,
            font_weight=weight,
            stroke_width=3 if halo else None,
            stroke_linejoin="round" if halo else None,
            paint_order="stroke" if halo else None,
            tip=tip,
            content=content,
        )

    def line(
        self,
        x1: float,
        y1: float,
        x2: float,
        y2: float,
        *,
        stroke: str = "grid",
        dash: str | None = None,
        thickness: float | None = None,
    ) -> None:
        """Draw a straight line."""
        self.add(
            "line", stroke=stroke, x1=x1, y1=y1, x2=x2, y2=y2,
            stroke_dasharray=dash or None, stroke_width=thickness,
        )  # fmt: skip

    @contextmanager
    def group(self, *, transform: str) -> Iterator[None]:
        """Put what is drawn inside the `with` into one `<g>`."""
        self._parts.append(f'<g transform="{transform}">')
        yield
        self._parts.append("</g>")

    @contextmanager
    def clipped(self, x: float, y: float, width: float, height: float) -> Iterator[None]:
        """Show what is drawn inside the `with` only within a rectangle."""
        # The NUL, which no text can hold (`theme.clean`), becomes a name of the whole drawing in `to_svg`.
        identity = f"\0clip{self._n_ids}"
        self._n_ids += 1
        self._parts.append(
            f'<clipPath id="{identity}"><rect x="{_write(x)}" y="{_write(y)}" width="{_write(width)}" '
            f'height="{_write(height)}"/></clipPath><g clip-path="url(#{identity})">'
        )
        yield
        self._parts.append("</g>")

    def place(self, other: Drawing, x: float, y: float) -> None:
        """Draw all of `other` with its upper left corner at `(x, y)`."""
        with self.group(transform=f"translate({_write(x)} {_write(y)})"):
            self._parts.extend(part.replace("\0", f"\0{self._n_ids}-") for part in other._parts)
        self._n_ids += 1
        self._classes |= other._classes

    def to_svg(self, title: str = "", description: str = "", *, standalone: bool = False) -> str:
        """The drawing as one `<svg>` element.

        Args:
            title: what the chart shows, for readers that cannot see it; the drawing's own by default.
            description: the finding or the data in a sentence; the drawing's own by default.
            standalone: for a file of its own: colours for light and dark inside, a background, a fixed size.
        """
        title, description = title or self.title, description or self.description
        body = "".join(self._parts)
        margin = 14.0 if standalone else 0.0
        full_width, full_height = self.width + 2 * margin, self.height + 2 * margin
        width, height = _write(full_width), _write(full_height)
        classes = self._classes | ({"f-surface", "s-grid"} if standalone else set())
        backdrop = ""
        if standalone:
            # A viewer whose page is dark while the system is light still gets dark ink on a light card.
            backdrop = (
                f'<rect class="f-surface s-grid" x="0.5" y="0.5" width="{_write(full_width - 1)}" '
                f'height="{_write(full_height - 1)}" rx="6"/>'
            )
            body = f'<g transform="translate({_write(margin)} {_write(margin)})">{body}</g>'
        digest = hashlib.sha256((title + description + width + body).encode("utf-8", "replace")).hexdigest()[
            :8
        ]
        body = body.replace("\0", digest)
        label = f'aria-labelledby="t{digest}"'
        heading = f'<title id="t{digest}">{escape(title)}</title>'
        if description:
            label = f'aria-labelledby="t{digest} d{digest}"'
            heading += f'<desc id="d{digest}">{escape(description)}</desc>'
        size = f'width="{width}" height="{height}" ' if standalone else ""
        return (
            f'<svg xmlns="{NAMESPACE}" class="{"mk-file" if standalone else "mk"}" role="img" {label} {size}'
            f'viewBox="0 0 {width} {height}" font-family="{escape(FONT)}">{heading}'
            f"<style>{_stylesheet(classes, standalone)}</style>{backdrop}{body}</svg>"
        )

    def _open(
        self,
        tag: str,
        fill: str | None,
        stroke: str | None,
        css_class: str | None,
        attributes: dict[str, float | str | None],
    ) -> str:
        classes = [css_class] if css_class else []
        for prefix, name in (("f-", fill), ("s-", stroke)):
            if name in COLOURS:
                classes.append(prefix + name)
                self._classes.add(prefix + name)
            elif name is not None:
                attributes = {"fill" if prefix == "f-" else "stroke": name, **attributes}
        text = f"<{tag}"
        if classes:
            text += f' class="{" ".join(classes)}"'
        for key, value in attributes.items():
            if value is not None:
                shown = escape(value) if isinstance(value, str) else _write(value)
                text += f' {key.replace("_", "-")}="{shown}"'
        return text


def _write(value: float) -> str:
    """A coordinate with at most two decimals."""
    text = f"{value:.2f}".rstrip("0").rstrip(".")
    return "0" if text in ("-0", "") else text


def _stylesheet(classes: set[str], standalone: bool) -> str:
    """Rules for the colour classes in use: literal colours in a file, variables with fallbacks in a page."""
    root = ".mk-file" if standalone else ".mk"
    properties = {"f": "fill", "s": "stroke"}
    names = [(css_class, css_class[2:], properties[css_class[0]]) for css_class in sorted(classes)]
    if not standalone:
        return "".join(
            f"{root} .{css_class}{{{prop}:var(--mk-{name},{COLOURS[name][0]})}}"
            for css_class, name, prop in names
        )
    rules = ["", ""]
    for css_class, name, prop in names:
        for dark in (0, 1):
            rules[dark] += f"{root} .{css_class}{{{prop}:{COLOURS[name][dark]}}}"
    return f"{rules[0]}@media (prefers-color-scheme: dark){{{rules[1]}}}"
