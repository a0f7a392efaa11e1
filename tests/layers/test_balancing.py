"""Balancing losses and statistics, worked out by hand in the comments."""

from __future__ import annotations

import math

import pytest
import torch

from moekit import MoE, RoutingContext, RoutingPlan
from moekit.config.moe import BalanceConfig
from moekit.layers.balancing import (
    balance_losses,
    importance_loss,
    load_balance_loss,
    load_loss,
    router_z_loss,
    sequence_balance_loss,
    squared_variation,
    weighted_aux_loss,
)
from moekit.layers.plan import mean_over_tokens
from moekit.layers.statistics import RoutingStats, add_stats, routing_stats

PROBS = torch.tensor([[0.7, 0.2, 0.1], [0.6, 0.3, 0.1], [0.2, 0.2, 0.6], [0.5, 0.1, 0.4]])
REAL = torch.tensor([True, True, True, False])

# ---------------------------------------------------------------- load balance


def test_load_balance_by_hand() -> None:
    # f = (2, 0, 2) / 4; P = mean of the columns = (2.0, 0.8, 1.2) / 4 = (0.5, 0.2, 0.3)
    # 3 * (0.5 * 0.5 + 0 * 0.2 + 0.5 * 0.3) = 1.2
    assert load_balance_loss(PROBS, torch.tensor([2, 0, 2])).item() == pytest.approx(1.2)
    # without the last token: f = (2, 0, 1) / 3, P = (1.5, 0.7, 0.8) / 3
    # 3 * (2/3 * 0.5 + 1/3 * 0.8/3) = 1 + 0.8/3
    assert load_balance_loss(PROBS, torch.tensor([2, 0, 1]), REAL).item() == pytest.approx(1 + 0.8 / 3)


@pytest.mark.parametrize("n_experts", [1, 2, 7])
@pytest.mark.parametrize("top_k", [1, 2])
def test_load_balance_is_one_at_perfect_balance_and_e_at_collapse(n_experts: int, top_k: int) -> None:
    even = torch.full((10, n_experts), 1 / n_experts)
    assert load_balance_loss(even, torch.full((n_experts,), 10 * top_k)).item() == pytest.approx(1.0)
    collapsed = torch.nn.functional.one_hot(torch.zeros(10, dtype=torch.long), n_experts).float()
    assert load_balance_loss(collapsed, 10 * collapsed[0].long()).item() == pytest.approx(n_experts)


def test_load_balance_pushes_probability_away_from_the_loaded() -> None:
    logits = torch.zeros(4, 3, requires_grad=True)
    load_balance_loss(logits.softmax(dim=-1), torch.tensor([3, 1, 0])).backward()
    # d loss / d logit_i = E * p_i * (f_i - sum_j f_j p_j) / T = 3 * 1/3 * (f_i - 1/3) / 4
    assert logits.grad[0].tolist() == pytest.approx([(0.75 - 1 / 3) / 4, (0.25 - 1 / 3) / 4, (0 - 1 / 3) / 4])


def test_sequence_form_by_hand() -> None:
    # two sequences of two tokens, each token choosing its two best
    chosen = torch.tensor([[1.0, 1, 0], [1, 1, 0], [1, 0, 1], [1, 0, 1]])
    # first: f = (2, 2, 0) / 4, P = (1.3, 0.5, 0.2) / 2: 3 * (0.5 * 0.65 + 0.5 * 0.25) = 1.35
    # second: f = (2, 0, 2) / 4, P = (0.7, 0.3, 1.0) / 2: 3 * (0.5 * 0.35 + 0.5 * 0.5) = 1.275
    assert sequence_balance_loss(PROBS, chosen, (2, 2)).item() == pytest.approx((1.35 + 1.275) / 2)
    # without the last token the second has one: f = (1, 0, 1) / 2, P = (0.2, 0.2, 0.6): 3 * (0.1 + 0.3) = 1.2
    assert sequence_balance_loss(PROBS, chosen, (2, 2), REAL).item() == pytest.approx((1.35 + 1.2) / 2)
    # a sequence of padding alone has no say
    mask = torch.tensor([True, True, False, False])
    assert sequence_balance_loss(PROBS, chosen, (2, 2), mask).item() == pytest.approx(1.35)


def test_sequence_form_is_one_where_each_sequence_is_even_and_not_where_only_the_batch_is() -> None:
    even = torch.full((4, 2), 0.5)
    assert sequence_balance_loss(even, torch.ones(4, 2), (2, 2)).item() == pytest.approx(1.0)
    apart = torch.tensor(
        [[1.0, 0], [1, 0], [0, 1], [0, 1]]
    )  # sequence 0 all to expert 0, sequence 1 all to 1
    assert sequence_balance_loss(apart, apart, (2, 2)).item() == pytest.approx(2.0)
    assert load_balance_loss(apart, torch.tensor([2, 2])).item() == pytest.approx(1.0)


