"""Matrix factorisation of ratings with biases, and SVD++, which also reads which items a user has rated.

Koren, Bell and Volinsky 2009, "Matrix Factorization Techniques for Recommender Systems"; Koren 2008, "Factorization
Meets the Neighborhood". The rating of user u for item i:

    mean + b_u + b_i + q_i · (p_u + |N(u)|^-1/2 Σ_{j in N(u)} y_j)        (the sum in SVD++ only)

Trained on all ratings by mini-batches of Adam with squared penalties on what a batch uses, as in the papers' loss.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from moekit.config.errors import ConfigError, require
from moekit.config.task import IdsInput, ProfileInput
from moekit.data.examples import Examples
from moekit.evaluate.baselines.base import Answers, Fitted, Problem, numbers, register_baseline
from moekit.evaluate.baselines.labels import plain


@register_baseline(
    "factorisation",
    "biased matrix factorisation of ratings by user and item",
    reads=("ids", "profile"),
    answers=("number",),
    libraries=("torch",),
)
def factorisation(
    problem: Problem,
    factors: int = 32,
    penalty: float = 0.1,
    epochs: int = 60,
    rate: float = 0.005,
    batch: int = 1024,
) -> Fitted:
    """Fit it; the epoch with the smallest error on validation is kept, the last one where there is none.

    The first two columns of the input of kind ids, or those of the first profile, are user and item; one unseen in
    training counts with its bias at 0.

    Args:
        factors: length of the vectors.
        penalty: weight of the squares of everything that a rating uses.
        epochs, rate, batch: of Adam.
    """
    return _factorise(problem, False, factors, penalty, epochs, rate, batch)


@register_baseline(
    "svd++",
    "SVD++: matrix factorisation that also reads which items a user has rated",
    reads=("ids", "profile"),
    answers=("number",),
    libraries=("torch",),
)
def svd_plus_plus(
    problem: Problem,
    factors: int = 32,
    penalty: float = 0.1,
    epochs: int = 60,
    rate: float = 0.005,
    batch: int = 1024,
) -> Fitted:
    """Fit it; arguments as of `factorisation`."""
    return _factorise(problem, True, factors, penalty, epochs, rate, batch)


def _factorise(
    problem: Problem, implicit: bool, factors: int, penalty: float, epochs: int, rate: float, batch: int
) -> Fitted:
    for name, value in {"factors": factors, "epochs": epochs, "batch": batch}.items():
        require(value >= 1, name, value, "must be at least 1")
    require(penalty >= 0, "penalty", penalty, "must be at least 0")
    columns = _user_and_item(problem)
    if len(problem.target.columns) != 1:
        raise ConfigError(f"targets.{problem.name}.columns must be one column, the rating")
    places = [{name: place for place, name in enumerate(dict.fromkeys(map(plain, problem.train[column])))}
              for column in columns]  # fmt: skip
    rating = problem.target.columns[0]

    def pairs(examples: Examples) -> torch.Tensor:
        # one more than all: unseen, with a row of zeros
        found = [[known.get(plain(name), len(known)) for name in examples[column]]
                 for column, known in zip(columns, places, strict=True)]  # fmt: skip
        return torch.tensor(found, dtype=torch.int64).T.reshape(-1, 2)

    seen = pairs(problem.train)
    truth = torch.from_numpy(numbers(problem.train[rating])).float()
    held = pairs(problem.validation) if len(problem.validation) else None
    wanted = numbers(problem.validation[rating]) if held is not None else None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(problem.seed)
        model = _Factors(
            [len(known) for known in places], factors, float(truth.mean()), seen if implicit else None
        )

        def error(model: _Factors) -> float:
            assert held is not None
            return float(np.sqrt(((_bounded(model.ratings(held), problem) - wanted) ** 2).mean()))

        kept = _train(model, seen, truth, penalty, epochs, rate, batch, error if held is not None else None)

    def predict(examples: Examples) -> Answers:
        return Answers(_bounded(model.ratings(pairs(examples)), problem))

    return Fitted(predict, {"factors": factors, "penalty": penalty, "rate": rate, **kept})


def _user_and_item(problem: Problem) -> Sequence[str]:
    given = problem.inputs.values()
    columns = [column for each in given if isinstance(each, IdsInput) for column in each.columns]
    profiles = [each for each in given if isinstance(each, ProfileInput)]
    if not columns and profiles:
        columns = [profiles[0].by, profiles[0].of]
    if len(columns) < 2:
        raise ConfigError(f"factorisation needs two columns of ids, user and item; got {', '.join(columns)}")
    return columns[:2]


def _bounded(values: np.ndarray, problem: Problem) -> np.ndarray:
    return values if problem.target.bounds is None else np.clip(values, *problem.target.bounds)


class _Factors(nn.Module):
    """Args: sizes: users and items. seen: pairs of the training ratings, for SVD++; None without."""

    def __init__(self, sizes: Sequence[int], factors: int, mean: float, seen: torch.Tensor | None):
        super().__init__()
        self.mean = mean
        # the last row, of users and items unseen in training, stays zero
        biases = [nn.Embedding(size + 1, 1, padding_idx=size) for size in sizes]
        vectors = [nn.Embedding(size + 1, factors, padding_idx=size) for size in sizes]
        for table in biases:
            nn.init.zeros_(table.weight)
        for table, size in zip(vectors, sizes, strict=True):
            nn.init.normal_(table.weight, std=0.1 / factors**0.5)
            with torch.no_grad():
                table.weight[size] = 0
        self.biases, self.vectors = nn.ModuleList(biases), nn.ModuleList(vectors)
        self.rated: torch.Tensor | None = None
        if seen is not None:
            self.implied = nn.Parameter(torch.zeros(sizes[1] + 1, factors))
            count = torch.bincount(seen[:, 0], minlength=sizes[0] + 1).clamp(min=1).float()
            weights = count[seen[:, 0]].rsqrt()
            shape = (sizes[0] + 1, sizes[1] + 1)
            self.rated = torch.sparse_coo_tensor(seen.T, weights, shape, check_invariants=True).coalesce()

    def forward(self, pairs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Ratings `[n]`, and the mean square of all that they use."""
        users, items = pairs[:, 0], pairs[:, 1]
        b_u, b_i = self.biases[0](users)[:, 0], self.biases[1](items)[:, 0]
        p, q = self.vectors[0](users), self.vectors[1](items)
        squares = b_u**2 + b_i**2 + (p**2).sum(1) + (q**2).sum(1)
        if self.rated is not None:
            implied = torch.sparse.mm(self.rated, self.implied)[users]
            p = p + implied
            squares = squares + (implied**2).sum(1)
        return self.mean + b_u + b_i + (p * q).sum(1), squares.mean()

    @torch.no_grad()
    def ratings(self, pairs: torch.Tensor) -> np.ndarray:
        return self(pairs)[0].double().numpy()


def _train(
    model: _Factors, pairs: torch.Tensor, truth: torch.Tensor, penalty: float, epochs: int, rate: float, batch: int,
    error: Any,
) -> dict[str, Any]:  # fmt: skip
    optimizer = torch.optim.Adam(model.parameters(), lr=rate)
    best: tuple[float, int, dict[str, torch.Tensor]] | None = None
    for epoch in range(1, epochs + 1):
        for rows in torch.randperm(len(pairs)).split(batch):
            optimizer.zero_grad()
            found, squares = model(pairs[rows])
            (((found - truth[rows]) ** 2).mean() + penalty * squares).backward()
            optimizer.step()
        if error is None:
            continue
        now = error(model)
        if best is None or now < best[0]:
            best = (now, epoch, {name: value.clone() for name, value in model.state_dict().items()})
        elif epoch - best[1] >= 5:
            break
    if best is None:
        return {"epochs": epochs}
    model.load_state_dict(best[2])
    return {"epochs": best[1], "validation": round(best[0], 6)}
