"""A wide map that a linear solver fits to the training examples: the linear model of the field, beside the deep one.

Its margins become logits by one factor, chosen on training examples that a second fit has not seen: on those that it
was fitted to, a linear model is all but sure of everything (Guo and others 2017, "On Calibration of Modern Neural
Networks", https://arxiv.org/abs/1706.04599).

Shape legend: N examples, V terms of a bag (0 is padding), C classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from moekit.config.errors import DataError, MissingExtraError
from moekit.data.encoding.base import Ragged

# one example in so many is kept from the second fit
APART = 5
Solver = Literal["svm", "logistic"]


@dataclass(frozen=True)
class WideFit:
    """A fitted map: `tables` `[V, C]` by bag and `bias` `[C]` give logits; `scale`: logits of a margin of 1."""

    tables: Mapping[str, np.ndarray]
    bias: np.ndarray
    scale: float


def fit_wide(
    solver: Solver, c: float, bags: Mapping[str, Ragged], sizes: Mapping[str, int], classes: np.ndarray, n_classes: int
) -> WideFit:  # fmt: skip
    """Fit a linear map from bags to classes; the same every time.

    Args:
        solver: a linear support vector machine (one class against the rest), or logistic regression.
        c: larger fits more closely.
        bags: ids and weights of the training examples.
        sizes: V of each.
        classes: `[N]`, below 0 where unknown; such examples are left out.
        n_classes: C.

    Errors: `DataError` where fewer than two classes are known; `MissingExtraError` without scikit-learn.

    >>> bag = Ragged(0, ids=[np.array([1 + i % 2]) for i in range(20)], weights=[np.ones(1, np.float32)] * 20)
    >>> fit = fit_wide("svm", 1.0, {"bag": bag}, {"bag": 3}, np.arange(20) % 2, 2)
    >>> fit.tables["bag"].shape, fit.tables["bag"].argmax(axis=1)[1:].tolist()
    ((3, 2), [0, 1])
    """
    try:
        from scipy import sparse
    except ImportError:
        raise MissingExtraError(
            "wide_fit svm and logistic need scikit-learn: pip install 'moekit[tasks]'"
        ) from None
    known = np.flatnonzero(classes >= 0)
    x = sparse.hstack([_matrix(bag, sizes[name]) for name, bag in bags.items()], format="csr")[known]
    y = classes[known]
    if len(np.unique(y)) < 2:
        raise DataError("a wide map needs training examples of at least two classes")
    weight, bias = _fitted(solver, c, x, y, n_classes)
    apart = np.random.Generator(np.random.PCG64(0)).permutation(len(y)) % APART == 0
    scale = 1.0
    if apart.any() and len(np.unique(y[~apart])) > 1:
        other, start = _fitted(solver, c, x[~apart], y[~apart], n_classes)
        scale = _scale(np.asarray(x[apart] @ other + start), y[apart])
    ends = np.cumsum([sizes[name] for name in bags])
    tables = {
        name: (weight[end - sizes[name] : end] * scale).astype(np.float32)
        for name, end in zip(bags, ends, strict=True)
    }
    return WideFit(tables, (bias * scale).astype(np.float32), scale)


def _matrix(bag: Ragged, size: int) -> Any:
    """`[N, V]` sparse; terms at padding weigh nothing."""
    from scipy import sparse

    ids, weights = bag.sequences["ids"], bag.sequences["weights"]
    ends = np.cumsum([0, *(len(row) for row in ids)])
    return sparse.csr_matrix((np.concatenate(weights), np.concatenate(ids), ends), shape=(len(ids), size))


def _fitted(solver: Solver, c: float, x: Any, y: np.ndarray, n_classes: int) -> tuple[np.ndarray, np.ndarray]:
    """`[V, C]` and `[C]`; a class that `y` lacks gets no terms, and the margin of a sure no."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.svm import LinearSVC

    svm = solver == "svm"
    model = (LinearSVC(C=c, random_state=0) if svm else LogisticRegression(C=c, max_iter=1000)).fit(x, y)
    weight, bias = model.coef_.T, model.intercept_
    if weight.shape[1] == 1:
        weight, bias = np.concatenate([-weight, weight], axis=1), np.concatenate([-bias, bias])
    every = np.zeros((weight.shape[0], n_classes)), np.full(n_classes, min(-1.0, float(bias.min())))
    every[0][:, model.classes_], every[1][model.classes_] = weight, bias
    return every


def _scale(margins: np.ndarray, y: np.ndarray) -> float:
    """The factor under which these margins as logits have the lowest cross-entropy."""
    from scipy.optimize import minimize_scalar
    from scipy.special import log_softmax

    rows = np.arange(len(y))

    def loss(log_scale: float) -> float:
        return -float(log_softmax(margins * np.exp(log_scale), axis=1)[rows, y].mean())

    return float(np.exp(minimize_scalar(loss, bounds=(-4.0, 4.0), method="bounded").x))