def test_earlier_micro_batches_enter_the_share_but_not_the_probability() -> None:
    plan = RoutingPlan.from_choices(
        torch.tensor([[0], [0]]),
        torch.ones(2, 1),
        2,
        RoutingContext((1, 2)),
        router_probs=torch.tensor([[0.8, 0.2]] * 2),
    )
    context = RoutingContext((1, 2), earlier_counts=torch.tensor([0, 6]))
    loss = balance_losses(plan, context, BalanceConfig())["load_balance"]
    # f = (2, 0 + 6) / 8, P = (0.8, 0.2): 2 * (0.25 * 0.8 + 0.75 * 0.2) = 0.7
    assert loss.item() == pytest.approx(0.7)


# ---------------------------------------------------------------- the other losses


def test_z_loss_by_hand() -> None:
    # log-sum-exp of (ln 1, ln 3) is ln 4, of (0, 0) ln 2
    logits = torch.tensor([[0.0, math.log(3)], [0.0, 0.0]])
    assert router_z_loss(logits).item() == pytest.approx((math.log(4) ** 2 + math.log(2) ** 2) / 2)
    assert router_z_loss(logits, torch.tensor([False, True])).item() == pytest.approx(math.log(2) ** 2)


def test_squared_variation_by_hand() -> None:
    assert squared_variation(torch.tensor([2.0, 2.0, 2.0])).item() == 0.0
    # mean 2, squared deviations 4, 1, 1, 4... of (0, 1, 3, 4): mean 2.5, over 4 gives 0.625
    assert squared_variation(torch.tensor([0.0, 1.0, 3.0, 4.0])).item() == pytest.approx(2.5 / 4)
    assert squared_variation(torch.zeros(3)).item() == 0.0


def test_importance_by_hand() -> None:
    # weights of expert 0: 0.9 + 0.6, of expert 1: 0.1 + 0.4; mean 1, deviations +-0.5: 0.25
    plan = RoutingPlan.from_choices(
        torch.tensor([[0, 1], [1, 0]]), torch.tensor([[0.9, 0.1], [0.4, 0.6]]), 2, RoutingContext((1, 2))
    )
    assert importance_loss(plan).item() == pytest.approx(0.25)


def test_load_loss_by_hand() -> None:
    # loads are sums of the chances: (1.5, 0.5) in one token's mean; mean 1, deviations 0.5: 0.25
    assert load_loss(torch.tensor([[1.0, 0.0], [0.5, 0.5]])).item() == pytest.approx(0.25)
    assert load_loss(torch.tensor([[1.0, 0.0], [0.5, 0.5]]), torch.tensor([False, True])).item() == 0.0


def test_losses_present_are_those_with_a_coefficient() -> None:
    def names(router: str = "softmax", **balance: float) -> set[str]:
        zero = {"load_balance": 0.0, "router_z": 0.0} | balance
        return set(MoE(4, d_expert=3, router=router, balance=zero)(torch.randn(5, 4)).aux_losses)

    assert names() == set()
    assert names(load_balance=1.0) == {"load_balance"}
    assert names(router_z=1.0, importance=1.0) == {"router_z", "importance"}
    assert names(load=1.0) == set()  # softmax has no noise
    assert names("noisy_topk", load=1.0) == {"load"}
    assert names("top_p") == {"router_entropy"}
    assert names("random", load_balance=1.0, router_z=1.0) == set()  # no probabilities, no logits
    assert set(MoE(4, d_expert=3)(torch.randn(5, 4)).aux_losses) == {"load_balance", "router_z"}
    assert MoE(4, d_expert=3, balance=None)(torch.randn(5, 4)).aux_losses == {}


def test_losses_are_reported_in_evaluation_too() -> None:
    layer, x = MoE(4, d_expert=3, balance={"importance": 1.0}), torch.randn(5, 4)
    with_gradient = layer(x).aux_losses
    with torch.no_grad():
        without = layer(x).aux_losses
    assert {n: v.item() for n, v in with_gradient.items()} == {n: v.item() for n, v in without.items()}
    assert set(without) == {"load_balance", "router_z", "importance"}


def test_coefficients_meet_losses_in_one_place() -> None:
    losses = {
        "load_balance": torch.tensor(2.0),
        "router_z": torch.tensor(3.0),
        "router_l1": torch.tensor(5.0),
    }
    config = BalanceConfig(load_balance=0.1, router_z=0.01, router_loss=0.5)
    assert float(weighted_aux_loss(losses, config)) == pytest.approx(0.2 + 0.03 + 2.5)
    assert weighted_aux_loss({}, config) == 0


