"""Loss curves of a report: which loss to draw, how to smooth it, where one model reaches another's loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from moekit.evaluate.charts.numbers import is_number

Point = Mapping[str, Any]


def loss_key(models: Mapping[str, Mapping[str, Any]]) -> str:
    """`validation_loss` if every model has at least two of them, else `loss`, the training loss."""
    curves = [model["curve"] for model in models.values()]
    measured = [sum(is_number(point.get("validation_loss")) for point in curve) for curve in curves]
    return "validation_loss" if measured and min(measured) >= 2 else "loss"


def points(curve: Sequence[Point], key: str, axis: str) -> tuple[list[float], list[float]]:
    """Places on `axis` ("step", "tokens", "seconds") and values of `key`, where both are finite."""
    pairs = [
        (point[axis], point.get(key))
        for point in curve
        if is_number(point.get(axis)) and is_number(point.get(key))
    ]
    return [float(x) for x, _ in pairs], [float(y) for _, y in pairs if y is not None]


def smooth(values: Sequence[float], window: int) -> list[float]:
    """Mean over a centred window, which shrinks at the ends so that it stays centred.

    >>> smooth([0.0, 3.0, 0.0, 3.0, 0.0], 3)
    [0.0, 1.0, 2.0, 1.0, 0.0]
    """
    half = window // 2
    result = []
    for index in range(len(values)):
        reach_out = min(half, index, len(values) - 1 - index)
        part = values[index - reach_out : index + reach_out + 1]
        result.append(sum(part) / len(part))
    return result


def smoothed(curve: Sequence[Point], key: str, axis: str) -> tuple[list[float], list[float]]:
    """`points`, a training loss averaged over a twelfth of the curve, a validation loss as it is."""
    x, y = points(curve, key, axis)
    return x, (smooth(y, max(1, len(y) // 12)) if key == "loss" else y)


def reach(curve: Sequence[Point], loss: float, axis: str, key: str = "validation_loss") -> float | None:
    """Where on `axis` a curve first comes down to `loss`, by linear interpolation; None if it never does.

    >>> curve = [{"step": 0, "validation_loss": 4.0}, {"step": 10, "validation_loss": 2.0}]
    >>> reach(curve, 3.0, "step")
    5.0
    """
    x, y = smoothed(curve, key, axis)
    for index, value in enumerate(y):
        if value <= loss:
            if index == 0:
                return x[0]
            share = (y[index - 1] - loss) / (y[index - 1] - value)
            return x[index - 1] + share * (x[index] - x[index - 1])
    return None


def final_loss(curve: Sequence[Point], key: str) -> float | None:
    """The last value of a curve, smoothed as it is drawn; None for an empty curve."""
    y = smoothed(curve, key, "step")[1]
    return y[-1] if y else None


def to_dense_loss(models: Mapping[str, Mapping[str, Any]]) -> dict[str, float | None]:
    """The report's `to_dense_loss`: what the MoE needs for the dense twin's final loss, as shares.

    Uses validation losses where both models have them. None where the MoE never gets there or a curve is
    missing.
    """
    shares: dict[str, float | None] = {"steps_share": None, "seconds_share": None}
    if "moe" not in models or "dense" not in models:
        return shares
    pair = {name: models[name] for name in ("dense", "moe")}
    key = loss_key(pair)
    target = final_loss(pair["dense"]["curve"], key)
    for name, axis in (("steps_share", "step"), ("seconds_share", "seconds")):
        whole = points(pair["dense"]["curve"], key, axis)[0]
        place = None if target is None else reach(pair["moe"]["curve"], target, axis, key)
        if place is not None and whole and whole[-1] > 0:
            shares[name] = place / whole[-1]
    return shares
