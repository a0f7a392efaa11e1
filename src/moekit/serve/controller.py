"""Hold a latency target under load by taking fewer experts per token, and say what quality that costs.

    steps' seconds ─► too many over the target? ─► a cheaper setting at once
                   └► room for the next dearer one, long enough? ─► that one, a single step up

Lowering needs a few slow steps; raising needs `patience` windows that would have met the target at the higher cost
too, with a margin. A raise that had to be taken back makes the next one wait twice as long, so a prediction that is
wrong again and again leads to ever fewer attempts and not to swinging.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from moekit.config.errors import ConfigError, require
from moekit.layers.elastic import Elastic


@dataclass(frozen=True)
class Option:
    """One setting that a controller may choose.

    Attributes:
        elastic: the setting.
        cost: seconds of a step, up to a factor that all options share; FLOPs will do where no time was measured.
        bits_per_byte: the quality that was measured at it, lower is better; None where none was.
    """

    elastic: Elastic
    cost: float
    bits_per_byte: float | None = None


@dataclass(frozen=True)
class Change:
    """A change of setting: after how many steps, from which to which, and the latency that led to it."""

    step: int
    before: Elastic
    after: Elastic
    seconds: float


def options_of_table(rows: Sequence[Mapping[str, Any]]) -> list[Option]:
    """Options from the table `by_setting` that `moekit evaluate --k` makes, the cheapest first.

    A setting that was measured no faster than one of at least its quality is left out: near each other, two may change
    places by chance, and a controller that took the slower one for the better would begin with it.

    Errors: `ConfigError` for something else than such a table.

    >>> rows = [{"top_k": 1, "bits_per_byte": 2.1, "tokens_per_second": 200.0, "flops_per_token": 5}]
    >>> options_of_table(rows)
    [Option(elastic=Elastic(top_k=1, n_experts=None, top_p=None), cost=0.005, bits_per_byte=2.1)]
    """
    try:
        found = [_option(row) for row in rows]
    except (AttributeError, ConfigError, KeyError, TypeError, ValueError) as error:
        raise ConfigError(
            "by_setting must be the table of `moekit evaluate MODEL --k 1,2,4 --json`: rows with top_k, bits_per_byte "
            f"and tokens_per_second or flops_per_token; got {str(rows)[:60]!r} ({type(error).__name__}: {error})"
        ) from error
    require(found, "by_setting", [], "must hold a row", "Make it: moekit evaluate MODEL --k 1,2,4 --json")
    # the better one first where two cost the same
    found.sort(
        key=lambda option: (option.cost, math.inf if option.bits_per_byte is None else option.bits_per_byte)
    )
    kept: list[Option] = []
    for option in found:
        before = kept[-1] if kept else None
        if before is None or _worth(option, before):
            kept.append(option)
    return kept


def _option(row: Mapping[str, Any]) -> Option:
    rate, bits = row.get("tokens_per_second"), row.get("bits_per_byte")
    cost = 1 / float(rate) if rate else float(row["flops_per_token"])
    return Option(Elastic(row.get("top_k")), cost, None if bits is None else float(bits))


def _worth(option: Option, cheaper: Option) -> bool:
    """Whether an option that costs at least as much as another one says better, as far as is known."""
    if option.bits_per_byte is None or cheaper.bits_per_byte is None:
        return option.cost > cheaper.cost
    return option.cost > cheaper.cost and option.bits_per_byte < cheaper.bits_per_byte


class LatencyController:
    """Chooses the setting of each step so that a quantile of the steps' seconds stays below a target.

    Args:
        options: settings to choose from; the dearest is taken first, and again whenever it fits.
        target: seconds of a step that may not be passed.
        quantile: share of the steps that must keep the target.
        window: steps that are looked at.
        margin: share of the target that must stay free after a raise, by prediction.
        patience: windows that must have had room before a raise.

    Errors: `ConfigError` for values outside their range, and for options that cost nothing or the same.

    >>> options = [Option(Elastic(top_k=k), cost=k) for k in (1, 2, 4)]
    >>> controller = LatencyController(options, target=0.010)
    >>> for _ in range(2):
    ...     change = controller.after_step(seconds=0.018)     # twice: one slow step of 20 is allowed
    >>> print(change.step, change.before, "->", change.after)
    2 k=4 -> k=2
    """

    LONGEST_WAIT = 64  # windows, times patience

    def __init__(
        self, options: Sequence[Option], target: float, *, quantile: float = 0.95, window: int = 20,
        margin: float = 0.1, patience: int = 2,
    ) -> None:  # fmt: skip
        require(len(options) > 0, "options", len(options), "must hold at least one setting")
        require(target > 0, "target", target, "must be above 0 seconds")
        require(0 < quantile < 1, "quantile", quantile, "must be between 0 and 1")
        require(window >= 2, "window", window, "must be at least 2 steps")
        require(0 <= margin < 1, "margin", margin, "must be in 0..1")
        require(patience >= 1, "patience", patience, "must be at least 1 window")
        self.options = sorted(options, key=lambda option: option.cost)
        costs = [option.cost for option in self.options]
        require(costs[0] > 0 and len(set(costs)) == len(costs), "options.cost", costs,
                "must be above 0 and different for each setting")  # fmt: skip
        self.target, self.quantile, self.margin = target, quantile, margin
        self.window, self.patience = window, patience
        self.changes: list[Change] = []
        self.step = 0
        self._slow_allowed = math.floor((1 - quantile) * window + 1e-9)
        self._place = len(self.options) - 1
        self._recent: deque[float] = deque(maxlen=window)
        self._calm = 0  # steps in a row whose window had room for the next dearer setting
        self._wait = [1] * len(self.options)  # factor on patience before each setting is tried again
        self._raised_at: int | None = None
        self._steps_at = [0] * len(self.options)
        self._slow = 0

    @property
    def setting(self) -> Elastic:
        """For the next step."""
        return self.options[self._place].elastic

    @property
    def overloaded(self) -> bool:
        """Whether even the cheapest setting misses the target just now."""
        return self._place == 0 and self._too_slow()

    def after_step(self, seconds: float) -> Change | None:
        """Take note of a step that was made at `setting`; what changes for the next, if anything."""
        self.step += 1
        self._steps_at[self._place] += 1
        self._slow += seconds > self.target
        self._recent.append(seconds)
        if self._too_slow():
            self._calm = 0
            return self._lower() if self._place > 0 else None
        self._forgive()
        if self._place == len(self.options) - 1 or len(self._recent) < self.window:
            return None
        predicted = self.latency() * self._ratio(self._place + 1)
        self._calm = self._calm + 1 if predicted <= self.target * (1 - self.margin) else 0
        if self._calm >= self.window * self.patience * self._wait[self._place + 1]:
            self._raised_at = self.step
            return self._move(self._place + 1)
        return None

    def latency(self) -> float:
        """The quantile of the steps in the window, by nearest rank; nan before the first."""
        if not self._recent:
            return math.nan
        ordered = sorted(self._recent)
        return ordered[math.ceil(self.quantile * len(ordered)) - 1]

    def report(self) -> dict[str, Any]:
        """What was done and what it cost, JSON-ready.

        `quality_cost` is in bits per byte over the best setting's: now, and on average over the steps.
        """
        bits = [option.bits_per_byte for option in self.options]
        best = min((value for value in bits if value is not None), default=None)
        costs = [None if value is None or best is None else value - best for value in bits]
        known = [(steps, cost) for steps, cost in zip(self._steps_at, costs, strict=True) if steps]
        mean = None
        if known and all(cost is not None for _, cost in known):
            mean = sum(steps * (cost or 0.0) for steps, cost in known) / self.step
        return {
            "target_seconds": self.target,
            "setting": str(self.setting),
            "latency_seconds": self.latency(),
            "slow_share": self._slow / self.step if self.step else 0.0,
            "overloaded": self.overloaded,
            "quality_cost": costs[self._place],
            "mean_quality_cost": mean,
            "settings": [
                {"setting": str(option.elastic), "steps": steps, "bits_per_byte": option.bits_per_byte,
                 "quality_cost": cost}
                for option, steps, cost in zip(self.options, self._steps_at, costs, strict=True)
            ],
            "changes": len(self.changes),
        }  # fmt: skip

    def in_words(self) -> str:
        """The report in one sentence."""
        found = self.report()
        steps = ", ".join(f"{row['steps']} at {row['setting']}" for row in found["settings"] if row["steps"])
        cost = found["mean_quality_cost"]
        quality = "" if cost is None else f"; it cost {cost:.4f} bits per byte on average"
        return f"{found['slow_share']:.1%} of {self.step} steps over {1000 * self.target:g} ms ({steps}){quality}"

    def _too_slow(self) -> bool:
        return sum(seconds > self.target for seconds in self._recent) > self._slow_allowed

    def _ratio(self, place: int) -> float:
        """How many times as long a step takes at another setting, by the options' costs."""
        return self.options[place].cost / self.options[self._place].cost

    def _lower(self) -> Change:
        if self._raised_at is not None:  # the raise did not hold
            self._wait[self._place] = min(2 * self._wait[self._place], self.LONGEST_WAIT)
            self._raised_at = None
        latency = self.latency()
        fitting = [place for place in range(self._place) if latency * self._ratio(place) <= self.target]
        return self._move(max(fitting, default=0))

    def _forgive(self) -> None:
        """A setting that has held for as long as one waits for it is trusted again."""
        held = self.step - (self._raised_at if self._raised_at is not None else self.step)
        if held >= self.window * self.patience * self._wait[self._place]:
            self._wait[self._place], self._raised_at = 1, None

    def _move(self, place: int) -> Change:
        change = Change(self.step, self.setting, self.options[place].elastic, self.latency())
        self.changes.append(change)
        self._place, self._calm = place, 0
        self._recent.clear()  # what was measured at another setting says nothing of this one
        return change
