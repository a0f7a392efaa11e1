"""The example on handwritten digits: its split, its twins, its augmentation, and a short run."""

from __future__ import annotations

import importlib.util
import subprocess
import sys

import numpy as np
import pytest

pytest.importorskip("keras.ops", reason="Keras 3 is not installed")


@pytest.fixture(scope="module")
def example(repository):
    path = repository / "examples" / "keras_mnist.py"
    specification = importlib.util.spec_from_file_location("keras_mnist_example", path)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def test_the_split_is_stratified_disjoint_and_the_same_every_time(example):
    labels = np.repeat(np.arange(10), np.arange(50, 150, 10))
    train, test = example.split(labels)
    assert sorted([*train, *test]) == list(range(len(labels)))
    assert (np.bincount(labels[test]) == np.arange(10, 30, 2)).all()
    for first, again in zip((train, test), example.split(labels), strict=True):
        assert (first == again).all()


def test_the_twins_have_equal_active_parameters(example):
    (sparse, _), (dense, _) = (example.build(kind) for kind in example.KINDS)
    active, total = example.parameters(sparse, "moe")
    twin, _ = example.parameters(dense, "dense")
    assert active <= twin <= 1.01 * active
    assert total - active == 6 * 3 * 64 * 64
    experts = sparse.get_layer("experts")
    assert sum(v.value.shape[0] != 8 for v in experts.trainable_variables) == 0
    # what one token does not touch: six of the eight experts
    assert active == sparse.count_params() - 6 * (experts.count_params() - 8 * 64) // 8


def test_shifts_move_each_image_by_at_most_two_pixels(example):
    images = np.zeros((50, 28, 28, 1), np.float32)
    images[:, 10, 20] = 1.0
    moved = example.shifted(images, np.random.default_rng(0))
    place = np.argwhere(moved[..., 0] == 1.0)
    assert len(place) == 50
    offsets = place[:, 1:] - [10, 20]
    assert {tuple(row) for row in np.abs(offsets)} <= {(i, j) for i in range(3) for j in range(3)}
    assert len({tuple(row) for row in offsets}) > 10


def test_both_kinds_learn_bars(example, monkeypatch):
    """Ten classes of stripes in place of digits: no package is needed."""
    rng = np.random.default_rng(0)
    labels = np.arange(320) % 10
    images = rng.uniform(0, 0.2, (320, 28, 28, 1)).astype(np.float32)
    for image, label in zip(images, labels, strict=True):
        image[2 + 2 * label : 5 + 2 * label] += 0.8
    monkeypatch.setattr(example, "BATCH", 32)
    data = images[:240], labels[:240], images[240:], labels[240:]
    for kind in example.KINDS:
        result = example.train(kind, 0, 4, data, verbose=0)
        assert result["accuracy"] > 0.5, kind  # a tenth by chance
        if kind == "moe":
            assert sum(result["load"]) == 80 * 49 * 2
            assert np.sum(result["load_by_digit"], axis=0).tolist() == result["load"]


@pytest.mark.network
def test_the_digits_are_those_of_the_package(example):
    images, labels = example.digits()
    assert images.shape == (10000, 28, 28, 1)
    assert np.bincount(labels).tolist() == [1001, 1127, 991, 1032, 980, 863, 1014, 1070, 944, 978]
    assert (images.min(), images.max()) == (0.0, 1.0)
    train, test = example.split(labels)
    assert (len(train), len(test)) == (8000, 2000)


@pytest.mark.slow
@pytest.mark.network
def test_the_short_mode_runs(repository):
    command = [sys.executable, str(repository / "examples" / "keras_mnist.py"), "--short"]
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stderr
    assert "moe: " in done.stdout
    assert "dense: " in done.stdout
