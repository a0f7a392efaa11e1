"""Link prediction by ComplEx: entities and relations as complex vectors, trained against all entities at once.

Trouillon et al. 2016, "Complex Embeddings for Simple Link Prediction", https://arxiv.org/abs/1606.06357; the loss over
all entities and the cubed norm as penalty are those of Lacroix, Usunier and Obozinski 2018, "Canonical Tensor
Decomposition for Knowledge Base Completion", https://arxiv.org/abs/1806.07297. Written in torch: the libraries that
have it bring their own data sets, trainers and dozens of dependencies.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from moekit.config.errors import ConfigError, require
from moekit.config.task import IdsInput
from moekit.data.examples import Examples
from moekit.evaluate.baselines.base import Answers, Fitted, Problem, register_baseline
from moekit.evaluate.baselines.labels import plain
from moekit.evaluate.ranking_metrics import mrr_filtered


@register_baseline(
    "complex",
    "ComplEx: complex vectors of entities and relations, with the cubed norm as penalty",
    reads=("ids",),
    answers=("entity",),
    libraries=("torch",),
)
def complex_links(
    problem: Problem,
    factors: int = 128,
    penalty: float = 0.05,
    epochs: int = 60,
    rate: float = 0.1,
    batch: int = 256,
    patience: int = 8,
) -> Fitted:
    """Fit it; the epoch with the best filtered mean reciprocal rank on validation is kept, the last one without it.

    Args:
        factors: complex numbers of a vector.
        penalty: weight of the cubed norms of what an example uses.
        epochs, rate, batch: of Adagrad.
        patience: epochs without a gain after which it ends.
    """
    for name, value in {"factors": factors, "epochs": epochs, "batch": batch, "patience": patience}.items():
        require(value >= 1, name, value, "must be at least 1")
    entity, relation = _entity_and_relation(problem)
    asked = problem.target.column
    names = list(dict.fromkeys(map(plain, [*problem.train[entity], *problem.train[asked]])))
    entities = {name: place for place, name in enumerate(names)}
    relations = {name: place for place, name in enumerate(dict.fromkeys(map(plain, problem.train[relation])))}

    def places(examples: Examples, column: str, known: dict[Any, int]) -> Tensor:
        # one more than all: unseen
        return torch.tensor(
            [known.get(plain(name), len(known)) for name in examples[column]], dtype=torch.int64
        )

    def triples(examples: Examples) -> Tensor:
        found = torch.stack([places(examples, entity, entities), places(examples, relation, relations),
                             places(examples, asked, entities)], dim=1)  # fmt: skip
        return found[found[:, 2] < len(entities)]

    train, held = triples(problem.train), triples(problem.validation)
    figure = _Figure(train, held) if len(held) else None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(problem.seed)
        model = _ComplEx(len(entities), len(relations), factors)
        kept = _train(model, train, figure, penalty, epochs, rate, batch, patience)

    def predict(examples: Examples) -> Answers:
        with torch.no_grad():
            pairs = places(examples, entity, entities), places(examples, relation, relations)
            found = model(*pairs)[0].double().numpy()
        return Answers([names[place] for place in found.argmax(1)], tuple(names), found)

    return Fitted(predict, {"factors": factors, "penalty": penalty, "rate": rate, **kept})


def _entity_and_relation(problem: Problem) -> tuple[str, str]:
    given = problem.inputs.get(problem.target.input)
    columns: Sequence[str] = given.columns if isinstance(given, IdsInput) else ()
    like = problem.target.like
    others = [column for column in columns if column != like]
    if like not in columns or len(others) != 1:
        raise ConfigError(
            f"complex needs an input of two columns, the entity (targets.{problem.name}.like) and the relation; got "
            f"{', '.join(columns) or 'none'}"
        )
    return like, others[0]


class _ComplEx(nn.Module):
    """Vectors of entities and relations, real parts first; the last row of each, unseen in training, stays zero."""

    def __init__(self, n_entities: int, n_relations: int, factors: int) -> None:
        super().__init__()
        self.entities = nn.Parameter(torch.randn(n_entities, 2 * factors) * 1e-3)
        self.relations = nn.Parameter(torch.randn(n_relations, 2 * factors) * 1e-3)

    def forward(self, heads: Tensor, relations: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Logits `[n, entities]`, and the vectors of heads and relations."""
        tables = [
            torch.cat([table, table.new_zeros(1, table.shape[1])])
            for table in (self.entities, self.relations)
        ]
        head, relation = tables[0][heads], tables[1][relations]
        (a, b), (c, d) = head.chunk(2, dim=1), relation.chunk(2, dim=1)
        return torch.cat([a * c - b * d, a * d + b * c], dim=1) @ self.entities.T, head, relation


class _Figure:
    """The filtered mean reciprocal rank of triples that are held back, other right answers of both splits left out."""

    def __init__(self, train: Tensor, held: Tensor) -> None:
        answers: dict[tuple[int, int], set[int]] = defaultdict(set)
        for head, relation, tail in torch.cat([train, held]).tolist():
            answers[head, relation].add(tail)
        self.held = held
        self.known = [answers[head, relation] for head, relation, _ in held.tolist()]

    def __call__(self, model: _ComplEx) -> float:
        with torch.no_grad():
            logits = model(self.held[:, 0], self.held[:, 1])[0]
        return mrr_filtered(logits.numpy(), self.held[:, 2].numpy(), self.known)


def _train(
    model: _ComplEx, triples: Tensor, figure: _Figure | None, penalty: float, epochs: int, rate: float, batch: int,
    patience: int,
) -> dict[str, Any]:  # fmt: skip
    optimizer = torch.optim.Adagrad(model.parameters(), lr=rate)
    best: tuple[float, int, dict[str, Tensor]] | None = None
    for epoch in range(1, epochs + 1):
        for rows in torch.randperm(len(triples)).split(batch):
            optimizer.zero_grad()
            heads, relations, tails = triples[rows].T
            logits, *vectors = model(heads, relations)
            cubes = sum(_cubes(part) for part in (*vectors, model.entities[tails]))
            (nn.functional.cross_entropy(logits, tails) + penalty * cubes).backward()
            optimizer.step()
        if figure is None:
            continue
        now = figure(model)
        if best is None or now > best[0]:
            best = (now, epoch, {name: value.clone() for name, value in model.state_dict().items()})
        elif epoch - best[1] >= patience:
            break
    if best is None:
        return {"epochs": epochs}
    model.load_state_dict(best[2])
    return {"epochs": best[1], "validation": round(best[0], 6)}


def _cubes(vectors: Tensor) -> Tensor:
    """Mean over the vectors of the sum of their cubed moduli, by three."""
    real, imaginary = vectors.chunk(2, dim=1)
    return (real**2 + imaginary**2 + 1e-12).pow(1.5).sum(1).mean() / 3
