"""What trials say together: the front of figure against cost, the mean of each design, and which choices mattered."""

from __future__ import annotations

import math
import statistics
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from moekit.design.study import require_optuna

# with fewer than five trials among the best an order of importance is chance
ENOUGH, TOP = 20, 0.25
# values of a number that are told apart
MOST_LEVELS = 4


@dataclass
class Design:
    """All that is known of one choice.

    Attributes: id; changes, features, cost: see `space.Choice`. values: of each seed, what designs are ordered by (less
        is better). figures: of each seed, the figure itself.
    """

    id: str
    changes: dict[str, Any]
    features: dict[str, Any]
    cost: dict[str, float]
    values: dict[int, float] = field(default_factory=dict)
    figures: dict[int, float] = field(default_factory=dict)

    @property
    def mean(self) -> float:
        """Of what designs are ordered by; infinite where a seed's loss was not finite."""
        return statistics.fmean(self.values.values())

    @property
    def figure(self) -> float | None:
        """The mean figure."""
        return statistics.fmean(self.figures.values()) if math.isfinite(self.mean) else None

    @property
    def deviation(self) -> float | None:
        several = len(self.figures) > 1 and math.isfinite(self.mean)
        return statistics.stdev(self.figures.values()) if several else None

    def within(self, limits: Mapping[str, float]) -> bool:
        """Whether it costs no more than is allowed."""
        return all(self.cost.get(name, 0.0) <= limit for name, limit in limits.items())


def designs_of(trials: Iterable[Mapping[str, Any]], rows: Iterable[Mapping[str, Any]] = ()) -> list[Design]:
    """Each design once, with the values of finished trials and of the rows that repeat it.

    Args:
        trials: `id`, `changes`, `features`, `cost`, `seed`, `worse` (None where not finished), `figure`.
        rows: `id`, `seed`, `worse`, `figure`.
    """
    found: dict[str, Design] = {}
    for trial in trials:
        if trial["worse"] is not None:
            known = found.setdefault(
                trial["id"], Design(trial["id"], trial["changes"], trial["features"], trial["cost"])
            )
            known.values[trial["seed"]], known.figures[trial["seed"]] = trial["worse"], trial["figure"]
    for row in rows:
        if row["id"] in found:
            known = found[row["id"]]
            if row["worse"] is None:  # a loss that was not finite
                known.values[row["seed"]] = math.inf
            else:
                known.values[row["seed"]], known.figures[row["seed"]] = row["worse"], row["figure"]
    return list(found.values())


def pareto(points: Sequence[Sequence[float]]) -> list[int]:
    """Places of the points that no other is better than: as small in everything, and smaller in something.

    Of equal points the first one stands for all.

    >>> pareto([(1.0, 5.0), (2.0, 3.0), (2.0, 4.0), (3.0, 3.0), (0.5, 9.0), (1.0, 5.0)])
    [0, 1, 4]
    """
    found = []
    for place, point in enumerate(points):
        beaten = any(
            all(theirs <= own for theirs, own in zip(other, point, strict=True))
            and (tuple(other) != tuple(point) or index < place)
            for index, other in enumerate(points)
            if index != place
        )
        if not beaten:
            found.append(place)
    return found


def importances(trials: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """How much each feature tells the best quarter of all trials from the others, as shares that sum to 1.

    PED-ANOVA (Watanabe et al. 2023, arXiv 2304.10255) asks only which trials are among the best, so trials that were
    given up can be counted: they stand behind those that got further. A regression (fANOVA) would have to leave them
    out and see the good ones alone. Empty for fewer than twenty trials.

    Args:
        trials: `features`, `rungs` (figures there) and `worse` (None where not finished).
    """
    optuna = require_optuna()
    order = _ranks(trials)
    if len(trials) < ENOUGH:
        return {}
    names = [name for name in trials[0]["features"] if all(name in trial["features"] for trial in trials)]
    columns = {name: _levels([trial["features"][name] for trial in trials]) for name in names}
    columns = {name: values for name, values in columns.items() if len(set(values)) > 1}
    known = {
        name: optuna.distributions.CategoricalDistribution(tuple(sorted(set(values))))
        for name, values in columns.items()
    }
    study = optuna.create_study(storage=None, direction="minimize")
    for place, rank in enumerate(order):
        params = {name: values[place] for name, values in columns.items()}
        study.add_trial(optuna.trial.create_trial(params=params, distributions=known, value=float(rank)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        evaluator = optuna.importance.PedAnovaImportanceEvaluator(target_quantile=TOP)
        found = optuna.importance.get_param_importances(study, evaluator=evaluator, params=list(known))
    return {name: value for name, value in found.items() if math.isfinite(value)}


def _ranks(trials: Sequence[Mapping[str, Any]]) -> list[int]:
    """Places of trials: finished ones by their figure, then those that got to the last rung, and so on.

    >>> _ranks([{"worse": None, "rungs": [0.1]}, {"worse": 3.0, "rungs": [9.0]}, {"worse": 2.0, "rungs": []}])
    [2, 1, 0]
    """

    def key(trial: Mapping[str, Any]) -> tuple[float, float]:
        if trial["worse"] is not None:
            return (0.0, trial["worse"])
        rungs = trial["rungs"]
        return (1.0 / (1 + len(rungs)), rungs[-1]) if rungs else (2.0, 0.0)

    order = sorted(range(len(trials)), key=lambda place: key(trials[place]))
    ranks = [0] * len(trials)
    for rank, place in enumerate(order):
        ranks[place] = rank
    return ranks


def _levels(values: Sequence[Any]) -> list[str]:
    """Values as a few levels each: numbers of many values as low, middle and high, equally many of each.

    A density over a number's every value would follow single trials, and make the number look decisive.

    >>> _levels([0.1, 0.5, 0.2, 0.9, 0.3, 0.7]), _levels([1, 2, 2, 1])
    (['low', 'middle', 'low', 'high', 'middle', 'high'], ['1', '2', '2', '1'])
    """
    numbers = all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)
    if not numbers or len(set(values)) <= MOST_LEVELS:
        return [str(value) for value in values]
    order = sorted(values)
    first, second = order[len(order) // 3], order[2 * len(order) // 3]
    return ["low" if value < first else "middle" if value < second else "high" for value in values]
