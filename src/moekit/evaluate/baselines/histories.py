"""What comes next by counting: popularity, neighbours of items, and factors of who had what, by implicit.

    popularity      how often an item stands in training
    item-knn        items whose users are alike, summed over what stands in the history (cosine)
    als             factors of users and items (Hu, Koren and Volinsky 2008), a history's own factors solved for

None of them reads the order of a history.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np

from moekit.config.errors import ConfigError
from moekit.config.task import SequenceInput
from moekit.data.encoding.fields import category, listed
from moekit.data.examples import Examples
from moekit.evaluate.baselines.base import Answers, Fitted, Problem, register_baseline
from moekit.evaluate.ranking_metrics import mrr_filtered

Scores = Callable[[Any], np.ndarray]


@register_baseline(
    "popularity",
    "the entities that stand in most training examples",
    reads=("sequence",),
    answers=("entity",),
    libraries=("scipy",),
)
def popularity(problem: Problem) -> Fitted:
    """Count."""
    counts = _Counts(problem)
    total = np.asarray(counts.train.sum(0), dtype=np.float64).reshape(-1)
    return counts.fitted(lambda given: np.tile(total, (given.shape[0], 1)), {})


@register_baseline(
    "item-knn",
    "nearest neighbours of items by cosine, summed over the history",
    reads=("sequence",),
    answers=("entity",),
    libraries=("implicit", "scipy"),
)
def item_knn(problem: Problem, neighbours: tuple[int, ...] = (20, 50, 100, 200)) -> Fitted:
    """Fit it; the number of neighbours that ranks validation's answers best, the first where there is none."""
    from implicit.nearest_neighbours import CosineRecommender

    counts = _Counts(problem)

    def fit(k: int) -> Scores:
        model = CosineRecommender(K=k + 1, num_threads=1)  # an item is its own nearest neighbour
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the library turns its own matrix round, and says so
            model.fit(counts.train, show_progress=False)
        return lambda given: np.asarray((given @ model.similarity).todense())

    return counts.best({"neighbours": k} for k in neighbours)(lambda neighbours: fit(neighbours))


@register_baseline(
    "als",
    "factors of histories and items by alternating least squares",
    reads=("sequence",),
    answers=("entity",),
    libraries=("implicit", "scipy"),
)
def als(
    problem: Problem,
    factors: tuple[int, ...] = (32, 64),
    penalties: tuple[float, ...] = (0.1, 10.0),
    confidence: float = 10.0,
    iterations: int = 15,
) -> Fitted:
    """Fit it; factors and penalty with the best mean reciprocal rank on validation, the first where there is none.

    Args:
        confidence: weight of an item that stands in a history, beside 1 for one that does not.
        iterations: of the alternation.
    """
    from implicit.cpu.als import AlternatingLeastSquares

    counts = _Counts(problem)

    def fit(factors: int, penalty: float) -> Scores:
        model = AlternatingLeastSquares(
            factors=factors, regularization=penalty, alpha=confidence, iterations=iterations, num_threads=1,
            random_state=problem.seed,
        )  # fmt: skip
        model.fit(counts.train, show_progress=False)

        def scores(given: Any) -> np.ndarray:
            mine = model.recalculate_user(np.arange(given.shape[0]), given)
            return np.asarray(mine @ model.item_factors.T)

        return scores

    grid = ({"factors": factor, "penalty": penalty} for factor in factors for penalty in penalties)
    return counts.best(grid)(fit)


class _Counts:
    """Who had what: histories as rows of a sparse matrix `[n, items]`.

    Attributes: names: of the items; train: histories of the training examples, their answers among them.
    """

    def __init__(self, problem: Problem) -> None:
        given = problem.inputs.get(problem.target.input)
        if not isinstance(given, SequenceInput):
            raise ConfigError(
                f"targets.{problem.name}.input must be an input of kind sequence for this baseline"
            )
        self.problem, self.column = problem, given.column
        answers = [category(value) for value in problem.train[problem.target.column]]
        lists = [[*listed(problem.train, self.column, row), answer] for row, answer in enumerate(answers)]
        self.names = sorted({name for names in lists for name in names})
        self._places = {name: place for place, name in enumerate(self.names)}
        self.train = self._matrix(lists)

    def _matrix(self, lists: list[list[str]]) -> Any:
        from scipy import sparse

        rows = [{self._places[name] for name in names if name in self._places} for names in lists]
        ends = np.cumsum([0, *map(len, rows)])
        columns = np.asarray([place for row in rows for place in sorted(row)], dtype=np.int32)
        data = np.ones(len(columns), dtype=np.float32)
        return sparse.csr_matrix((data, columns, ends), shape=(len(rows), len(self.names)))

    def given(self, examples: Examples) -> Any:
        """The histories of examples."""
        return self._matrix([listed(examples, self.column, row) for row in range(len(examples))])

    def best(self, grid: Any) -> Callable[[Callable[..., Scores]], Fitted]:
        """Fit with each setting of a grid and keep the one that ranks validation's answers best."""
        held = self.problem.validation

        def choose(fit: Callable[..., Scores]) -> Fitted:
            found: list[tuple[float, dict[str, Any], Scores]] = []
            for settings in grid:
                scores = fit(**settings)
                found.append((self._figure(scores, held), settings, scores))
                if len(held) == 0:
                    break
            figure, settings, scores = max(found, key=lambda entry: entry[0])
            more = {"validation": round(figure, 6)} if len(held) else {}
            return self.fitted(scores, {**settings, **more})

        return choose

    def _figure(self, scores: Scores, held: Examples) -> float:
        if len(held) == 0:
            return 0.0
        given = self.given(held)
        places = [self._places.get(category(value), -1) for value in held[self.problem.target.column]]
        rows = np.asarray([row for row, place in enumerate(places) if place >= 0])
        if len(rows) == 0:
            return 0.0
        known = [given[row].indices if self.problem.target.new else [] for row in rows]
        return mrr_filtered(scores(given)[rows], np.asarray(places)[rows], known)

    def fitted(self, scores: Scores, settings: dict[str, Any]) -> Fitted:
        def predict(examples: Examples) -> Answers:
            found = scores(self.given(examples))
            return Answers([self.names[place] for place in found.argmax(1)], tuple(self.names), found)

        return Fitted(predict, settings)