@pytest.mark.parametrize("scope", ["global_batch", "sequence"])
@pytest.mark.parametrize("capacity_factor", [None, 0.5])
def test_losses_measure_what_was_asked_for_not_what_was_left(
    scope: str, capacity_factor: float | None
) -> None:
    layer = MoE(
        4,
        d_expert=3,
        n_experts=4,
        capacity_factor=capacity_factor,
        balance={"scope": scope, "importance": 1.0},
    )
    with torch.no_grad():
        layer.router.weight.normal_(std=2)
    x = torch.randn(3, 8, 4)
    out = layer(x)
    assert (int(out.routing.n_dropped) > 0) is (capacity_factor is not None)
    probs = (x.view(-1, 4) @ layer.router.weight.t()).softmax(dim=-1)
    weights, index = probs.topk(2)
    chosen = torch.zeros(24, 4).scatter_(1, index, 1.0)
    groups = [slice(8 * i, 8 * i + 8) for i in range(3)] if scope == "sequence" else [slice(0, 24)]
    expected = sum(4 * (chosen[g].sum(0) / chosen[g].sum() * probs[g].mean(0)).sum() for g in groups) / len(
        groups
    )
    assert out.aux_losses["load_balance"].item() == pytest.approx(expected.item(), rel=1e-5)
    importance = torch.zeros(24, 4).scatter(1, index, weights / weights.sum(-1, keepdim=True)).sum(0)
    variation = importance.var(unbiased=False) / importance.mean() ** 2
    assert out.aux_losses["importance"].item() == pytest.approx(variation.item(), rel=1e-4)


# ---------------------------------------------------------------- statistics


def stats_of(counts: list[int], dropped: int = 0, n_tokens: int = 10) -> RoutingStats:
    n = len(counts)
    return RoutingStats(
        torch.tensor(counts),
        torch.tensor(dropped),
        torch.tensor(n_tokens),
        torch.zeros(n).double(),
        torch.tensor(0.0),
    )


def test_balance_measures_by_hand() -> None:
    stats = stats_of([6, 2, 4, 0], dropped=3, n_tokens=6)
    assert stats.load().tolist() == pytest.approx([0.5, 1 / 6, 1 / 3, 0.0])
    assert stats.max_violation() == pytest.approx(1.0)  # 6 against a mean of 3
    entropy = -(0.5 * math.log(0.5) + math.log(1 / 6) / 6 + math.log(1 / 3) / 3)
    assert stats.load_entropy() == pytest.approx(entropy / math.log(4))
    assert stats.dead_experts() == 1
    assert stats.dead_experts(share=0.7) == 2  # 2 is less than 0.7 * 3
    assert stats.dropped_share() == pytest.approx(3 / 12)
    assert stats.mean_active_experts() == pytest.approx(9 / 6)


def test_balance_measures_at_the_ends() -> None:
    even = stats_of([5, 5])
    assert (even.max_violation(), even.load_entropy(), even.dead_experts()) == (
        pytest.approx(0.0),
        pytest.approx(1.0),
        0,
    )
    one = stats_of([9, 0, 0])
    assert (one.max_violation(), one.load_entropy(), one.dead_experts()) == (pytest.approx(2.0), 0.0, 2)
    nothing = stats_of([0, 0], n_tokens=0)
    assert (nothing.max_violation(), nothing.dropped_share(), nothing.mean_active_experts()) == (
        0.0,
        0.0,
        0.0,
    )
    assert stats_of([7]).load_entropy() == 1.0
    assert math.isnan(even.load_balance_loss())


def test_statistics_of_a_plan_by_hand() -> None:
    context = RoutingContext((1, 4), token_mask=REAL)
    plan = RoutingPlan.from_choices(
        torch.tensor([[0], [0], [2], [0]]), torch.ones(4, 1), 3, context, router_probs=PROBS
    ).limited_to(1)
    stats = RoutingStats.from_plan(plan)
    assert stats.requested_per_expert.tolist() == [2, 0, 1]
    assert (int(stats.dropped), int(stats.n_tokens)) == (1, 3)
    assert stats.prob_sum.tolist() == pytest.approx([1.5, 0.7, 0.8])
    entropies = [-sum(p * math.log(p) for p in row) for row in PROBS[:3].tolist()]
    assert stats.route_entropy() == pytest.approx(sum(entropies) / 3)
    # E * sum(f * P) as in the loss above: 3 * (2/3 * 1.5/3 + 1/3 * 0.8/3)
    assert stats.load_balance_loss() == pytest.approx(1 + 0.8 / 3)


def test_statistics_add_up_exactly() -> None:
    layer = MoE(4, d_expert=3, n_experts=4)
    x = torch.randn(12, 4)
    whole = routing_stats((layer(x).routing, layer(x).routing))
    total = None
    for part in x.split(5):
        total = add_stats(total, routing_stats((layer(part).routing, layer(part).routing)))
    for ours, theirs in zip(total, whole, strict=True):
        assert torch.equal(ours.requested_per_expert, theirs.requested_per_expert)
        assert torch.equal(ours.n_tokens, theirs.n_tokens)
        torch.testing.assert_close(ours.prob_sum, theirs.prob_sum, rtol=1e-12, atol=0)


def test_mean_over_tokens() -> None:
    values = torch.tensor([[1.0, 2.0], [3.0, 4.0], [50.0, 60.0]])
    assert mean_over_tokens(values, torch.tensor([True, True, False])).tolist() == [2.0, 3.0]
    assert mean_over_tokens(values[:2], None).tolist() == [2.0, 3.0]
    assert mean_over_tokens(values, torch.zeros(3, dtype=torch.bool)).tolist() == [0.0, 0.0]
    assert mean_over_tokens(values[:0, 0], None).item() == 0.0
