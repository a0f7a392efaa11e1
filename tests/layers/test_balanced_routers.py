"""Routers that are balanced by construction: expert choice, Sinkhorn, auction; and Soft MoE's blends."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from routing_helpers import ask, choices, random_logits, router_of

from moekit import MoE
from moekit.config.errors import ConfigError
from moekit.layers.routing.balanced import auction, sinkhorn

# ---------------------------------------------------------------- expert choice


@pytest.mark.parametrize(("n_experts", "top_k", "length"), [(4, 2, 8), (4, 1, 7), (5, 3, 6), (3, 3, 4)])
def test_expert_choice_takes_its_capacity_of_each_sequence(n_experts: int, top_k: int, length: int) -> None:
    router, tokens, logits = random_logits("expert_choice", 3 * length, n_experts, top_k=top_k)
    plan = ask(router, tokens, batch_shape=(3, length))
    capacity = math.ceil(top_k * length / n_experts)
    assert plan.tokens_per_expert.tolist() == [3 * capacity] * n_experts
    probs = logits.softmax(dim=-1)
    expected: list[dict[int, float]] = [{} for _ in range(3 * length)]
    for row, e in itertools.product(range(3), range(n_experts)):
        in_row = range(row * length, (row + 1) * length)
        for token in sorted(in_row, key=lambda t: -probs[t, e])[:capacity]:
            expected[token][e] = float(probs[token, e])
    assert choices(plan) == [pytest.approx(found, rel=1e-4) for found in expected]


def test_expert_choice_over_the_batch() -> None:
    router, tokens, logits = random_logits("expert_choice", 12, 4, {"scope": "batch"}, top_k=2)
    plan = ask(router, tokens, batch_shape=(3, 4))
    assert plan.tokens_per_expert.tolist() == [6] * 4
    for e in range(4):
        best = set(logits.softmax(dim=-1)[:, e].topk(6).indices.tolist())
        assert {t for t, found in enumerate(choices(plan)) if e in found} == best


def test_expert_choice_shares_out_real_tokens_only() -> None:
    router, tokens, _ = random_logits("expert_choice", 16, 4, top_k=2)
    mask = torch.zeros(2, 8, dtype=torch.bool)
    mask[0, :5] = True  # ceil(2 * 5 / 4) = 3 of them
    mask[1, :2] = True  # ceil(2 * 2 / 4) = 1
    plan = ask(router, tokens, batch_shape=(2, 8), token_mask=mask.view(-1))
    assert plan.tokens_per_expert.tolist() == [4] * 4
    assert mask.view(-1)[plan.token_index].all()


# ---------------------------------------------------------------- Sinkhorn


def test_sinkhorn_reaches_equal_mass_by_scaling_rows_and_columns_alone() -> None:
    affinity = torch.randn(30, 5) * 2
    log_plan = sinkhorn(affinity, 200)
    mass = log_plan.exp()
    torch.testing.assert_close(mass.sum(dim=1), torch.ones(30))
    torch.testing.assert_close(mass.sum(dim=0), torch.full((5,), 6.0), rtol=1e-3, atol=0)
    # what was added is one number per row plus one per column
    added = log_plan - affinity
    centred = added - added.mean(dim=0, keepdim=True) - added.mean(dim=1, keepdim=True) + added.mean()
    assert centred.abs().max() < 1e-4


def test_sinkhorn_routing_is_far_more_even_than_greedy() -> None:
    router, tokens, _ = random_logits("base", 400, 8, top_k=1)
    with torch.no_grad():
        router.weight.mul_(0.5)
        tokens[:, 0] = 1.0
        router.weight[:, 0] = torch.tensor([4.0, 0, 0, 0, 0, 0, 0, 0])  # everybody's favourite is expert 0
    greedy = ask(router, tokens).tokens_per_expert
    balanced = ask(router.train(), tokens).tokens_per_expert
    assert greedy.max() > 300
    assert balanced.max() < 75
    assert balanced.min() > 25


# ---------------------------------------------------------------- auction


@pytest.mark.parametrize(("n_tokens", "n_experts"), [(4, 2), (6, 3), (6, 2), (3, 3), (8, 2)])
def test_auction_is_near_the_best_of_all_assignments(n_tokens: int, n_experts: int) -> None:
    share = n_tokens // n_experts
    allowed = [
        a
        for a in itertools.product(range(n_experts), repeat=n_tokens)
        if all(a.count(e) == share for e in range(n_experts))
    ]
    for trial in range(10):
        affinity = torch.randn(n_tokens, n_experts, dtype=torch.float64) * (1 + trial)
        best = max(float(affinity[range(n_tokens), list(a)].sum()) for a in allowed)
        epsilon = 1e-3
        choice = auction(affinity, epsilon)
        assert torch.bincount(choice, minlength=n_experts).tolist() == [share] * n_experts
        assert float(affinity[range(n_tokens), choice].sum()) >= best - n_tokens * epsilon - 1e-9


@pytest.mark.parametrize("max_rounds", [0, 1, 3, 2000])
@pytest.mark.parametrize(
    ("n_tokens", "n_experts"), [(1, 3), (2, 5), (7, 3), (40, 6), (13, 13), (5, 1), (0, 4)]
)
def test_auction_is_balanced_even_when_cut_short(n_tokens: int, n_experts: int, max_rounds: int) -> None:
    affinity = torch.randn(n_tokens, n_experts)
    affinity[:, 0] += 3
    choice = auction(affinity, max_rounds=max_rounds)
    counts = torch.bincount(choice, minlength=n_experts)
    assert choice.shape == (n_tokens,)
    assert int(counts.sum()) == n_tokens
    assert int(counts.max() - counts.min()) <= 1


def test_auction_with_equal_affinities_ends() -> None:
    counts = torch.bincount(auction(torch.zeros(30, 4)), minlength=4)
    assert sorted(counts.tolist()) == [7, 7, 8, 8]


@pytest.mark.parametrize("seed", range(20))
def test_auction_rounds_give_each_token_distinct_experts(seed: int) -> None:
    torch.manual_seed(seed)
    n_experts = int(torch.randint(2, 7, ()))
    top_k, n_tokens = int(torch.randint(1, n_experts + 1, ())), int(torch.randint(1, 15, ()))
    router, tokens, _ = random_logits("base", n_tokens, n_experts, {"method": "auction"}, top_k=top_k)
    plan = ask(router.train(), tokens)
    assert all(len(found) == top_k for found in choices(plan))  # `choices` refuses a repeated expert
    assert int(plan.tokens_per_expert.max() - plan.tokens_per_expert.min()) <= top_k
    if n_tokens % n_experts == 0:
        assert plan.tokens_per_expert.tolist() == [n_tokens * top_k // n_experts] * n_experts


@pytest.mark.parametrize("method", ["sinkhorn", "auction"])
def test_base_weighs_by_its_own_logit_and_is_greedy_in_evaluation(method: str) -> None:
    router, tokens, logits = random_logits("base", 20, 4, {"method": method}, top_k=2)
    for token, found in enumerate(choices(ask(router, tokens))):
        assert set(found) == set(logits[token].topk(2).indices.tolist())
        assert found == pytest.approx({e: 1 / (1 + math.exp(-logits[token, e])) for e in found}, rel=1e-4)
    for token, found in enumerate(choices(ask(router.train(), tokens))):
        assert found == pytest.approx({e: 1 / (1 + math.exp(-logits[token, e])) for e in found}, rel=1e-4)


# ---------------------------------------------------------------- Soft MoE


def test_soft_moe_is_the_papers_formula() -> None:
    """Puigcerver et al. 2023, eq. 1 to 3, with the normalisation of section 2.3, one number at a time."""
    n_experts, per_expert, d_model = 3, 2, 4
    layer = MoE(
        d_model, d_expert=5, n_experts=n_experts, router={"name": "soft", "options": {"slots_per_expert": 2}}
    )
    with torch.no_grad():
        layer.router.weight.normal_()
        layer.router.scale.fill_(1.7)
    x = torch.randn(2, 6, d_model)
    ours = layer(x).hidden_states
    phi = layer.router.weight  # one row per slot
    for b in range(2):
        logits = torch.zeros(6, 6)
        for i, p in itertools.product(range(6), range(6)):
            logits[i, p] = 1.7 * (x[b, i] / x[b, i].norm()) @ (phi[p] / phi[p].norm())
        dispatch = logits.exp() / logits.exp().sum(dim=0, keepdim=True)  # over the tokens
        combine = logits.exp() / logits.exp().sum(dim=1, keepdim=True)  # over the slots
        slots = dispatch.t() @ x[b]
        answers = []
        for p in range(6):
            gate, up = (layer.experts.w_in[p // per_expert] @ slots[p]).chunk(2)
            answers.append(layer.experts.w_out[p // per_expert] @ (gate * gate.sigmoid() * up))
        torch.testing.assert_close(ours[b], combine @ torch.stack(answers), rtol=1e-4, atol=1e-6)


def test_soft_moe_padding_gives_and_takes_nothing() -> None:
    router = router_of("soft", {"slots_per_expert": 2}, d_model=4, n_experts=3)
    mask = torch.tensor([True, True, False, False])
    slots = ask(router, torch.randn(4, 4), token_mask=mask).slots
    assert not slots.dispatch[0, 2:].any()
    assert not slots.combine[0, 2:].any()
    torch.testing.assert_close(slots.dispatch[0].sum(dim=0), torch.ones(6))


def test_soft_moe_refuses_what_it_cannot_do_and_honours_the_weight_scale() -> None:
    with pytest.raises(
        ConfigError, match=r"capacity_factor must be null with router 'soft'.*slots_per_expert"
    ):
        MoE(4, router="soft", capacity_factor=1.0)
    with pytest.raises(ConfigError, match="combine must be weighted_sum with router 'soft'"):
        MoE(4, router="soft", combine="winner")
    x = torch.randn(2, 3, 4)
    plain, scaled = MoE(4, router="soft"), MoE(4, router="soft", weight_scale=2.5)
    scaled.load_state_dict(plain.state_dict())
    torch.testing.assert_close(scaled(x).hidden_states, 2.5 * plain(x).hidden_states)
