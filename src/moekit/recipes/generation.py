"""Only of the recipe generation: pictures are drawn for the classes of the test, and judged.

    recognised      share in which a judge trained on real pictures sees the class that was asked for
    distance        Frechet distance of the judge's features of drawn and of real pictures
    bits            of a patch's code, on real pictures of the test: what language models are measured by
    copied          share that repeats a training picture code by code

The judge compares with one half of the test; the classes of the other half are asked for, so that its own pictures,
and what the codebook leaves of them, are measured in the same way and bound what can be reached.

Shape legend: N pictures, P patches, K codes.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from moekit.config.errors import ConfigError, MissingExtraError
from moekit.config.task_run import TaskRunConfig
from moekit.data.encoding.codebook import CodesEncoder
from moekit.data.encoding.whole import Encoding
from moekit.data.examples import Examples, TaskData
from moekit.data.task_loader import task_batches
from moekit.evaluate.drawing import in_rows, save_png
from moekit.evaluate.generated import Judge, frechet_distance
from moekit.evaluate.task import predict
from moekit.recipes.tasks import Recipe
from moekit.train.run import LoadedTask

# pictures that are drawn, at most
MOST = 1000
_BATCH = 250
_PER_CLASS = 8


def measure(loaded: LoadedTask, data: TaskData) -> dict[str, float]:
    """Everything above, of a trained model."""
    asked, _ = halves(data)
    pictures, codes = drawn(loaded, asked)
    own = codes_of(loaded.encoding, data.train)
    seen = {row.tobytes() for row in own}
    return {
        **judged(data, pictures),
        "bits": bits(loaded, data.test.rows(range(min(MOST, len(data.test))))),
        "copied": float(np.mean([row.tobytes() in seen for row in codes])),
    }


def drawn(loaded: LoadedTask, asked: Examples, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Pictures `[N, H, W, C]` for the classes of `asked`, and their codes `[N, P]`; the same ones for the same seed."""
    (target,) = loaded.config.targets
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        said = predict(loaded.model, loaded.encoding, asked, batch_size=_BATCH)
    return said.raw[target], np.asarray([answer["codes"] for answer in said.answers[target]], np.int64)


@torch.inference_mode()
def bits(loaded: LoadedTask, examples: Examples) -> float:
    """Mean bits of a patch's code, given its class and the patches before it."""
    encoded = loaded.encoding.encode(examples)
    total = 0.0
    for batch in task_batches(encoded, _BATCH):
        loss = loaded.model(batch.inputs, batch.targets).loss
        assert loss is not None
        total += float(loss) * len(batch.rows)
    return total / len(encoded) / math.log(2)


