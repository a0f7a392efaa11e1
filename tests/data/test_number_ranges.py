"""Ranges of numbers: their edges, how far a number has come through each, and a stem that adds their vectors."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from moekit.config.task import FieldsInput
from moekit.data.encoding.fields import FieldsEncoder, ranges
from moekit.data.examples import Examples
from moekit.models.build import build_model  # noqa: F401  (registers the stems)
from moekit.models.task_stems import build_stem


def test_edges_part_the_values_by_the_roots_of_their_counts() -> None:
    # ten values that occur once: equal shares
    assert ranges(np.arange(10.0), 2) == [0.0, 4.0, 9.0]
    # 900 zeros weigh as much as 30 other values
    many = np.concatenate([np.zeros(900), np.arange(1.0, 31.0)])
    edges = ranges(many, 4)
    assert edges[0] == 0.0
    assert edges[-1] == 30.0
    assert 13 <= edges[-2] <= 17
    assert ranges(np.array([3.0, 3.0]), 8) == []
    assert ranges(np.array([1.0, 2.0]), 8) == [1.0, 2.0]


def encoder() -> FieldsEncoder:
    train = Examples({"x": [0.0, 1.0, 2.0, 3.0, 4.0], "same": [7.0] * 5})
    return FieldsEncoder.fit(FieldsInput(numbers=("x", "same"), bins=3), train)


def test_how_far_a_number_has_come() -> None:
    fitted = encoder()
    assert fitted.edges == [[0.0, 1.0, 3.0, 4.0], []]
    assert fitted.part().n_bins == 3
    examples = Examples({"x": [-5.0, 0.5, 2.0, 9.0, float("nan")], "same": [7.0] * 5})
    arrays = fitted.encode(examples).batch(np.arange(5))
    assert arrays["filled"][:, 0].tolist() == [[0, 0, 0], [0.5, 0, 0], [1, 0.5, 0], [1, 1, 1], [0, 0, 0]]
    assert arrays["filled"][:, 1].abs().sum() == 0
    again = FieldsEncoder.from_state(fitted.config, fitted.state())
    assert torch.equal(again.encode(examples).batch(np.arange(5))["filled"], arrays["filled"])


def test_the_stem_adds_the_ranges_vectors_and_a_missing_number_has_none() -> None:
    torch.manual_seed(0)
    fitted = encoder()
    stem = build_stem(fitted.part(), 4)
    arrays = fitted.encode(Examples({"x": [2.0, float("nan")], "same": [7.0, 7.0]})).batch(np.arange(2))
    found = stem(**arrays).x
    value = arrays["numbers"][0, 0]
    expected = value * stem.slopes[0] + stem.starts[0] + stem.ranges[0, 0] + 0.5 * stem.ranges[0, 1]
    torch.testing.assert_close(found[0, 0], expected)
    torch.testing.assert_close(found[1, 0], stem.gaps[0])
    found.sum().backward()
    assert stem.ranges.grad[0, :2].abs().sum() > 0


def test_without_bins_nothing_changes() -> None:
    plain = FieldsEncoder.fit(FieldsInput(numbers=("x",)), Examples({"x": [1.0, 2.0]}))
    assert set(plain.state()) == {"means", "deviations", "names"}
    assert set(plain.encode(Examples({"x": [1.5]})).batch(np.arange(1))) == {"numbers", "categories"}
    assert build_stem(plain.part(), 4).ranges is None
    assert FieldsEncoder.from_state(plain.config, plain.state()).edges == pytest.approx([])
