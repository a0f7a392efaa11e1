"""Plans edited: by hand, and inside a model, which is as before afterwards."""

from __future__ import annotations

import pytest
import torch

from moekit.config.errors import ConfigError
from moekit.config.model import ModelConfig
from moekit.explain.edits import Force, Off, Swap, edited
from moekit.layers.plan import RoutingContext, RoutingPlan
from moekit.models.build import build_model


def plan() -> RoutingPlan:
    """Token 0 chooses 2 and 0, token 1 chooses 1 and 2, token 2 chooses 1 alone."""
    probs = torch.tensor([[0.1, 0.05, 0.6, 0.25], [0.1, 0.5, 0.3, 0.1], [0.2, 0.5, 0.1, 0.2]])
    chosen = torch.tensor([[1, 0, 1, 0], [0, 1, 1, 0], [0, 1, 0, 0]]).bool()
    weights = torch.tensor([[0.2, 0, 0.8, 0], [0, 0.7, 0.3, 0], [0, 1.0, 0, 0]])
    return RoutingPlan.from_mask(chosen, weights, RoutingContext((1, 3)), router_probs=probs)


def table(plan: RoutingPlan) -> list[list[float]]:
    """`[T][E]` weights, and the invariants of every plan."""
    expert = plan.expert_of_row()
    assert int(plan.tokens_per_expert.sum()) == len(plan.token_index)
    places = expert * plan.n_tokens + plan.token_index
    assert (places[1:] > places[:-1]).all(), "sorted by expert, inside by token, none twice"
    found = torch.zeros(plan.n_tokens, plan.n_experts)
    found[plan.token_index, expert] = plan.row_weight
    return [[round(value, 4) for value in row] for row in found.tolist()]


def test_off_by_hand():
    # token 0 would next take 3, token 1 has a tie of 0 and 3
    (first, second, third) = table(Off([2])(plan()))
    assert first == [0.2, 0, 0, 0.8]
    assert second in ([0.3, 0.7, 0, 0], [0, 0.7, 0, 0.3])
    assert third == [0, 1, 0, 0]
    assert table(Off([2], "share")(plan())) == [[1.0, 0, 0, 0], [0, 1.0, 0, 0], [0, 1, 0, 0]]
    assert table(Off([2], "nothing")(plan())) == [[0.2, 0, 0, 0], [0, 0.7, 0, 0], [0, 1, 0, 0]]
    assert table(Off([1], "share")(plan()))[2] == [0, 0, 0, 0], "nobody is left to have its weight"
    some = Off([2], "nothing", torch.tensor([True, False, False]))
    assert table(some(plan())) == [[0.2, 0, 0, 0], [0, 0.7, 0.3, 0], [0, 1, 0, 0]]


def test_several_closed_choices_take_several_next_ones():
    assert table(Off([0, 2])(plan()))[0] in ([0, 0.2, 0, 0.8], [0, 0.8, 0, 0.2])
    nearly_all = table(Off([0, 2, 3])(plan()))
    assert sorted(nearly_all[0]) in ([0, 0, 0, 0.2], [0, 0, 0, 0.8]), "one expert is left for two choices"
    assert nearly_all[1] == [0, 0.7, 0, 0], "it has that one already"


def test_force_and_swap_by_hand():
    assert table(Force(3)(plan())) == [[0, 0, 0, 1.0], [0, 0, 0, 1.0], [0, 0, 0, 1.0]]
    some = Force(3, torch.tensor([False, True, False]))
    assert table(some(plan())) == [[0.2, 0, 0.8, 0], [0, 0, 0, 1.0], [0, 1, 0, 0]]
    assert table(Swap(1, 2)(plan())) == [[0.2, 0.8, 0, 0], [0, 0.3, 0.7, 0], [0, 0, 1, 0]]
    assert table(Swap(1, 2)(Swap(1, 2)(plan()))) == table(plan())


def model(router: str = "softmax"):
    torch.manual_seed(0)
    return build_model(ModelConfig.from_dict({
        "vocab_size": 300, "d_model": 16, "n_layers": 2, "n_heads": 2, "d_ff": 16,
        "moe": {"n_experts": 4, "top_k": 2, "d_expert": 8, "router": router},
    })).eval()  # fmt: skip


@pytest.mark.parametrize("router", ["softmax", "sigmoid", "top_p", "hash", "random"])
def test_models_of_any_router(router):
    ids = torch.randint(0, 300, (2, 9))
    one = model(router)
    instead = "next" if router in ("softmax", "sigmoid") else "share"
    with torch.no_grad():
        before = one(ids)
        with edited(one, {1: Off([2], instead)}):
            during = one(ids)
        after = one(ids)
    assert int(during.routing[1].tokens_per_expert[2]) == 0
    assert int(during.routing[0].tokens_per_expert.sum()) == int(before.routing[0].tokens_per_expert.sum())
    if router != "random":
        torch.testing.assert_close(after.logits, before.logits, rtol=0, atol=0)
        assert not torch.equal(during.logits, before.logits)


def test_an_expert_that_computes_nothing_is_missed_by_nobody():
    one = model()
    with torch.no_grad():
        one.moe_layers[0].experts.w_out[1].zero_()
        ids = torch.randint(0, 300, (2, 9))
        before = one(ids).logits
        with edited(one, {0: Off([1], "nothing")}):
            torch.testing.assert_close(one(ids).logits, before)


def test_errors_leave_the_model_as_it_was():
    one = model()
    with pytest.raises(ConfigError, match=r"layer must be 0\.\.1"), edited(one, {0: Off([1]), 2: Off([0])}):
        pass
    with pytest.raises(ConfigError, match=r"experts must be 0\.\.3"), edited(one, {0: Off([9])}):
        one(torch.zeros(1, 3, dtype=torch.long))
    assert not any(layer.router._forward_hooks for layer in one.moe_layers)
    other = model("hash")
    with edited(other, {0: Off([1])}), pytest.raises(ConfigError, match="'next'"):
        other(torch.zeros(1, 3, dtype=torch.long))
