"""The latency controller against a simulated machine: it holds the target, comes back, and does not swing."""

import math
import random
from itertools import pairwise

import pytest

from moekit.config.errors import ConfigError
from moekit.layers.elastic import Elastic
from moekit.serve.controller import LatencyController, Option, options_of_table

# seconds of a step at load 1: half of it is attention and the rest experts, as k = 4 costs
SECONDS = {1: 0.5 + 0.125, 2: 0.5 + 0.25, 4: 1.0}
BITS = {1: 2.2, 2: 2.1, 4: 2.05}


def controller(costs=SECONDS, target=1.35, **more):
    return LatencyController(
        [Option(Elastic(top_k=k), cost, BITS[k]) for k, cost in costs.items()], target, **more
    )


def simulate(control, loads, noise=0.03, seconds=SECONDS, seed=0):
    """Latency and k of each step under a load by step."""
    chance = random.Random(seed)
    steps = []
    for load in loads:
        k = control.setting.top_k
        taken = seconds[k] * load * (1 + noise * chance.uniform(-1, 1))
        control.after_step(taken)
        steps.append((taken, k))
    return steps


def p95(steps):
    ordered = sorted(taken for taken, _ in steps)
    return ordered[math.ceil(0.95 * len(ordered)) - 1]


@pytest.mark.parametrize("seed", range(5))
def test_the_target_holds_while_load_doubles_and_k_comes_back(seed):
    control = controller()
    phases = [400, 400, 400]
    loads = [load for load, n in zip((1.0, 2.0, 1.0), phases, strict=True) for _ in range(n)]
    steps = simulate(control, loads, seed=seed)
    before, doubled, after = steps[:400], steps[400:800], steps[800:]
    assert {k for _, k in before} == {4}
    # at load 2: 2.0 s at k=4, 1.5 at 2, 1.25 at 1
    assert p95(doubled) <= control.target
    assert sum(taken > control.target for taken, _ in doubled) <= 4  # the steps in which it noticed
    assert {k for _, k in doubled[10:]} == {1}
    assert [k for _, k in after[-200:]] == [4] * 200
    assert p95(steps) <= control.target
    assert len(control.changes) <= 4  # down once or twice, and up in two steps


def test_without_a_controller_the_same_load_breaks_the_target():
    fixed = controller(costs={4: SECONDS[4]})
    steps = simulate(fixed, [2.0] * 100)
    assert p95(steps) > fixed.target
    assert fixed.overloaded


def test_a_load_that_grows_step_by_step_takes_every_setting_and_says_what_it_costs():
    control = controller()
    simulate(control, [1 + step / 500 for step in range(501)])
    report = control.report()
    assert [row["steps"] > 0 for row in report["settings"]] == [True, True, True]
    assert report["setting"] == "k=1"
    assert report["quality_cost"] == pytest.approx(0.15)
    steps = {row["setting"]: row["steps"] for row in report["settings"]}
    expected = (0.15 * steps["k=1"] + 0.05 * steps["k=2"]) / 501
    assert report["mean_quality_cost"] == pytest.approx(expected)
    assert report["slow_share"] < 0.05


@pytest.mark.parametrize("load", [1.0, 1.3, 1.4, 1.7, 1.75, 1.8, 2.0])
def test_no_load_that_stays_makes_it_swing(load):
    control = controller()
    simulate(control, [load] * 4000, noise=0.08)
    late = [change for change in control.changes if change.step > 1000]
    assert len(control.changes) <= 8
    assert len(late) <= 2


def test_a_wrong_prediction_is_tried_ever_more_rarely():
    # by the table k=4 costs as good as nothing, on this machine twice as much: every raise fails
    control = controller(costs={2: 1.0, 4: 1.01})
    simulate(control, [1.0] * 20_000, seconds={2: 1.0, 4: 2.0}, noise=0.01)
    raises = [change.step for change in control.changes if change.after.top_k == 4]
    gaps = [later - earlier for earlier, later in pairwise(raises)]
    assert gaps[0] < gaps[1] < gaps[2]
    assert len(raises) <= 2 + math.ceil(math.log2(LatencyController.LONGEST_WAIT)) + 20_000 // (64 * 40)


def test_one_slow_step_changes_nothing():
    control = controller()
    for step in range(200):
        assert control.after_step(9.0 if step % 25 == 7 else 1.0) is None
    assert control.setting.top_k == 4


def test_an_overload_is_said():
    control = controller()
    simulate(control, [3.0] * 60)
    assert control.setting.top_k == 1
    assert control.overloaded
    assert control.report()["overloaded"]


def test_options_come_from_the_table_of_evaluation():
    rows = [
        {"top_k": k, "bits_per_byte": BITS[k], "tokens_per_second": 100 / k, "flops_per_token": k}
        for k in (1, 2)
    ]
    assert options_of_table(rows) == [Option(Elastic(top_k=k), k / 100, BITS[k]) for k in (1, 2)]
    del rows[1]["tokens_per_second"]
    assert options_of_table(rows[1:])[0].cost == 2


def test_options_that_cost_more_and_say_no_better_are_left_out():
    rows = [
        {"top_k": 1, "bits_per_byte": 2.2, "tokens_per_second": 100},
        {"top_k": 2, "bits_per_byte": 2.1, "tokens_per_second": 101},  # measured faster than k=1 by chance
        {"top_k": 3, "bits_per_byte": 2.1, "tokens_per_second": 101},
        {"top_k": 4, "bits_per_byte": 2.05, "tokens_per_second": 70},
    ]
    options = options_of_table(rows)
    assert [option.elastic.top_k for option in options] == [2, 4]
    assert LatencyController(options, 1.0).setting.top_k == 4  # the best one first


@pytest.mark.parametrize("rows", [[1], "x", {"a": 1}, [{"top_k": 1}], [{"top_k": 0, "flops_per_token": 1}],
                                  [{"top_k": 1, "flops_per_token": "fast"}], []])  # fmt: skip
def test_what_is_no_table(rows):
    with pytest.raises(ConfigError, match=r"by_setting"):
        options_of_table(rows)


@pytest.mark.parametrize(
    ("change", "field"),
    [({"target": 0}, "target"), ({"quantile": 1}, "quantile"), ({"window": 1}, "window"), ({"patience": 0}, "patience"),
     ({"costs": {}}, "options"), ({"costs": {1: 1.0, 2: 1.0}}, "options.cost"), ({"margin": 1}, "margin")],
)  # fmt: skip
def test_values_that_cannot_be(change, field):
    with pytest.raises(ConfigError, match=field):
        controller(**change)
