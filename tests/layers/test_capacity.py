"""Capacity: what an expert accepts, who is dropped, and what becomes of them."""

from __future__ import annotations

import math

import pytest
import torch
from routing_helpers import choices

from moekit import MoE, RoutingContext, RoutingPlan
from moekit.layers.statistics import RoutingStats


def crowded(drop_policy: str = "position", **fields: object) -> MoE:
    layer = MoE(4, **{"d_expert": 3, "n_experts": 4, "top_k": 2, "drop_policy": drop_policy} | fields)
    with torch.no_grad():
        layer.router.weight.normal_(std=2.0)
    return layer


def free_of_capacity(layer: MoE) -> MoE:
    """The same weights without a limit."""
    twin = MoE(4, layer.config.replace(capacity_factor=None))
    twin.load_state_dict(layer.state_dict())
    return twin


@pytest.mark.parametrize("drop_policy", ["position", "probability"])
@pytest.mark.parametrize("capacity_factor", [0.1, 0.5, 1.0, 1.5, 10.0])
def test_drops_against_an_oracle(drop_policy: str, capacity_factor: float) -> None:
    layer = crowded(drop_policy, capacity_factor=capacity_factor)
    x = torch.randn(2, 15, 4)
    out = layer(x)
    capacity = math.ceil(capacity_factor * 30 * 2 / 4)
    wanted = choices(free_of_capacity(layer)(x).routing)
    expected: list[dict[int, float]] = [{} for _ in range(30)]
    for e in range(4):
        askers = [(t, found[e]) for t, found in enumerate(wanted) if e in found]
        if drop_policy == "probability":
            askers.sort(key=lambda pair: -pair[1])
        for token, weight in askers[:capacity]:
            expected[token][e] = weight
    assert choices(out.routing) == [pytest.approx(found) for found in expected]
    n_dropped = sum(map(len, wanted)) - sum(map(len, expected))
    assert int(out.routing.n_dropped) == n_dropped
    stats = RoutingStats.from_plan(out.routing)
    assert stats.dropped_share() == pytest.approx(n_dropped / 60)
    assert stats.requested_per_expert.tolist() == [sum(e in found for found in wanted) for e in range(4)]
    assert (n_dropped > 0) is (capacity_factor < 1.5)


def test_dropped_tokens_get_zero_and_the_shared_path() -> None:
    x = torch.randn(4, dtype=torch.float32).expand(6, 4)  # all to the same two experts
    layer = crowded(capacity_factor=0.5)  # ceil(0.5 * 6 * 2 / 4) = 2 rows each
    out = layer(x)
    assert out.routing.tokens_per_expert.sort().values.tolist() == [0, 0, 2, 2]
    assert int(out.routing.n_dropped) == 8
    assert out.hidden_states[:2].any(dim=1).all()
    assert not out.hidden_states[2:].any()
    shared = crowded(capacity_factor=0.5, n_shared_experts=1, linear_path=True)
    out = shared(x)
    torch.testing.assert_close(out.hidden_states[2:], (shared.shared(x) + shared.linear(x))[2:])


def test_dropless_keeps_every_choice() -> None:
    out = crowded()(torch.randn(3, 4).expand(50, 3, 4))
    assert int(out.routing.n_dropped) == 0
    assert int(out.routing.tokens_per_expert.sum()) == 300


def test_capacity_counts_real_tokens() -> None:
    layer = crowded(capacity_factor=0.5)
    x = torch.randn(4).expand(12, 4)
    mask = torch.arange(12) >= 6
    out = layer(x, token_mask=mask)
    assert out.routing.tokens_per_expert.sort().values.tolist() == [0, 0, 2, 2]
    assert set(out.routing.token_index.tolist()) == {6, 7}


def test_winners_have_the_capacity_of_one_choice_per_token() -> None:
    layer = crowded(capacity_factor=1.0, combine="winner")
    out = layer(torch.randn(4).expand(8, 4))
    assert out.routing.tokens_per_expert.sort().values.tolist() == [0, 0, 0, 2]  # ceil(8 * 1 / 4)
    assert out.routing.requested.sort().values.tolist() == [0, 0, 0, 8]


def test_limited_by_hand() -> None:
    plan = RoutingPlan.from_choices(
        torch.tensor([[0], [1], [0], [0]]),
        torch.tensor([[0.2], [0.9], [0.5], [0.5]]),
        2,
        RoutingContext((1, 4)),
    )
    by_position = plan.limited_to(2)
    assert (by_position.token_index.tolist(), by_position.tokens_per_expert.tolist()) == ([0, 2, 1], [2, 1])
    by_probability = plan.limited_to(2, "probability")
    assert (by_probability.token_index.tolist(), by_probability.row_weight.tolist()) == (
        [2, 3, 1], pytest.approx([0.5, 0.5, 0.9])
    )  # fmt: skip
    # at a tie the earlier token stays
    assert plan.limited_to(1, "probability").token_index.tolist() == [2, 1]
    none = plan.limited_to(0)
    assert (none.token_index.tolist(), int(none.n_dropped), none.requested.tolist()) == ([], 4, [3, 1])
    # what was asked for stays on record through a second limit
    assert by_position.limited_to(1).requested.tolist() == [3, 1]
    assert int(by_position.limited_to(1).n_dropped) == 2


def test_gradient_flows_through_what_is_kept() -> None:
    layer = crowded(capacity_factor=0.5)
    x = torch.randn(10, 4, requires_grad=True)
    out = layer(x)
    out.hidden_states.sum().backward()
    visited = torch.zeros(10, dtype=torch.bool)
    visited[out.routing.token_index] = True
    assert x.grad.any(dim=1).tolist() == visited.tolist()
    assert not visited.all()
