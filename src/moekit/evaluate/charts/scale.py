"""From values to pixels: linear and logarithmic axes with ticks at round numbers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import pairwise

from moekit.evaluate.charts.numbers import format_count, format_number, is_number

Format = Callable[[float], str]


@dataclass(frozen=True)
class Scale:
    """Maps `low..high` to the pixels `start..end`, linearly or by logarithm.

    >>> Scale(0, 10, 100, 200).at(5)
    150.0
    >>> Scale(1, 100, 0, 10, log=True).at(10)
    5.0
    """

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def at(self, value: float) -> float:
        """Pixel of `value`; a value outside the range lands outside the pixels."""
        low, high = self.low, self.high
        if self.log:
            low, high, value = math.log10(low), math.log10(high), math.log10(max(value, 1e-300))
        return self.start + (value - low) / (high - low) * (self.end - self.start)

    def shows(self, value: object) -> bool:
        """True if `value` is a finite number that this axis can place."""
        return is_number(value) and (not self.log or value > 0)


def make_scale(
    values: Iterable[object],
    start: float,
    end: float,
    *,
    log: bool = False,
    limits: tuple[float | None, float | None] | None = None,
    padding: float = 0.05,
) -> Scale:
    """A scale that holds all finite `values`; a constant or empty series gets room around it.

    Args:
        values: data; None, NaN and, on a log axis, values not above zero are passed over.
        limits: low and high that override the data's; None leaves one to the data.
        padding: share of the range added at each end that `limits` does not fix.
    """
    finite = [float(value) for value in values if is_number(value) and (not log or value > 0)]
    low, high = (min(finite), max(finite)) if finite else ((1.0, 10.0) if log else (0.0, 1.0))
    fixed_low, fixed_high = limits or (None, None)
    low = low if fixed_low is None else fixed_low
    high = high if fixed_high is None else fixed_high
    if log:
        if not 0 < low < high * (1 - 1e-9):
            low, high = high / 2 if high > 0 else 1.0, high * 2 if high > 0 else 10.0
        grow = (high / low) ** padding
        return Scale(low if fixed_low else low / grow, high if fixed_high else high * grow, start, end, True)
    if not high - low > 1e-12 * max(abs(low), abs(high), 1e-300):
        room = abs(low) * 0.1 if abs(low) > 1e-200 else 0.5
        low, high = low - room, low + room
        return Scale(low, high, start, end)
    room = (high - low) * padding
    return Scale(
        low if fixed_low is not None else low - room,
        high if fixed_high is not None else high + room,
        start,
        end,
    )


def ticks(scale: Scale, wanted: int = 5) -> list[float]:
    """Round values inside the scale, about `wanted` of them.

    >>> ticks(Scale(0, 1, 0, 100))
    [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    >>> ticks(Scale(1, 1000, 0, 100, log=True))
    [1.0, 10.0, 100.0, 1000.0]
    """
    if scale.log:
        return _log_ticks(scale, wanted)
    span = scale.high - scale.low
    rough = span / max(1, wanted)
    power = 10.0 ** math.floor(math.log10(rough))
    step = min((factor * power for factor in (1, 2, 2.5, 5, 10)), key=lambda size: abs(span / size - wanted))
    first = math.ceil(scale.low / step - 1e-9)
    last = math.floor(scale.high / step + 1e-9)
    return [_plain(index * step) for index in range(first, last + 1)]


def tick_format(values: list[float], log: bool = False) -> Format:
    """A format for tick labels: as few decimals as tell the ticks apart, k and M for large ones.

    >>> [tick_format([0.0, 0.5, 1.0])(0.5), tick_format([0.001, 1.0], log=True)(1.0)]
    ['0.5', '1']
    """
    if log:
        return lambda value: f"{value:.3g}" if abs(value) < 1 else format_count(value)
    if not values or max(abs(value) for value in values) >= 10_000:
        return format_count
    gaps = [abs(b - a) for a, b in pairwise(values)] or [abs(values[0]) or 1.0]
    for decimals in range(7):
        if all(abs(round(value, decimals) - value) < min(gaps) * 1e-3 for value in values):
            return lambda value: format_number(value, decimals)
    return lambda value: f"{value:.2g}"


def _log_ticks(scale: Scale, wanted: int) -> list[float]:
    first, last = math.floor(math.log10(scale.low)), math.ceil(math.log10(scale.high))
    inside = lambda value: scale.low * (1 - 1e-9) <= value <= scale.high * (1 + 1e-9)  # noqa: E731
    decades = [10.0**power for power in range(first, last + 1) if inside(10.0**power)]
    if len(decades) >= 3:
        stride = math.ceil(len(decades) / max(1, wanted))
        return decades[::stride]
    for factors in ((1, 3), (1, 2, 5), tuple(range(1, 10))):
        candidates = [_plain(f * 10.0**power) for power in range(first, last + 1) for f in factors]
        found = [value for value in candidates if inside(value)]
        if len(found) >= 3:
            return found
    linear = Scale(scale.low, scale.high, scale.start, scale.end)
    return [value for value in ticks(linear, wanted) if value > 0]


def _plain(value: float) -> float:
    """Without the last digits of binary arithmetic: 0.30000000000000004 becomes 0.3, -0.0 becomes 0.0."""
    return float(f"{value:.12g}") + 0.0