def halves(data: TaskData) -> tuple[Examples, Examples]:
    """(those whose classes are asked for, those that are compared with), equally many of the test."""
    n = min(MOST, len(data.test) // 2)
    return data.test.rows(np.arange(n) * 2), data.test.rows(np.arange(n) * 2 + 1)


def judged(data: TaskData, pictures: np.ndarray) -> dict[str, float]:
    """recognised and distance of pictures for the classes that are asked for."""
    asked, other = halves(data)
    judge = _judge(data)
    said, features = judge.says(pictures)
    _, real = judge.says(np.asarray(other["image"]))
    right = [name == wanted for name, wanted in zip(said, asked["label"], strict=True)]
    return {"recognised": float(np.mean(right)), "distance": frechet_distance(features, real)}


_JUDGES: dict[str, Judge] = {}


def _judge(data: TaskData) -> Judge:
    """The judge of some data, trained once in a process."""
    key = data.fingerprint()
    if key not in _JUDGES:
        _JUDGES.clear()
        _JUDGES[key] = Judge(np.asarray(data.train["image"]), [str(label) for label in data.train["label"]])
    return _JUDGES[key]


def codes_of(encoding: Encoding, examples: Examples) -> np.ndarray:
    """`[N, P]` of the pictures of examples."""
    (encoder,) = encoding.targets.values()
    assert isinstance(encoder, CodesEncoder)
    return encoder.codes(np.asarray(examples["image"]))


def baseline(name: str, recipe: Recipe, config: TaskRunConfig, data: TaskData) -> dict[str, Any]:
    """The row of a bound or of a classical generator."""
    rows: dict[str, Callable[[], dict[str, Any]]] = {
        "bound: real pictures": dict,
        "bound: codebook": lambda: _codebook(config, data),
        "independent patches": lambda: _independent(config, data),
        "gaussians": lambda: _gaussians(data),
    }
    if name not in rows:
        raise ConfigError(f"recipe {recipe.name} has no baseline {name!r}; known: {', '.join(rows)}")
    began = time.perf_counter()
    found = rows[name]()
    pictures = found.pop("pictures", np.asarray(halves(data)[0]["image"]))
    seconds = time.perf_counter() - began
    return {"scores": {**judged(data, pictures), **found}, "seconds": seconds}


def _encoding(config: TaskRunConfig, data: TaskData) -> tuple[Encoding, CodesEncoder]:
    encoding = Encoding.fit(config.inputs, config.targets, data.train)
    (encoder,) = encoding.targets.values()
    assert isinstance(encoder, CodesEncoder)
    return encoding, encoder


def _codebook(config: TaskRunConfig, data: TaskData) -> dict[str, Any]:
    """The pictures of the classes asked for, each patch replaced by its code: a model can draw none better."""
    encoding, encoder = _encoding(config, data)
    return {"pictures": encoder.images(codes_of(encoding, halves(data)[0]))}


def _independent(config: TaskRunConfig, data: TaskData) -> dict[str, Any]:
    """Each patch drawn by itself, as often as training has each code there in that class (plus one)."""
    encoding, encoder = _encoding(config, data)
    codes = codes_of(encoding, data.train)
    labels = np.asarray(data.train["label"])
    k = encoder.config.codes
    shares = {}
    for label in sorted(set(labels)):
        mine = codes[labels == label]
        counts = np.stack([np.bincount(column, minlength=k) for column in mine.T]) + 1.0
        shares[label] = counts / counts.sum(axis=1, keepdims=True)
    asked, _ = halves(data)
    rng = np.random.Generator(np.random.PCG64([0, 7]))
    picked = np.stack([_one_each(shares[label], rng) for label in asked["label"]])
    test = data.test.rows(range(min(MOST, len(data.test))))
    places = np.arange(codes.shape[1])
    rows = zip(codes_of(encoding, test), test["label"], strict=True)
    cost = np.mean([-np.log2(shares[label][places, row]).mean() for row, label in rows])
    return {"pictures": encoder.images(picked), "bits": float(cost)}


def _one_each(shares: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """`[P]`: a code for each row of probabilities `[P, K]`."""
    return (shares.cumsum(axis=1) < rng.random((len(shares), 1))).sum(axis=1).clip(max=shares.shape[1] - 1)


def _gaussians(data: TaskData) -> dict[str, Any]:
    """A Gaussian for each class, over the principal components of its pictures."""
    from sklearn.decomposition import PCA

    images, labels = np.asarray(data.train["image"]), np.asarray(data.train["label"])
    asked = np.asarray(halves(data)[0]["label"])
    rng = np.random.Generator(np.random.PCG64([0, 8]))
    pictures = np.zeros((len(asked), *images.shape[1:]), np.uint8)
    for label in sorted(set(asked)):
        mine = images[labels == label].reshape(-1, images[0].size).astype(np.float32)
        pca = PCA(min(60, len(mine)), random_state=0).fit(mine)
        wanted = asked == label
        normal = rng.normal(size=(int(wanted.sum()), pca.n_components_)) * np.sqrt(pca.explained_variance_)
        found = np.clip(np.rint(pca.inverse_transform(normal)), 0, 255).astype(np.uint8)
        pictures[wanted] = found.reshape(-1, *images.shape[1:])
    return {"pictures": pictures}


def notes(loaded: LoadedTask, data: TaskData) -> str:
    """Draws some pictures of each class, below real ones, into the run's folder."""
    labels = sorted({str(label) for label in data.test["label"]})
    asked = Examples({"label": [label for label in labels for _ in range(_PER_CLASS)]})
    pictures, _ = drawn(loaded, asked)
    try:
        path = save_png(loaded.folder / "drawn.png", in_rows(list(pictures), columns=_PER_CLASS, scale=2))
    except MissingExtraError:
        return ""
    return f"{_PER_CLASS} pictures drawn for each of {len(labels)} classes, a row each: {path}."
