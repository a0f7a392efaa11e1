"""Sampling rules, checked against numbers worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from moekit.config.errors import ConfigError, NonFiniteError
from moekit.generate import Sampler

# probabilities 0.5, 0.25, 0.125, 0.125
LOGITS = torch.tensor([[8.0, 4.0, 2.0, 2.0]]).log()


def probs(**rules) -> list[float]:
    return Sampler(**rules).probs(LOGITS)[0].tolist()


@pytest.mark.parametrize(
    ("rules", "expected"),
    [
        ({}, [1 / 2, 1 / 4, 1 / 8, 1 / 8]),
        ({"temperature": 0}, [1, 0, 0, 0]),
        # 1 / 0.5 squares the odds: 64, 16, 4, 4 of 88
        ({"temperature": 0.5}, [64 / 88, 16 / 88, 4 / 88, 4 / 88]),
        # square roots of the odds: 2 sqrt 2, 2, sqrt 2, sqrt 2 of 4 sqrt 2 + 2 = 7.656854
        ({"temperature": 2}, [2.828427 / 7.656854, 2 / 7.656854, 1.414214 / 7.656854, 1.414214 / 7.656854]),
        ({"top_k": 1}, [1, 0, 0, 0]),
        ({"top_k": 2}, [2 / 3, 1 / 3, 0, 0]),
        ({"top_k": 4}, [1 / 2, 1 / 4, 1 / 8, 1 / 8]),
        ({"top_k": 99}, [1 / 2, 1 / 4, 1 / 8, 1 / 8]),
        # 0.5 is reached by the first alone; above it the second comes in, whole
        ({"top_p": 0.5}, [1, 0, 0, 0]),
        ({"top_p": 0.6}, [2 / 3, 1 / 3, 0, 0]),
        ({"top_p": 0.01}, [1, 0, 0, 0]),
        # of two equal tokens the first is enough
        ({"top_p": 0.8}, [4 / 7, 2 / 7, 1 / 7, 0]),
        ({"top_p": 1.0}, [1 / 2, 1 / 4, 1 / 8, 1 / 8]),
        # at least 0.4 * 0.5 = 0.2
        ({"min_p": 0.4}, [2 / 3, 1 / 3, 0, 0]),
        ({"min_p": 0.25}, [1 / 2, 1 / 4, 1 / 8, 1 / 8]),
        ({"min_p": 1.0}, [1, 0, 0, 0]),
        # top-k first: of 2/3 and 1/3 the first reaches 0.6
        ({"top_k": 2, "top_p": 0.6}, [1, 0, 0, 0]),
        # the temperature comes before: 64/88 = 0.727 reaches 0.7 alone
        ({"temperature": 0.5, "top_p": 0.7}, [1, 0, 0, 0]),
    ],
)  # fmt: skip
def test_probabilities_by_hand(rules, expected):
    assert probs(**rules) == pytest.approx(expected, rel=1e-5)


def test_top_k_keeps_exactly_k_among_equals():
    assert (Sampler(top_k=3).probs(torch.zeros(2, 10)) > 0).sum(1).tolist() == [3, 3]


def test_repetition_penalty_by_hand():
    logits = torch.tensor([[2.0, -1.0, 0.5, 0.0], [2.0, -1.0, 0.5, 0.0]])
    sampler = Sampler(repetition_penalty=2.0)
    got = sampler.probs(logits, history=[[0, 1, 0], []])
    # positive halves, negative doubles, once however often the token came
    expected = torch.tensor([[1.0, -2.0, 0.5, 0.0], [2.0, -1.0, 0.5, 0.0]]).softmax(1)
    torch.testing.assert_close(got, expected)
    assert torch.equal(logits[0], torch.tensor([2.0, -1.0, 0.5, 0.0]))  # the input stays as it was
    greedy = Sampler(temperature=0, repetition_penalty=5.0)
    assert greedy(logits, history=[[0], [1]]).tolist() == [2, 0]


def test_greedy_takes_the_first_of_equals():
    assert Sampler(temperature=0)(torch.tensor([[1.0, 3.0, 3.0]])).tolist() == [1]


def test_draws_follow_the_probabilities():
    generator = torch.Generator().manual_seed(0)
    n = 4000
    draws = Sampler(top_k=3)(LOGITS.expand(n, -1), generator=generator)
    shares = torch.bincount(draws, minlength=4) / n
    assert sorted(shares[2:].tolist())[0] == 0  # one of the two equal tokens stays
    shares = torch.stack([shares[0], shares[1], shares[2] + shares[3]])
    # three standard deviations of the largest share
    torch.testing.assert_close(shares, torch.tensor([4, 2, 1]) / 7, atol=3 * math.sqrt(0.25 / n), rtol=0)


def test_a_seed_repeats_the_draws_and_another_changes_them():
    def run(seed):
        return Sampler()(
            torch.zeros(1, 1000).expand(20, -1), generator=torch.Generator().manual_seed(seed)
        ).tolist()

    assert run(1) == run(1) != run(2)


def test_a_row_draws_alone_as_it_draws_in_a_batch():
    logits = torch.randn(3, 500, generator=torch.Generator().manual_seed(0))
    together = Sampler()(logits, generator=[torch.Generator().manual_seed(i) for i in range(3)])
    alone = [
        Sampler()(logits[i : i + 1], generator=torch.Generator().manual_seed(i)).item() for i in range(3)
    ]
    assert together.tolist() == alone


def test_forbidden_tokens_and_half_precision():
    logits = torch.tensor([[-math.inf, 0.0, -math.inf]], dtype=torch.bfloat16)
    for rules in (
        {},
        {"temperature": 0},
        {"temperature": 1e-6},
        {"top_k": 2},
        {"top_p": 0.9},
        {"min_p": 0.1},
    ):
        assert Sampler(**rules)(logits).tolist() == [1]


def test_tiny_temperature_is_greedy_and_finite():
    assert Sampler(temperature=1e-30).probs(torch.tensor([[5.0, 400.0]])).tolist() == [[0.0, 1.0]]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_broken_logits(bad):
    logits = torch.zeros(2, 4)
    logits[1] = bad
    for temperature in (0, 1):
        with pytest.raises(NonFiniteError, match="logits of the next token must be finite"):
            Sampler(temperature=temperature)(logits)


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ({"temperature": -0.1}, r"temperature must be a number of at least 0; got -0\.1"),
        ({"temperature": math.nan}, "temperature must be"),
        ({"temperature": "hot"}, "temperature must be"),
        ({"top_k": 0}, "top_k must be an integer of at least 1"),
        ({"top_k": 1.5}, "top_k must be"),
        ({"top_p": 0.0}, "top_p must be above 0 and at most 1"),
        ({"top_p": 1.1}, "top_p must be"),
        ({"min_p": -1}, "min_p must be"),
        ({"repetition_penalty": 0}, "repetition_penalty must be a number above 0"),
    ],
)
def test_bad_values(rules, message):
    with pytest.raises(ConfigError, match=message):
        Sampler(**rules)


def test_bad_calls():
    with pytest.raises(ConfigError, match=r"logits must have shape \[batch, vocabulary\]; got \(4,\)"):
        Sampler()(torch.zeros(4))
    with pytest.raises(ConfigError, match="history must have as many rows"):
        Sampler(repetition_penalty=2.0)(torch.zeros(2, 4), history=[[1]])
    with pytest.raises(ConfigError, match="generator must be one, or one for each of the 2 rows"):
        Sampler()(torch.zeros(2, 4), generator=[torch.Generator()])
