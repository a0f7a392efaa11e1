"""A judge of pictures, and how far two sets of features lie apart."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from moekit.config.errors import ConfigError
from moekit.evaluate.generated import Judge, frechet_distance


def stripes(n: int, seed: int) -> tuple[np.ndarray, list[str]]:
    """Pictures of rows or of columns in random greys."""
    rng = np.random.default_rng(seed)
    greys = rng.integers(0, 256, (n, 8, 1, 1)).repeat(8, axis=2).astype(np.uint8)
    labels = ["rows" if i % 2 else "columns" for i in range(n)]
    greys[::2] = greys[::2].transpose(0, 2, 1, 3)
    return greys, labels


def test_a_judge_tells_what_it_has_learnt_and_is_the_same_again():
    images, labels = stripes(200, 0)
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    judge = Judge(images, labels, steps=40)
    assert torch.equal(torch.random.get_rng_state(), before), "others' random numbers stay as they were"
    test, wanted = stripes(60, 1)
    said, features = judge.says(test)
    assert np.mean([a == b for a, b in zip(said, wanted, strict=True)]) > 0.95
    assert features.shape == (60, 64)
    torch.manual_seed(6)
    np.testing.assert_array_equal(Judge(images, labels, steps=40).says(test)[1], features)
    # other stripes are nearer than noise
    noise = np.random.default_rng(2).integers(0, 256, test.shape).astype(np.uint8)
    other = judge.says(stripes(60, 3)[0])[1]
    assert frechet_distance(other, features) < frechet_distance(judge.says(noise)[1], features) / 3


def test_the_distance_of_gaussians_by_hand():
    rng = np.random.default_rng(0)
    one = rng.normal(size=(500, 3))
    assert frechet_distance(one, one) == pytest.approx(0, abs=1e-9)
    # moved: the squared step; spread threefold: (3 - 1)^2 times the variance of each column
    assert frechet_distance(one, one + np.array([1.0, 0, 2])) == pytest.approx(5)
    centred = one - one.mean(axis=0)
    assert frechet_distance(centred, 3 * centred) == pytest.approx(4 * one.var(axis=0, ddof=1).sum())
    # turned spreads: eigenvalues (4, 1) against (1, 4) are (2 - 1)^2 twice
    flat = np.array([[2.0, 0], [-2, 0], [0, 1], [0, -1]]) * (3 / 2) ** 0.5
    assert np.cov(flat, rowvar=False).round(9).tolist() == [[4.0, 0.0], [0.0, 1.0]]
    assert frechet_distance(flat, flat[:, ::-1]) == pytest.approx(2)
    with pytest.raises(ConfigError, match="features must have at least two rows"):
        frechet_distance(one[:1], one)
