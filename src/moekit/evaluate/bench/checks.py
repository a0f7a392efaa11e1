"""Is a contestant's answer the reference's, up to rounding? How far it may be off, and how far it is."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

Outputs = Mapping[str, Tensor]

# half the distance from 1 to the next number above
_UNIT = {torch.bfloat16: 2.0**-8, torch.float32: 2.0**-24}


@dataclass(frozen=True)
class Tolerance:
    """The largest relative deviation, as root mean squares: |answer - reference| / |reference|.

    Attributes:
        whole: over a whole tensor.
        row: over one row (the last axis), relative to that row or to the mean row, whichever is larger; so that a
            single wrong token or expert shows in a tensor of thousands.
        share: share of the rows that must keep `row`. Below 1 only where a router decides anew in each contestant:
            rounding flips choices that are nearly tied, and such a token has another answer.
    """

    whole: float
    row: float
    share: float = 1.0


@dataclass(frozen=True)
class Deviation:
    """How far one output is off; `reason` says what breaks the tolerance and is empty where nothing does."""

    output: str
    whole: float
    row: float
    tolerance: Tolerance
    reason: str = ""


def rounding(dtype: torch.dtype, steps: int, terms: int = 1) -> Tolerance:
    """What rounding allows after `steps` results stored in `dtype` on the way, and sums of `terms` in float32.

    Each result stored moves by at most one unit of rounding, and independent errors add up as squares; their root mean
    square is less than half of that, so a right answer passes with room and one wrong step in `dtype` does not.
    A row has few elements, so it may be off four times as far.

    >>> round(rounding(torch.bfloat16, steps=4).whole, 6), 2 * 2**-8
    (0.007813, 0.0078125)
    """
    whole = _UNIT[dtype] * math.sqrt(steps) + _UNIT[torch.float32] * math.sqrt(terms)
    return Tolerance(whole, 4 * whole)


def deviations(answer: Outputs, expected: Outputs, tolerances: Mapping[str, Tolerance]) -> list[Deviation]:
    """One `Deviation` for each output that is expected."""
    return [_deviation(name, answer.get(name), expected[name], tolerances[name]) for name in expected]


def _deviation(name: str, answer: Tensor | None, expected: Tensor, tolerance: Tolerance) -> Deviation:
    if answer is None:
        return Deviation(name, math.inf, math.inf, tolerance, f"gives no {name}")
    if answer.shape != expected.shape:
        shapes = f"{list(answer.shape)}, not {list(expected.shape)}"
        return Deviation(name, math.inf, math.inf, tolerance, f"gives {name} of shape {shapes}")
    # squares are summed row by row: the difference of a large tensor would be one more copy of it
    width = max(1, expected.shape[-1] if expected.dim() else 1)
    off, size = [], []
    for got, right in zip(_chunks(answer, width), _chunks(expected, width), strict=True):
        got, right = got.to(right.dtype), right
        off.append((got - right).square().mean(dim=1, dtype=torch.float64))
        size.append(right.square().mean(dim=1, dtype=torch.float64))
    per_row, squares = torch.cat(off), torch.cat(size)
    mean = squares.mean()
    whole = _ratio(per_row.mean(), mean)
    relative = (per_row / torch.maximum(squares, mean).clamp(min=1e-300)).sqrt()
    ordered, which = relative.nan_to_num(nan=math.inf).sort()
    index = min(len(ordered), math.ceil(tolerance.share * len(ordered))) - 1
    row, place = float(ordered[index]), int(which[index])
    reason = ""
    if not whole <= tolerance.whole:  # NaN is not smaller than anything
        reason = f"{name} is off by {whole:.2g} of its size; {tolerance.whole:.2g} is allowed"
    elif not row <= tolerance.row:
        rows = f"row {place} of" if tolerance.share == 1 else f"{1 - tolerance.share:.0%} of the rows of"
        more = "" if tolerance.share == 1 else " or more"
        reason = f"{rows} {name} is off by {row:.2g}{more} of its size; {tolerance.row:.2g} is allowed"
    return Deviation(name, whole, row, tolerance, reason)


def _ratio(error: Tensor, size: Tensor) -> float:
    if float(size) == 0:
        return 0.0 if float(error) == 0 else math.inf
    ratio = float((error / size).sqrt())
    return math.inf if math.isnan(ratio) else ratio


def _chunks(tensor: Tensor, width: int, elements: int = 1 << 22) -> tuple[Tensor, ...]:
    return tensor.detach().reshape(-1, width).split(max(1, elements // width))
