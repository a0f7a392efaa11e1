"""What counts as the reference's answer."""

from __future__ import annotations

import math

import pytest
import torch

from moekit.evaluate.bench.checks import Tolerance, deviations, rounding

NARROW = Tolerance(0.01, 0.04)


def one(answer, expected, tolerance=NARROW):
    (found,) = deviations({"y": answer}, {"y": expected}, {"y": tolerance})
    return found


def test_by_hand():
    expected = torch.tensor([[3.0, 4.0], [0.0, 5.0]])
    answer = expected + torch.tensor([[0.3, 0.4], [0.0, 0.0]])
    found = one(answer, expected)
    assert found.whole == pytest.approx(math.sqrt(0.25 / 50))  # 0.0707
    assert found.row == pytest.approx(0.1)
    assert found.reason == "y is off by 0.071 of its size; 0.01 is allowed"


def test_one_wrong_row_of_many_shows():
    expected = torch.randn(100_000, 4)
    answer = expected.clone()
    answer[77_777] = -expected[77_777]
    found = one(answer, expected)
    assert found.whole < NARROW.whole
    assert found.reason.startswith("row 77777 of y is off by")


def test_small_rows_are_measured_by_the_mean_row():
    expected = torch.tensor([[1.0, 1.0], [1e-6, 1e-6]])
    assert one(expected + 1e-3, expected).reason == ""


def test_a_share_of_the_rows_may_be_off():
    expected = torch.ones(10, 2)
    answer = expected.clone()
    answer[:2] = 3.0
    assert one(answer, expected, Tolerance(2.0, 0.1, share=0.8)).reason == ""
    assert (
        "10% of the rows of y is off by 2 or more"
        in one(answer, expected, Tolerance(2.0, 0.1, share=0.9)).reason
    )


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_numbers_that_are_none_are_refused(value):
    answer = torch.ones(3, 2)
    answer[0, 0] = value
    assert one(answer, torch.ones(3, 2)).reason


def test_missing_and_misshapen_outputs():
    (missing,) = deviations({}, {"y": torch.ones(2)}, {"y": NARROW})
    assert missing.reason == "gives no y"
    assert one(torch.ones(2, 3), torch.ones(3, 2)).reason == "gives y of shape [2, 3], not [3, 2]"


def test_zeros_match_zeros_only():
    assert one(torch.zeros(2, 2), torch.zeros(2, 2)).reason == ""
    assert one(torch.full((2, 2), 1e-9), torch.zeros(2, 2)).reason


@pytest.mark.parametrize("steps", [1, 4, 16])
def test_rounding_lets_bfloat16_pass_and_no_more(steps):
    """A value stored so many times in bfloat16, each time as another number, against float32."""
    exact = torch.randn(64, 256)
    answer = exact.clone()
    for _ in range(steps):
        factor = 1 + torch.rand(64, 256)
        answer, exact = (answer * factor).bfloat16().float(), exact * factor
    tolerance = rounding(torch.bfloat16, steps)
    assert one(answer, exact, tolerance).reason == ""
    assert one(answer * 1.1, exact, rounding(torch.bfloat16, 16)).reason
