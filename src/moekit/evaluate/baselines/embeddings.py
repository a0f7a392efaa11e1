"""A bag of embeddings of hashed words and word pairs with a linear map, after fastText.

Joulin and others 2016, "Bag of Tricks for Efficient Text Classification", https://arxiv.org/abs/1607.01759, written in
torch: fastText's own package is archived.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from moekit.config.errors import ConfigError, require
from moekit.data.examples import Examples
from moekit.evaluate.baselines.base import Answers, Fitted, Problem, register_baseline
from moekit.evaluate.baselines.labels import agreement, class_codes, indicator, labels_where, micro_f1
from moekit.evaluate.baselines.words import split_words


@register_baseline(
    "bag-of-embeddings",
    "the mean of embeddings of hashed words and word pairs with a linear map, after fastText",
    reads=("text", "bag"),
    answers=("class",),
    libraries=("torch",),
)
def bag_of_embeddings(
    problem: Problem,
    size: int = 64,
    buckets: int = 2**18,
    ngrams: int = 2,
    epochs: int = 15,
    rate: float = 0.01,
    batch: int = 32,
) -> Fitted:
    """Fit it; the epoch with the best figure on validation is kept, the last one where there is none.

    Args:
        size: of an embedding.
        buckets: rows of the table of embeddings; terms that share one by hashing share a vector.
        ngrams: 1 for words, 2 for word pairs as well, and so on.
        epochs, rate, batch: of Adam, with a rate that falls to zero.
    """
    for name, value in {
        "size": size,
        "buckets": buckets,
        "ngrams": ngrams,
        "epochs": epochs,
        "batch": batch,
    }.items():
        require(value >= 1, name, value, "must be at least 1")
    columns = list(dict.fromkeys(given.column for given in problem.inputs.values()))  # type: ignore[union-attr]
    multi, column = problem.target.multi, problem.target.column
    if multi:
        labels, table = indicator(problem.train[column])
        y = torch.from_numpy(table).float()
    else:
        labels, codes = class_codes(problem.train[column])
        y = torch.from_numpy(codes)
    if len(labels) < (1 if multi else 2):
        raise ConfigError(f"targets.{problem.name} has too few classes in training ({len(labels)})")
    x = hashed_terms(problem.train, columns, ngrams, buckets)
    held = hashed_terms(problem.validation, columns, ngrams, buckets) if len(problem.validation) else []

    def figure(model: _Bag) -> float:
        found = model.all_logits(held)
        if multi:
            return micro_f1((found > 0).astype(np.int64), indicator(problem.validation[column], labels)[1])
        return agreement(found.argmax(1), labels, problem.validation[column])

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(problem.seed)
        model = _Bag(buckets, size, len(labels))
        settings = _train(model, x, y, epochs, rate, batch, figure if held else None, multi)

    def predict(examples: Examples) -> Answers:
        found = model.all_logits(hashed_terms(examples, columns, ngrams, buckets))
        if multi:
            return Answers(labels_where(found > 0, labels), labels, 1 / (1 + np.exp(-found)), True)
        probs = torch.softmax(torch.from_numpy(found), dim=1).numpy()
        return Answers([labels[place] for place in found.argmax(1)], labels, probs, True)

    return Fitted(predict, {"size": size, "buckets": buckets, "ngrams": ngrams, "rate": rate, **settings})


class _Bag(nn.Module):
    def __init__(self, buckets: int, size: int, n_labels: int):
        super().__init__()
        self.table = nn.EmbeddingBag(buckets, size, mode="mean", sparse=True)
        nn.init.normal_(self.table.weight, std=size**-0.5)
        self.out = nn.Linear(size, n_labels)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, texts: Sequence[np.ndarray]) -> torch.Tensor:
        offsets = np.cumsum([0, *(len(text) for text in texts[:-1])])
        terms = np.concatenate(texts) if texts else np.zeros(0, np.int64)
        return self.out(self.table(torch.from_numpy(terms), torch.from_numpy(offsets)))

    @torch.no_grad()
    def all_logits(self, texts: Sequence[np.ndarray], batch: int = 512) -> np.ndarray:
        """`[n, labels]`, by batches."""
        found = [self(texts[start : start + batch]).numpy() for start in range(0, len(texts), batch)]
        return np.concatenate(found) if found else np.zeros((0, self.out.out_features), np.float32)


def _train(
    model: _Bag,
    x: list[np.ndarray],
    y: torch.Tensor,
    epochs: int,
    rate: float,
    batch: int,
    figure: Any,
    multi: bool,
) -> dict[str, Any]:
    optimizers = [torch.optim.SparseAdam(model.table.parameters(), lr=rate),
                  torch.optim.Adam(model.out.parameters(), lr=rate)]  # fmt: skip
    n_steps = epochs * -(-len(x) // batch)
    schedules = [torch.optim.lr_scheduler.LinearLR(each, 1.0, 1e-3, n_steps) for each in optimizers]
    loss_of = nn.functional.binary_cross_entropy_with_logits if multi else nn.functional.cross_entropy
    best: tuple[float, int, dict[str, torch.Tensor]] | None = None
    for epoch in range(1, epochs + 1):
        for rows in torch.randperm(len(x)).split(batch):
            for optimizer in optimizers:
                optimizer.zero_grad()
            loss_of(model([x[row] for row in rows]), y[rows]).backward()
            for optimizer, schedule in zip(optimizers, schedules, strict=True):
                optimizer.step()
                schedule.step()
        found = figure(model) if figure is not None else 0.0
        if figure is not None and (best is None or found > best[0]):
            best = (found, epoch, {name: value.clone() for name, value in model.state_dict().items()})
    if best is None:
        return {"epochs": epochs}
    model.load_state_dict(best[2])
    return {"epochs": best[1], "validation": round(best[0], 6)}


def hashed_terms(examples: Examples, columns: Sequence[str], ngrams: int, buckets: int) -> list[np.ndarray]:
    """Row of each word and each run of up to `ngrams` words of the texts, by a hash that is the same everywhere.

    >>> two = Examples({"a": ["x y", None]})
    >>> [len(terms) for terms in hashed_terms(two, ["a"], 2, 1000)]
    [3, 0]
    """
    known: dict[str, int] = {}
    result = []
    for row in range(len(examples)):
        found = []
        for column in columns:
            text = examples[column][row]
            words = split_words("" if text is None else text if isinstance(text, str) else " ".join(text))
            for size in range(1, ngrams + 1):
                for start in range(len(words) - size + 1):
                    term = " ".join(words[start : start + size])
                    if term not in known:
                        known[term] = (
                            zlib.crc32(f"{column}\0{term}".encode("utf-8", "surrogatepass")) % buckets
                        )
                    found.append(known[term])
        result.append(np.asarray(found, dtype=np.int64))
    return result
