"""The core of every benchmark: contestants take turns, are checked, timed and summarised."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from moekit.config.errors import require
from moekit.evaluate.bench.checks import Deviation, Outputs, Tolerance, deviations
from moekit.evaluate.bench.limits import Gauge

Role = Literal["moekit", "peer", "dense"]
Clock = Callable[[], float]
Case = dict[str, Any]  # a case of a result, see moekit.evaluate.bench.result


@dataclass(frozen=True)
class Work:
    """What one run does, whoever does it; 0 where it is not counted.

    Attributes:
        flops: useful floating point operations, a multiply-add counting as two.
        bytes: weights that must be read once.
        tokens: tokens that are processed.
    """

    flops: float = 0
    bytes: float = 0
    tokens: int = 0


@dataclass
class Contestant:
    """One way to do the work.

    Attributes:
        name: unique in its case.
        run: does the work once and returns its outputs by name; this is what is timed.
        expected: the same outputs in float32; many contestants may share one.
        tolerance: by output.
        work: what a run does.
        role: "moekit", a "peer" that does the same work, or "dense": other work of the same size.
        prepare: called before each run, not timed.
        checked: outputs to check, where `run` returns too little of them.
    """

    name: str
    run: Callable[[], Outputs]
    expected: Callable[[], Outputs]
    tolerance: Mapping[str, Tolerance]
    work: Work
    role: Role = "peer"
    prepare: Callable[[], None] = lambda: None
    checked: Callable[[], Outputs] | None = None


@dataclass
class Timing:
    """Seconds of each round, and what they come to."""

    samples: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        return statistics.median(self.samples)

    @property
    def quartiles(self) -> tuple[float, float]:
        """First and third; both are the sample where there is one."""
        if len(self.samples) == 1:
            return self.samples[0], self.samples[0]
        first, _, third = statistics.quantiles(self.samples, n=4, method="inclusive")
        return first, third


@dataclass
class Measured:
    """A contestant that gave the right answer, its times, and how far its answer was off."""

    contestant: Contestant
    timing: Timing
    deviations: list[Deviation]


@dataclass
class Comparison:
    """Everything that one case gave: `measured` in the order of the contestants, `refused` with the reasons."""

    measured: list[Measured]
    refused: dict[str, str]
    gauges: dict[str, Timing]


def compare(
    contestants: Sequence[Contestant],
    *,
    repeats: int,
    warmup: int = 1,
    pause: float = 0.0,
    gauges: Mapping[str, Callable[[], object]] | None = None,
    clock: Clock = time.perf_counter,
) -> Comparison:
    """Check every contestant, then let them take turns: A B C A B C ..., so that all meet the same machine.

    A contestant whose outputs break its tolerance, at the beginning or in its last run, is refused: its times are not
    reported. What gauges the machine (`moekit.evaluate.bench.limits`) takes its turn after the contestants.

    Args:
        contestants: with different names.
        repeats: timed rounds.
        warmup: rounds before them, beside the run that is checked.
        pause: seconds of rest before each run, so that threads of the last one that still spin fall asleep.
        gauges: by name, what measures the machine.
        clock: seconds.
    """
    names = [contestant.name for contestant in contestants]
    require(len(set(names)) == len(names), "contestants", names, "must have different names")
    require(repeats >= 1, "repeats", repeats, "must be at least 1")
    refused: dict[str, str] = {}
    off: dict[str, list[Deviation]] = {}
    taking_part = list(contestants)

    def check(contestant: Contestant, outputs: Outputs) -> None:
        found = deviations(outputs, contestant.expected(), contestant.tolerance)
        off.setdefault(contestant.name, found)
        reasons = [deviation.reason for deviation in found if deviation.reason]
        if reasons:
            refused[contestant.name] = "; ".join(reasons)
            taking_part.remove(contestant)

    for contestant in contestants:
        contestant.prepare()
        check(contestant, (contestant.checked or contestant.run)())
    times = {contestant.name: Timing() for contestant in taking_part}
    watched = {name: Timing() for name in gauges or {}}
    for number in range(-warmup, repeats):
        for contestant in list(taking_part):
            contestant.prepare()
            time.sleep(pause)
            seconds, outputs = _timed(contestant.run, clock)
            if number >= 0:
                times[contestant.name].samples.append(seconds)
            if number == repeats - 1 and contestant.checked is None:
                check(contestant, outputs)
            del outputs  # the next one may need the memory
        for name, gauge in (gauges or {}).items():
            time.sleep(pause)
            seconds, _ = _timed(gauge, clock)
            if number >= 0:
                watched[name].samples.append(seconds)
    measured = [Measured(each, times[each.name], off[each.name]) for each in taking_part]
    return Comparison(measured, refused, watched)


def _timed(run: Callable[[], Any], clock: Clock) -> tuple[float, Any]:
    was_on = gc.isenabled()
    gc.disable()  # a collection of everybody's garbage would count for whoever runs at that moment
    try:
        start = clock()
        outputs = run()
        return clock() - start, outputs
    finally:
        if was_on:
            gc.enable()


@dataclass(frozen=True)
class TimingOptions:
    """How often everybody runs.

    Attributes:
        repeats: timed rounds.
        warmup: rounds before them.
        pause: seconds of rest before each run.
        say: is told which case begins.
    """

    repeats: int = 9
    warmup: int = 2
    pause: float = 0.01
    say: Callable[[str], object] = lambda message: None

    def __post_init__(self) -> None:
        require(self.repeats >= 1, "--repeats", self.repeats, "must be at least 1")
        require(self.warmup >= 0, "--warmup", self.warmup, "must be at least 0")


DEFAULT_TIMING = TimingOptions()


def run_case(
    name: str,
    shape: Mapping[str, Any],
    contestants: Sequence[Contestant],
    skipped: Mapping[str, str],
    gauges: Mapping[str, Gauge],
    timing: TimingOptions,
) -> Case:
    """Compare, and put what came out into one case; `gauges` by what they limit, "flops" and "bytes"."""
    timing.say(f"{name}: {', '.join(each.name for each in contestants)}")
    functions = {key: gauge.run for key, gauge in gauges.items()}
    found = compare(
        contestants, repeats=timing.repeats, warmup=timing.warmup, pause=timing.pause, gauges=functions
    )
    # the median, as for the contestants: the machine as they met it, not at the best moment of anybody
    limits = {key: gauge.amount / found.gauges[key].median for key, gauge in gauges.items()}
    per_second = {"flops_per_second": limits.get("flops"), "bytes_per_second": limits.get("bytes")}
    return {"name": name, "shape": dict(shape), "limits": per_second, **summary(found, limits, skipped)}


def summary(
    comparison: Comparison, limits: Mapping[str, float], skipped: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """A comparison as plain data: the part of a result's case that says who took how long.

    `limits` holds what the machine can do: "flops" and "bytes" a second, 0 or absent where not measured. Ratios are
    those of the medians; moekit is the first contestant of that role, the best peer the fastest of its role.
    """
    ours = next((each for each in comparison.measured if each.contestant.role == "moekit"), None)
    peers = [each for each in comparison.measured if each.contestant.role == "peer"]
    best = min(peers, key=lambda each: each.timing.median, default=None)
    return {
        "contestants": [_row(each, ours, limits) for each in comparison.measured],
        "refused": comparison.refused,
        "skipped": dict(skipped or {}),
        "best_peer": best.contestant.name if best else None,
        # above 1: moekit needs less time
        "moekit_speedup": best.timing.median / ours.timing.median if best and ours else None,
    }


def _row(each: Measured, ours: Measured | None, limits: Mapping[str, float]) -> dict[str, Any]:
    contestant, seconds, work = each.contestant, each.timing.median, each.contestant.work
    first, third = each.timing.quartiles

    def share(amount: float, limit: float) -> float | None:
        return amount / seconds / limit if amount and limit else None

    return {
        "name": contestant.name,
        "role": contestant.role,
        "seconds": {
            "median": seconds,
            "first_quartile": first,
            "third_quartile": third,
            "samples": each.timing.samples,
        },
        "ratio": seconds / ours.timing.median if ours else None,
        "work": {"flops": work.flops, "bytes": work.bytes, "tokens": work.tokens},
        "flops_per_second": work.flops / seconds if work.flops else None,
        "bytes_per_second": work.bytes / seconds if work.bytes else None,
        "tokens_per_second": work.tokens / seconds if work.tokens else None,
        "flops_share": share(work.flops, limits.get("flops", 0)),
        "bytes_share": share(work.bytes, limits.get("bytes", 0)),
        "peak_memory_bytes": None,
        "deviations": {
            each.output: {
                "whole": each.whole,
                "row": each.row,
                "allowed_whole": each.tolerance.whole,
                "allowed_row": each.tolerance.row,
                "share_of_rows": each.tolerance.share,
            }
            for each in each.deviations
        },
    }
