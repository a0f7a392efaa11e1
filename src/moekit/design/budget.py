"""What a search may spend: `active=0.8M,total=4M,latency=5ms,time=20m`, read and checked.

A number of parameters or examples is a number (`800k`, `4M`), `default` (that of the default recipe) or a multiple of
it (`2x`).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from moekit.config.errors import ConfigError, nearest

# the limits of each verb, in the order of the documentation
DESIGN_LIMITS = ("active", "total", "latency", "time")
TUNE_LIMITS = ("examples", "time")
_NUMBER = r"(\d+(?:\.\d*)?|\.\d+)"
_PREFIXES = {"": 1, "k": 1e3, "m": 1e6, "g": 1e9, "b": 1e9}
_SECONDS = {"us": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0, "d": 86400.0}


@dataclass(frozen=True)
class Amount:
    """A number, or a multiple of what the default recipe has."""

    value: float
    of_default: bool = False

    def of(self, default: float) -> int:
        """The number, where the default recipe has `default`.

        >>> Amount(1.5, of_default=True).of(1000), Amount(800.0).of(1000)
        (1500, 800)
        """
        return math.floor(self.value * default if self.of_default else self.value)


@dataclass(frozen=True)
class Budget:
    """Limits of a search; None where there is none.

    Attributes: active, total: parameters. latency: seconds for one example (one sequence of a language model) in
        evaluation. examples: that one run trains on. time: seconds for everything.

    >>> budget = parse_budget("active=default,total=4M,latency=5ms,time=1h30m")
    >>> budget.total.value, budget.latency, budget.time
    (4000000.0, 0.005, 5400.0)
    """

    active: Amount = Amount(1.0, of_default=True)
    total: Amount | None = None
    latency: float | None = None
    examples: Amount = Amount(1.0, of_default=True)
    time: float | None = None


def parse_budget(text: str, known: Sequence[str] = DESIGN_LIMITS) -> Budget:
    """The budget that a text names.

    Args:
        text: `name=value` with commas between them; empty for none.
        known: names that are allowed.

    Errors: `ConfigError` with field, value, rule and remedy.
    """
    found: dict[str, object] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, equals, value = (piece.strip() for piece in part.partition("="))
        if not equals or not value:
            raise ConfigError(
                f"budget: {part!r} must be name=value. Write for example active=default,time=20m"
            )
        if name not in known:
            raise ConfigError(f"budget.{name} is no limit: {nearest(name, known)}")
        if name in found:
            raise ConfigError(f"budget.{name} is given twice; got {value!r} as well. Name it once")
        read: Callable[[str, str], object] = _seconds if name in ("latency", "time") else _amount
        found[name] = read(name, value)
    return Budget(**found)  # type: ignore[arg-type]


def _amount(name: str, value: str) -> Amount:
    text = value.lower().replace("_", "")
    if text == "default":
        return Amount(1.0, of_default=True)
    matched = re.fullmatch(_NUMBER + r"\s*([a-z]?)", text)
    unit = matched.group(2) if matched else ""
    if matched is None or unit not in (*_PREFIXES, "x") or float(matched.group(1)) <= 0:
        raise ConfigError(
            f"budget.{name} must be a positive number such as 800k or 4M, default, or a multiple of the default "
            f"such as 2x; got {value!r}. Write for example {name}=default"
        )
    if unit == "x":
        return Amount(float(matched.group(1)), of_default=True)
    return Amount(float(matched.group(1)) * _PREFIXES[unit])


def _seconds(name: str, value: str) -> float:
    example = "5ms" if name == "latency" else "20m"
    parts = re.findall(_NUMBER + r"\s*([a-z]+)", value.lower())
    whole = re.sub(r"\s", "", value.lower())
    known = "".join(number + unit for number, unit in parts) == whole and all(
        unit in _SECONDS for _, unit in parts
    )
    seconds = sum(float(number) * _SECONDS[unit] for number, unit in parts) if known else 0.0
    if seconds <= 0:
        raise ConfigError(
            f"budget.{name} must be a positive time with its unit (us, ms, s, m, h, d); got {value!r}. "
            f"Write for example {name}={example}"
        )
    return seconds
