"""Routers under which each token takes as many experts as it needs."""

from __future__ import annotations

import math

import pytest
import torch
from routing_helpers import ask, choices, random_logits, router_of, with_logits

from moekit import MoE
from moekit.layers.statistics import RoutingStats

ONE = torch.ones(1, 1)


@pytest.mark.parametrize(
    ("p", "top_k", "expected"),
    [
        (0.4, 3, {0: 1.0}),  # of 1/2, 3/10, 1/5 the first reaches 0.4
        (0.6, 3, {0: 5 / 8, 1: 3 / 8}),
        (0.9, 3, {0: 0.5, 1: 0.3, 2: 0.2}),
        (0.9, 2, {0: 5 / 8, 1: 3 / 8}),  # top_k is the most a token may take
    ],
)
def test_top_p_by_hand(p: float, top_k: int, expected: dict[int, float]) -> None:
    options = {"p": p, "entropy_coefficient": 0.5}
    router = with_logits(
        router_of("top_p", options, n_experts=3, top_k=top_k), [math.log(x) for x in (5, 3, 2)]
    )
    plan = ask(router, ONE)
    assert choices(plan) == [pytest.approx(expected)]
    entropy = -sum(x * math.log(x) for x in (0.5, 0.3, 0.2))
    assert plan.losses["router_entropy"].item() == pytest.approx(0.5 * entropy)


def test_top_p_takes_the_fewest_experts_that_reach_p() -> None:
    options = {"p": 0.7, "normalize": False}
    router, tokens, logits = random_logits("top_p", 200, 6, options, top_k=6)
    numbers = set()
    for token, found in enumerate(choices(ask(router, tokens))):
        probs = sorted(logits[token].softmax(dim=0).tolist(), reverse=True)
        fewest = next(n for n in range(1, 7) if sum(probs[:n]) >= 0.7)
        assert sorted(found.values(), reverse=True) == pytest.approx(probs[:fewest], rel=1e-4)
        numbers.add(fewest)
    assert len(numbers) >= 3


def test_top_p_entropy_ignores_padding() -> None:
    router, tokens, logits = random_logits("top_p", 5, 4, {"entropy_coefficient": 1.0})
    mask = torch.tensor([True, True, False, True, False])
    entropies = [-float((p * p.log()).sum()) for p in logits.softmax(dim=-1)]
    loss = ask(router, tokens, token_mask=mask).losses["router_entropy"]
    assert loss.item() == pytest.approx((entropies[0] + entropies[1] + entropies[3]) / 3, rel=1e-5)


# ---------------------------------------------------------------- threshold (ReMoE)


def test_threshold_takes_what_is_positive_with_its_relu_as_weight() -> None:
    router = with_logits(router_of("threshold", n_experts=4), [1.5, -1.0, 0.5, 0.0])
    plan = ask(router, ONE)
    assert choices(plan) == [{0: 1.5, 2: 0.5}]
    assert plan.router_probs[0].tolist() == [0.75, 0.0, 0.25, 0.0]
    # token 1 visits experts 0 and 2, token -1 expert 1; the loads 1, 1, 1, 0 are 4/3, 4/3, 4/3, 0 of their
    # mean; the L1 norms (1.5 + 0.5) * 4/3 and 1 * 4/3 have mean 2, times the coefficient
    plan = ask(router, torch.tensor([[1.0], [-1.0]]))
    assert plan.losses["router_l1"].item() == pytest.approx(1e-8 * 2.0)
    biased = with_logits(router_of("threshold", {"initial_bias": 0.75}, n_experts=4), [1.5, -1.0, 0.5, -0.5])
    assert choices(ask(biased, ONE)) == [{0: 2.25, 2: 1.25, 3: 0.25}]


def test_threshold_l1_ignores_padding_and_punishes_the_loaded_more() -> None:
    router = with_logits(router_of("threshold", {"initial_coefficient": 1.0}, n_experts=2), [1.0, -1.0])
    tokens = torch.tensor([[1.0], [1.0], [1.0], [-1.0], [9.0]])
    mask = torch.tensor([True, True, True, True, False])
    # loads 3 and 1 are 1.5 and 0.5 of their mean: (3 * 1.5 + 1 * 0.5) / 4
    assert ask(router, tokens, token_mask=mask).losses["router_l1"].item() == pytest.approx(1.25)


def test_threshold_coefficient_rule() -> None:
    router = router_of("threshold", {"initial_coefficient": 1.0, "growth": 1.5}, n_experts=4, top_k=2)

    def step(n_choices: int, n_tokens: int) -> float:
        counts = torch.tensor([n_choices, 0, 0, 0])
        stats = RoutingStats(
            counts, torch.tensor(0), torch.tensor(n_tokens), torch.zeros(4), torch.tensor(0.0)
        )
        router.after_step(stats)
        return float(router.coefficient)

    assert step(21, 10) == pytest.approx(1.5)  # 2.1 active: too many
    assert step(30, 10) == pytest.approx(2.25)
    assert step(20, 10) == pytest.approx(2.25)  # as wanted
    assert step(19, 10) == pytest.approx(1.5)
    assert step(0, 10) == pytest.approx(1.0)
    assert "coefficient" in router.state_dict()


def test_threshold_training_reaches_top_k_active_experts() -> None:
    layer = MoE(
        8, d_expert=8, n_experts=8, top_k=2, balance={"load_balance": 0.0, "router_z": 0.0},
        router={"name": "threshold", "options": {"initial_coefficient": 1e-3, "growth": 1.1}},
    )  # fmt: skip
    target = torch.nn.Linear(8, 8)
    optimizer = torch.optim.Adam(layer.parameters(), lr=5e-3)
    active = []
    for _ in range(200):
        x = torch.randn(64, 8)
        x[:, 0] = 1.0  # a linear map of inputs that are symmetric about zero is positive half of the time
        out = layer(x)
        loss = (out.hidden_states - target(x).detach()).square().mean() + out.aux_losses["router_l1"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        stats = RoutingStats.from_plan(out.routing)
        layer.router.after_step(stats)
        active.append(stats.mean_active_experts())
    assert active[0] > 3.0
    assert sum(active[-50:]) / 50 == pytest.approx(2.0, abs=0.3)
    assert all(parameter.isfinite().all() for parameter in layer.parameters())
