"""Combine: weighted sums, winners and votes worked out by hand."""

from __future__ import annotations

import pytest
import torch

from moekit import RoutingContext, RoutingPlan
from moekit.layers.combine import combine


def plan_of(weights: list[list[float]]) -> RoutingPlan:
    """Token 0 visits experts 0 and 2, token 1 experts 1 and 2, token 2 nobody, token 3 expert 2 alone."""
    weight = torch.tensor(weights)
    return RoutingPlan.from_mask(weight > 0, weight, RoutingContext((1, 4)))


# rows by expert: expert 0: token 0; expert 1: token 1; expert 2: tokens 0, 1, 3
ANSWERS = torch.tensor([[1.0, 0.0], [0.0, 2.0], [3.0, 5.0], [4.0, 0.0], [7.0, 7.5]])
WEIGHTS = [[0.75, 0.0, 0.25], [0.0, 0.5, 0.5], [0.0, 0.0, 0.0], [0.0, 0.0, 0.1]]


def test_rows_stand_as_the_plan_says() -> None:
    plan = plan_of(WEIGHTS)
    assert plan.tokens_per_expert.tolist() == [1, 1, 3]
    assert plan.token_index.tolist() == [0, 1, 0, 1, 3]
    assert plan.row_weight.tolist() == pytest.approx([0.75, 0.5, 0.25, 0.5, 0.1])


def test_weighted_sum_by_hand() -> None:
    out = combine(ANSWERS, plan_of(WEIGHTS))
    # token 0: 0.75 * (1, 0) + 0.25 * (3, 5); token 1: 0.5 * (0, 2) + 0.5 * (4, 0); token 3: 0.1 * (7, 7.5)
    assert out.tolist() == [pytest.approx(row) for row in ([1.5, 1.25], [2.0, 1.0], [0.0, 0.0], [0.7, 0.75])]


def test_winner_by_hand() -> None:
    plan = plan_of(WEIGHTS).winners()
    # token 0: expert 0 with 0.75; token 1: a tie, so the lower expert; token 3: its only one
    assert plan.tokens_per_expert.tolist() == [1, 1, 1]
    assert plan.token_index.tolist() == [0, 1, 3]
    out = combine(ANSWERS[[0, 1, 4]], plan, "winner")
    assert out.tolist() == [[1.0, 0.0], [0.0, 2.0], [0.0, 0.0], [7.0, 7.5]]
    assert int(plan.n_dropped) == 0


def test_hard_vote_by_hand() -> None:
    out = combine(ANSWERS, plan_of(WEIGHTS), "vote_hard")
    # token 0: classes 0 and 1 get one vote each; token 1: 1 and 0; token 3: one expert, which names class 1
    assert out.tolist() == [[0.5, 0.5], [0.5, 0.5], [0.0, 0.0], [0.0, 1.0]]


def test_hard_vote_is_a_majority() -> None:
    choices = torch.tensor([[0, 1, 2]])
    plan = RoutingPlan.from_choices(choices, torch.tensor([[0.9, 0.05, 0.05]]), 3, RoutingContext((1, 1)))
    # two of three name class 1; that the third weighs more does not count
    out = combine(torch.tensor([[50.0, 0.0], [0.0, 0.1], [1.0, 1.1]]), plan, "vote_hard")
    assert out.tolist() == [pytest.approx([1 / 3, 2 / 3])]


def test_soft_vote_by_hand() -> None:
    out = combine(torch.tensor([[1.0, 3.0], [9.0, 1.0]]).log(), _pair([0.9, 0.1]), "vote_soft")
    # class probabilities (1/4, 3/4) and (9/10, 1/10), equal votes
    assert out.tolist() == [pytest.approx([0.575, 0.425])]


def _pair(weights: list[float], requires_grad: bool = False) -> RoutingPlan:
    weight = torch.tensor([weights], requires_grad=requires_grad)
    return RoutingPlan.from_choices(torch.tensor([[0, 1]]), weight, 2, RoutingContext((1, 1)))


@pytest.mark.parametrize("how", ["winner", "vote_soft", "vote_hard"])
def test_a_weight_that_underflowed_still_counts_in_full(how: str) -> None:
    tiny = _pair([1e-41, 0.0])  # below the smallest normal float32
    plan = tiny.winners() if how == "winner" else tiny
    answers = torch.tensor([[1.0, 3.0], [9.0, 1.0]]).log()[: plan.token_index.shape[0]]
    expected = {
        "winner": [0.0, torch.tensor(3.0).log()],
        "vote_soft": [0.575, 0.425],
        "vote_hard": [0.5, 0.5],
    }
    assert combine(answers, plan, how).tolist() == [pytest.approx([float(x) for x in expected[how]])]


def test_unweighted_combines_teach_the_router_the_gradient_of_log_weight() -> None:
    weight = torch.tensor([[0.8, 0.2]], requires_grad=True)
    plan = RoutingPlan.from_choices(torch.tensor([[0, 1]]), weight, 2, RoutingContext((1, 1)))
    votes = torch.tensor([[1.0, 3.0], [9.0, 1.0]]).log()
    combine(votes, plan, "vote_soft")[0, 0].backward()
    # each vote for class 0 is half of 1/4 or of 9/10, over the weight
    assert weight.grad.tolist() == [pytest.approx([0.125 / 0.8, 0.45 / 0.2])]


def test_hard_vote_has_the_gradient_of_the_soft_one() -> None:
    grads = []
    for how in ("vote_soft", "vote_hard"):
        answers = torch.tensor([[0.3, 0.1], [0.2, 0.9]], requires_grad=True)
        combine(answers, _pair([0.5, 0.5]), how)[0, 0].backward()
        grads.append(answers.grad)
    torch.testing.assert_close(*grads)
    assert grads[0].any()
