"""The routing plan and the registry of routers."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from moekit import MoE, Router, RoutingContext, RoutingPlan, register_router
from moekit.config.base import StrictConfig
from moekit.config.errors import ConfigError
from moekit.layers.plan import count_per_expert
from moekit.layers.routing import ROUTERS


@pytest.fixture
def registry() -> Iterator[dict[str, type[Router]]]:
    """The registered routers, as they were afterwards."""
    before = dict(ROUTERS)
    yield ROUTERS
    ROUTERS.clear()
    ROUTERS.update(before)


def test_plan_from_choices_by_hand() -> None:
    index = torch.tensor([[1, 0], [2, 1], [0, 2]])
    weight = torch.tensor([[0.1, 0.2], [0.3, 0.4], [0.5, 0.6]])
    plan = RoutingPlan.from_choices(index, weight, 4, RoutingContext((1, 3)))
    # expert 0: tokens 0, 2; expert 1: tokens 0, 1; expert 2: tokens 1, 2; expert 3: none
    assert plan.token_index.tolist() == [0, 2, 0, 1, 1, 2]
    assert plan.row_weight.tolist() == pytest.approx([0.2, 0.5, 0.1, 0.4, 0.3, 0.6])
    assert plan.tokens_per_expert.tolist() == [2, 2, 2, 0]
    assert plan.expert_of_row().tolist() == [0, 0, 1, 1, 2, 2]
    assert (plan.n_experts, plan.n_tokens, int(plan.n_dropped)) == (4, 3, 0)


def test_plan_from_choices_leaves_padding_out() -> None:
    context = RoutingContext((1, 3), token_mask=torch.tensor([True, False, True]))
    plan = RoutingPlan.from_choices(
        torch.tensor([[1], [0], [0]]), torch.tensor([[0.1], [0.2], [0.3]]), 2, context
    )
    assert (plan.token_index.tolist(), plan.tokens_per_expert.tolist()) == ([2, 0], [1, 1])


def test_both_ways_to_a_plan_agree() -> None:
    probs = torch.rand(20, 6)
    index = probs.topk(3, dim=-1).indices
    chosen = torch.zeros(20, 6, dtype=torch.bool).scatter_(1, index, True)
    mask = torch.rand(20) > 0.3
    context = RoutingContext((4, 5), token_mask=mask)
    first = RoutingPlan.from_choices(index, probs.gather(1, index), 6, context)
    second = RoutingPlan.from_mask(chosen, probs, context)
    for name in ("token_index", "row_weight", "tokens_per_expert"):
        assert torch.equal(getattr(first, name), getattr(second, name)), name


def test_count_per_expert() -> None:
    assert count_per_expert(torch.tensor([3, 0, 3, 3]), 5).tolist() == [1, 0, 0, 3, 0]
    assert count_per_expert(torch.tensor([], dtype=torch.long), 2).tolist() == [0, 0]


def test_winners_of_a_plan_without_rows() -> None:
    plan = RoutingPlan.from_mask(
        torch.zeros(3, 2, dtype=torch.bool), torch.zeros(3, 2), RoutingContext((1, 3))
    )
    assert plan.winners().token_index.tolist() == []


def test_a_router_of_ones_own(registry: dict[str, type[Router]]) -> None:
    @register_router("every_other")
    class EveryOther(Router):
        """Experts in turn, from `start`."""

        class Options(StrictConfig):
            start: int = 0

        def forward(self, tokens: torch.Tensor, context: RoutingContext) -> RoutingPlan:
            turn = (torch.arange(len(tokens)) + self.options.start) % self.n_experts
            return RoutingPlan.from_choices(
                turn[:, None], torch.ones(len(tokens), 1), self.n_experts, context
            )

    layer = MoE(4, d_expert=3, n_experts=3, top_k=1, router={"name": "every_other", "start": 1})
    out = layer(torch.randn(7, 4))
    assert out.routing.tokens_per_expert.tolist() == [2, 3, 2]
    assert out.aux_losses == {}
    assert layer.causal
    with pytest.raises(
        ConfigError, match=r"router\(every_other\)\.stat is not a known key: did you mean 'start'"
    ):
        MoE(4, d_expert=3, router={"name": "every_other", "stat": 1})


def test_a_name_belongs_to_one_class(registry: dict[str, type[Router]]) -> None:
    with pytest.raises(ConfigError, match=r"router name 'softmax' is taken by moekit\.layers\.routing\.topk"):

        @register_router("softmax")
        class SoftmaxRouter(Router):  # the same class name, from elsewhere
            pass

    def cell() -> type[Router]:
        @register_router("mine")
        class Mine(Router):
            pass

        return Mine

    first, second = cell(), cell()  # a notebook cell run twice
    assert first is not second
    assert registry["mine"] is second


def test_router_without_a_forward_says_so(registry: dict[str, type[Router]]) -> None:
    @register_router("unfinished")
    class Unfinished(Router):
        pass

    with pytest.raises(NotImplementedError, match="Unfinished does not implement forward"):
        MoE(4, d_expert=3, router="unfinished")(torch.randn(2, 4))
