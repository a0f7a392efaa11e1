"""Numbers written for people: `1.2 M`, `45 s`, `3.1 GB`. What is missing (None, NaN) becomes a dash."""

from __future__ import annotations

import math
from typing import TypeGuard

MISSING = "–"
MINUS = "\N{MINUS SIGN}"
_COUNT_UNITS = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))
_BYTE_UNITS = ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"))


def is_number(value: object) -> TypeGuard[float]:
    """True for a finite int or float; False for None, NaN, infinities, booleans and everything else."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def format_number(value: float | None, digits: int = 3) -> str:
    """Fixed number of decimals, with a true minus sign.

    >>> format_number(2.03149), format_number(-0.5, 1), format_number(None)
    ('2.031', '−0.5', '–')
    """
    if not is_number(value):
        return MISSING
    text = f"{abs(value):.{digits}f}"
    negative = value < 0 and float(text) != 0
    return (MINUS if negative else "") + text


def format_count(value: float | None) -> str:
    """Three significant digits with k, M, G or T; whole numbers below 1,000 stay whole.

    >>> [format_count(v) for v in (0, 16, 4096, 1_234_567, 999_999, 0.25)]
    ['0', '16', '4.1 k', '1.23 M', '1 M', '0.25']
    """
    return _with_unit(value, _COUNT_UNITS, "")


def format_bytes(value: float | None) -> str:
    """Bytes in powers of 1,000.

    >>> [format_bytes(v) for v in (512, 20_000, 3_100_000_000)]
    ['512 B', '20 kB', '3.1 GB']
    """
    return _with_unit(value, _BYTE_UNITS, " B")


def format_duration(seconds: float | None) -> str:
    """Seconds in the two largest units that matter.

    >>> [format_duration(v) for v in (0.0042, 1.25, 45, 200, 3600, 9000, 200_000)]
    ['4.2 ms', '1.25 s', '45 s', '3 min 20 s', '1 h', '2 h 30 min', '2 d 8 h']
    """
    if not is_number(seconds):
        return MISSING
    if seconds < 0:
        return MINUS + format_duration(-seconds)
    if 0 < seconds < 1:
        return f"{_significant(seconds * 1e3)} ms"
    if seconds < 59.95:
        return f"{_significant(seconds)} s"
    for small, small_name, large, large_name in ((1, "s", 60, "min"), (60, "min", 3600, "h")):
        whole = round(seconds / small)
        if whole * small < large * (60 if large == 60 else 24):
            first, rest = divmod(whole, large // small)
            return f"{first} {large_name}" + (f" {rest} {small_name}" if rest else "")
    days, hours = divmod(round(seconds / 3600), 24)
    return f"{days} d" + (f" {hours} h" if hours else "")


def format_percent(share: float | None, digits: int = 1) -> str:
    """A share as a percentage.

    >>> format_percent(0.5634), format_percent(0.5634, 0), format_percent(None)
    ('56.3%', '56%', '–')
    """
    return format_number(share * 100, digits) + "%" if is_number(share) else MISSING


def format_change(share: float | None, digits: int = 1) -> str:
    """A relative change with its sign; what rounds to nothing has no sign.

    >>> format_change(-0.0381), format_change(0.012), format_change(0.0001)
    ('−3.8%', '+1.2%', '0.0%')
    """
    if not is_number(share):
        return MISSING
    text = format_percent(share, digits)
    grows = share > 0 and float(text[:-1]) != 0
    return ("+" if grows else "") + text


def _with_unit(value: float | None, units: tuple[tuple[float, str], ...], plain: str) -> str:
    if not is_number(value):
        return MISSING
    if value < 0:
        return MINUS + _with_unit(-value, units, plain)
    for index, (size, name) in enumerate(units):
        if value >= size:
            text = _significant(value / size)
            if text == "1000" and index > 0:
                return f"1 {units[index - 1][1]}"
            return f"{text} {name}"
    text = _significant(value)
    return f"1 {units[-1][1]}" if text == "1000" else text + plain


def _significant(value: float) -> str:
    """Three significant digits without trailing zeros.

    >>> _significant(4.096), _significant(20.0), _significant(123.4)
    ('4.1', '20', '123')
    """
    if value == 0:
        return "0"
    decimals = max(0, 2 - math.floor(math.log10(abs(value))))
    text = f"{value:.{decimals}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text
