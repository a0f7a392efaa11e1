"""Colours by name, once for light and once for dark, and the measures of text that a chart needs.

The first four series colours keep apart for the three kinds of colour blindness (distance in OKLab under the
simulation of Machado et al. 2009), and all reach a contrast of 4.5 : 1 on their background;
`tests/evaluate/test_chart_theme.py` measures both. Lines also differ in dashes, never in colour alone.
"""

from __future__ import annotations

import re
import unicodedata

COLOURS: dict[str, tuple[str, str]] = {
    "surface": ("#ffffff", "#0d1117"),
    "ink": ("#1f2328", "#e6edf3"),
    "muted": ("#59636e", "#9aa4af"),
    "grid": ("#e4e8ec", "#262c36"),
    "axis": ("#8c959f", "#68727d"),
    # heat lies over the surface; above one opacity (heatmap._DARK_CELL) cell-high is the easier to read
    "heat": ("#00379a", "#58a6ff"),
    "cell-low": ("#000000", "#ffffff"),
    "cell-high": ("#ffffff", "#000000"),
    "track": ("#eef1f4", "#1b222c"),
    "s1": ("#0a5fb4", "#4493f8"),
    "s2": ("#c2500a", "#f0883e"),
    "s3": ("#7a1f62", "#f0bfe4"),
    "s4": ("#6e7781", "#9aa4af"),
    "s5": ("#2f7d32", "#7fd18a"),
    "s6": ("#9a6700", "#d9b23a"),
    "s7": ("#a40e26", "#ff8182"),
    "s8": ("#007d8a", "#5ed0c4"),
}
SERIES = tuple(name for name in COLOURS if re.fullmatch(r"s\d", name))
DASHES = ("", "6 3", "2 3", "8 3 2 3")

FONT = (
    "system-ui, -apple-system, 'Segoe UI', Roboto, 'Noto Sans', 'Helvetica Neue', Arial, "
    "'PingFang SC', 'Hiragino Sans GB', 'Microsoft YaHei', 'Noto Sans CJK SC', 'Noto Sans SC', "
    "'WenQuanYi Micro Hei', sans-serif"
)
MONOSPACE = (
    "ui-monospace, 'SF Mono', 'Cascadia Mono', Menlo, Consolas, 'DejaVu Sans Mono', 'Noto Sans Mono CJK SC', "
    "'PingFang SC', 'Microsoft YaHei', 'Noto Sans CJK SC', monospace"
)

_NARROW = set("iljtfr.,:;'|!()[]{}I ")
_WIDE = set("mwMWOQGD@%—–+=<>")
# What XML 1.0 forbids, lone surrogates (no UTF-8 file can hold them), and marks that turn a line around.
_FORBIDDEN = re.compile(
    "[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufdd0-\ufdef\ufffe\uffff\u202a-\u202e\u2066-\u2069]"
)


def css_variables(dark: bool) -> str:
    """Declarations `--mk-NAME: colour;` for the light or the dark page."""
    return " ".join(f"--mk-{name}: {pair[dark]};" for name, pair in COLOURS.items())


def clean(text: object) -> str:
    """Text that any XML or HTML file can hold: characters that XML forbids become U+FFFD.

    >>> clean("a\\x00b\\ud800")
    'a\N{REPLACEMENT CHARACTER}b\N{REPLACEMENT CHARACTER}'
    """
    return _FORBIDDEN.sub("\N{REPLACEMENT CHARACTER}", str(text).replace("\r\n", "\n").replace("\r", "\n"))


def escape(text: object) -> str:
    """Text made safe between tags and inside quoted attributes.

    >>> escape('<script>"&')
    '&lt;script&gt;&quot;&amp;'
    """
    safe = clean(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return safe.replace('"', "&quot;").replace("'", "&#39;")


def text_width(text: str, size: float) -> float:
    """Width in pixels that `text` takes at most in a common sans-serif face; Chinese counts one em."""
    width = 0.0
    for character in text:
        if unicodedata.east_asian_width(character) in "WF":
            width += 1.0
        elif unicodedata.combining(character):
            continue
        elif character in _NARROW:
            width += 0.34
        elif character in _WIDE:
            width += 0.95
        elif character.isdigit():
            width += 0.64
        elif character.isupper():
            width += 0.72
        else:
            width += 0.62
    return width * size


def shorten(text: str, size: float, room: float) -> str:
    """`text`, or its beginning with an ellipsis where it is wider than `room` pixels.

    >>> shorten("a name that is far too long", 12, 60)
    'a name…'
    """
    text = " ".join(clean(text).split())
    if text_width(text, size) <= room:
        return text
    while text and text_width(text + "…", size) > room:
        text = text[:-1]
    return text.rstrip() + "…"
