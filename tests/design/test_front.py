"""Fronts worked out by hand, designs over seeds, and importances of choices that do or do not matter."""

from __future__ import annotations

import math
import random
import warnings

import pytest

from moekit.design.finals import chosen, finalists
from moekit.design.front import designs_of, importances, pareto


def test_a_front_by_hand():
    points = [(0.9, 10), (0.5, 20), (0.6, 20), (0.5, 30), (0.1, 99), (0.95, 9), (0.9, 10)]
    # (0.6, 20) and (0.5, 30) lose to (0.5, 20); of the two equal points the first stays
    assert pareto(points) == [0, 1, 4, 5]
    assert pareto([]) == []
    assert pareto([(1.0, 1.0)]) == [0]
    assert pareto([(1, 2, 3), (3, 2, 1), (3, 2, 3)]) == [0, 1]


@pytest.mark.parametrize("seed", range(5))
def test_a_front_is_what_no_other_beats(seed):
    rng = random.Random(seed)
    points = [(rng.randint(0, 9), rng.randint(0, 9)) for _ in range(60)]
    front = [points[place] for place in pareto(points)]
    assert len(set(front)) == len(front)
    for one in set(points):
        better = [other for other in points if other != one and other[0] <= one[0] and other[1] <= one[1]]
        assert (one in front) == (not better)


def trial(name, seed, worse, cost=10.0):
    figure = None if worse is None else -worse
    return {"id": name, "changes": {} if name == "default" else {"a": name}, "features": {}, "cost": {"active": cost},
            "seed": seed, "worse": worse, "figure": figure, "rungs": []}  # fmt: skip


def test_designs_over_seeds():
    trials = [trial("default", 0, 1.0), trial("b", 0, 3.0), trial("b", 1, 5.0), trial("c", 0, None)]
    rows = [
        {"id": "default", "seed": 1, "worse": 2.0, "figure": -2.0},
        {"id": "gone", "seed": 1, "worse": 0.0},
    ]
    default, other = designs_of(trials, rows)
    assert (default.mean, default.figure, default.deviation) == (1.5, -1.5, pytest.approx(math.sqrt(0.5)))
    assert (other.mean, other.values) == (4.0, {0: 3.0, 1: 5.0})
    broken = designs_of(trials, [{"id": "b", "seed": 2, "worse": None, "figure": None}])[1]
    assert (broken.mean, broken.figure, broken.deviation) == (math.inf, None, None)


def test_one_lucky_seed_does_not_win():
    trials = [trial("lucky", 0, 0.1), *(trial("steady", seed, 0.2) for seed in range(3)), trial("default", 0, 0.0),
              *(trial("large", seed, 0.0, cost=99) for seed in range(3))]  # fmt: skip
    designs, limits = designs_of(trials), {"active": 10.0}
    assert [one.id for one in finalists(designs, limits, 2)] == ["default", "lucky", "steady"]
    assert chosen(designs, limits, repeats=2).id == "steady"
    assert chosen(designs, limits, repeats=0).id == "lucky"
    assert chosen(designs[2:3], limits, repeats=2) is None


def made_trials(n, seed=0):
    """`matters` decides; a number and a name of many values do not."""
    rng, found = random.Random(seed), []
    for _ in range(n):
        features = {
            "matters": rng.choice("ab"),
            "name": rng.choice("uvwxyz"),
            "number": rng.random(),
            "same": 1,
        }
        worse = (features["matters"] == "a") + 0.3 * rng.random()
        lost = worse > 1.15
        found.append({"features": features, "rungs": [worse], "worse": None if lost else worse})
    return found


@pytest.mark.parametrize("seed", range(3))
def test_what_matters_comes_first(seed):
    pytest.importorskip("optuna")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = importances(made_trials(40, seed))
    assert next(iter(found)) == "matters"
    assert sum(found.values()) == pytest.approx(1.0)
    assert "same" not in found


def test_few_trials_have_no_order():
    pytest.importorskip("optuna")
    assert importances(made_trials(19)) == {}
