"""The core: turns, medians and ratios from a clock in hand, refusals."""

from __future__ import annotations

import gc

import pytest
import torch

from moekit.config.errors import ConfigError
from moekit.evaluate.bench.compare import TimingOptions, compare, run_case, summary
from moekit.evaluate.bench.limits import Gauge


class Clock:
    """Time passes only where somebody works."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def working(self, outputs, *seconds: float):
        """A run that takes these seconds, one after the other."""
        left = list(seconds)

        def run():
            self.now += left.pop(0)
            return outputs

        return run


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_contestants_take_turns(contestant):
    turns: list[str] = []

    def player(name):
        def run():
            turns.append(name)
            return {"output": contestant.truth}

        return contestant(name, run=run, prepare=lambda: turns.append(f"prepare {name}"))

    compare([player("A"), player("B")], repeats=2, warmup=1, gauges={"flops": lambda: turns.append("gauge")})
    check = ["prepare A", "A", "prepare B", "B"]
    assert turns == [*check, *(3 * [*check, "gauge"])]


def test_medians_quartiles_and_ratios_come_from_the_timed_rounds(contestant, clock):
    right = {"output": contestant.truth}
    players = [  # checked, warm-up, then four rounds
        contestant("ours", run=clock.working(right, 9, 9, 2, 4, 4, 6), role="moekit"),
        contestant("slow", run=clock.working(right, 9, 9, 8, 8, 8, 8)),
        contestant("fast", run=clock.working(right, 9, 9, 5, 6, 6, 7)),
        contestant("dense", run=clock.working(right, 9, 9, 1, 1, 1, 1), role="dense"),
    ]
    found = compare(players, repeats=4, warmup=1, clock=clock)
    assert found.measured[0].timing.samples == [2, 4, 4, 6]
    result = summary(found, {"flops": 10.0, "bytes": 0.0}, {"other": "not here"})
    ours, slow, fast, dense = result["contestants"]
    assert ours["seconds"]["median"] == 4
    assert (ours["seconds"]["first_quartile"], ours["seconds"]["third_quartile"]) == (3.5, 4.5)
    assert [row["ratio"] for row in (ours, slow, fast, dense)] == [1, 2, 1.5, 0.25]
    assert (result["best_peer"], result["moekit_speedup"]) == ("fast", 1.5)  # a dense layer is no peer
    assert ours["flops_per_second"] == 1.5
    assert ours["flops_share"] == pytest.approx(0.15)
    assert (ours["bytes_per_second"], ours["bytes_share"]) == (0.75, None)
    assert ours["tokens_per_second"] == 0.5
    assert result["skipped"] == {"other": "not here"}


def test_one_round_is_its_own_quartiles(contestant):
    (row,) = summary(compare([contestant("A", role="moekit")], repeats=1), {})["contestants"]
    assert len(row["seconds"]["samples"]) == 1
    assert row["seconds"]["first_quartile"] == row["seconds"]["third_quartile"] == row["seconds"]["median"]


def test_a_wrong_contestant_is_refused_and_the_others_go_on(contestant):
    wrong = contestant.truth.clone()
    wrong[1, 2] = 0.0
    found = compare([contestant("right"), contestant("wrong", wrong)], repeats=3)
    assert [each.contestant.name for each in found.measured] == ["right"]
    assert "output is off by 0.27" in found.refused["wrong"]
    assert "0.01 is allowed" in found.refused["wrong"]


def test_a_contestant_that_goes_wrong_later_is_refused(contestant):
    """What is checked first must not be all that is checked: a cache could answer the rest."""
    left = [contestant.truth] * 4

    def run():
        return {"output": left.pop() if left else torch.zeros(3, 4)}

    found = compare([contestant("A", run=run)], repeats=4, warmup=1)
    assert list(found.refused) == ["A"]
    assert found.measured == []


def test_no_ratio_without_moekit(contestant):
    wrong = contestant("moekit", torch.zeros(3, 4), role="moekit")
    result = summary(compare([wrong, contestant("peer")], repeats=1), {})
    assert result["contestants"][0]["ratio"] is None
    assert (result["best_peer"], result["moekit_speedup"]) == ("peer", None)


def test_outputs_to_check_may_be_made_apart_from_the_run(contestant):
    found = compare([contestant("A", run=dict, checked=lambda: {"output": contestant.truth})], repeats=2)
    assert not found.refused


def test_gauges_are_timed_like_contestants(contestant):
    clock = Clock()
    gauge = Gauge(clock.working(None, 1, 4, 2, 8), amount=16.0)
    functions = {"flops": gauge.run}
    found = compare([contestant("A")], repeats=3, warmup=1, gauges=functions, clock=clock)
    assert found.gauges["flops"].samples == [4, 2, 8]


def test_a_case_says_what_it_measured(contestant):
    said: list[str] = []
    timing = TimingOptions(2, 0, say=said.append)
    gauges = {"bytes": Gauge(lambda: None, 8.0)}
    case = run_case("small", {"tokens": 3}, [contestant("A", role="moekit")], {}, gauges, timing)
    assert case["name"] == "small"
    assert case["shape"] == {"tokens": 3}
    assert case["limits"]["flops_per_second"] is None
    assert case["limits"]["bytes_per_second"] > 0
    assert said == ["small: A"]


def test_garbage_is_not_collected_while_somebody_is_timed(contestant):
    states: list[bool] = []

    def run():
        states.append(gc.isenabled())
        return {"output": contestant.truth}

    compare([contestant("A", run=run)], repeats=1, warmup=0)
    assert states == [True, False]  # the run that is only checked, and the timed one
    assert gc.isenabled()


@pytest.mark.parametrize(
    ("names", "repeats", "words"), [("AA", 1, "different names"), ("A", 0, "repeats must be at least 1")]
)
def test_wrong_use(contestant, names, repeats, words):
    with pytest.raises(ConfigError, match=words):
        compare([contestant(name) for name in names], repeats=repeats)


@pytest.mark.parametrize(("repeats", "warmup", "field"), [(0, 0, "--repeats"), (1, -1, "--warmup")])
def test_timing_options_have_bounds(repeats, warmup, field):
    with pytest.raises(ConfigError, match=field):
        TimingOptions(repeats, warmup)
