"""Routers that take the K best experts: hand-worked values and oracles that share no code with them."""

from __future__ import annotations

import itertools
import math
import warnings

import pytest
import torch
from routing_helpers import ask, choices, random_logits, router_of, with_logits

from moekit.config.errors import ConfigError
from moekit.layers.routing import UntaughtRouterWarning
from moekit.layers.statistics import RoutingStats

ONE = torch.ones(1, 1)
LN = math.log


# ---------------------------------------------------------------- softmax


@pytest.mark.parametrize(
    ("normalize", "expected"),
    [
        ("after", {1: 2 / 7, 2: 5 / 7}),  # softmax over the two chosen: e^ln2 and e^ln5
        ("before", {1: 0.25, 2: 0.625}),  # softmax over all, 1 + 2 + 5 = 8, the rest cut off
    ],
)
def test_softmax_normalised_after_or_before_the_choice(normalize: str, expected: dict[int, float]) -> None:
    router = with_logits(router_of("softmax", {"normalize": normalize}, n_experts=3), [LN(1), LN(2), LN(5)])
    plan = ask(router, ONE)
    assert choices(plan) == [pytest.approx(expected)]
    assert plan.router_probs[0].tolist() == pytest.approx([0.125, 0.25, 0.625])
    assert plan.router_logits[0].tolist() == pytest.approx([0, LN(2), LN(5)])


def test_softmax_after_equals_softmax_of_the_chosen_logits() -> None:
    router, tokens, logits = random_logits("softmax", 40, 8, top_k=3)
    for token, found in enumerate(choices(ask(router, tokens))):
        best = sorted(range(8), key=lambda e: -logits[token, e])[:3]
        total = sum(math.exp(logits[token, e]) for e in best)
        assert found == pytest.approx({e: math.exp(logits[token, e]) / total for e in best}, rel=1e-4)


# ---------------------------------------------------------------- sigmoid


def test_sigmoid_scores_by_hand() -> None:
    # sigmoid(0) = 1/2, sigmoid(ln 3) = 3/4, sigmoid(-ln 3) = 1/4
    router = with_logits(router_of("sigmoid", n_experts=3), [0.0, LN(3), -LN(3)])
    plan = ask(router, ONE)
    assert choices(plan) == [pytest.approx({0: 0.4, 1: 0.6})]  # 1/2 and 3/4, scaled to sum to 1
    assert plan.router_probs[0].tolist() == pytest.approx([1 / 3, 1 / 2, 1 / 6])  # all three, over 3/2
    raw = with_logits(router_of("sigmoid", {"normalize": False}, n_experts=3), [0.0, LN(3), -LN(3)])
    assert choices(ask(raw, ONE)) == [pytest.approx({0: 0.5, 1: 0.75})]


# ---------------------------------------------------------------- the balancing bias


@pytest.mark.parametrize("name", ["softmax", "sigmoid", "noisy_topk", "switch", "group_limited", "top_p"])
def test_bias_moves_the_choice_and_never_the_weight(name: str) -> None:
    k = 1 if name == "switch" else 2
    options = {"group_limited": {"n_groups": 1, "top_groups": 1}, "top_p": {"p": 1.0}}.get(name, {})
    fields = {"n_experts": 4, "top_k": k, "balance": {"bias_update_rate": 0.1}}
    router = with_logits(router_of(name, options, **fields), [2.0, 1.0, 0.0, -1.0])
    before = choices(ask(router, ONE))[0]
    assert set(before) == set(range(k))
    router.expert_bias[3] = 10.0
    after = choices(ask(router, ONE))[0]
    assert set(after) == ({3} if k == 1 else {0, 3})
    # the weight that expert 3 would have had anyway: from its own logit, as if the bias were nothing
    unbiased = with_logits(
        router_of(name, options, **fields | {"top_k": 1 if k == 1 else 4}), [2.0, 1.0, 0.0, -1.0]
    )
    if k == 2:
        ratio = choices(ask(unbiased, ONE))[0]
        assert after[3] / after[0] == pytest.approx(ratio[3] / ratio[0], rel=1e-5)
    else:
        assert after[3] == pytest.approx(math.exp(-1) / sum(math.exp(v) for v in (2, 1, 0, -1)))


def test_bias_update_by_hand() -> None:
    router = router_of("softmax", n_experts=4, balance={"bias_update_rate": 0.01})
    # mean 5: above it goes down, below it goes up, at it stays
    stats = RoutingStats(torch.tensor([9, 5, 4, 2]), *torch.zeros(4, dtype=torch.long))
    router.after_step(stats)
    assert router.expert_bias.tolist() == pytest.approx([-0.01, 0.0, 0.01, 0.01])
    router.after_step(stats, scale=0.5)
    assert router.expert_bias.tolist() == pytest.approx([-0.015, 0.0, 0.015, 0.015])


def test_proportional_bias_update_by_hand() -> None:
    router = router_of(
        "softmax", n_experts=4, balance={"bias_update_rate": 0.01, "bias_update": "proportional"}
    )
    # mean 5: 15 is twice the mean too much and cut off at -1; 4 lacks a fifth, 1 lacks four fifths, 0 all of it
    stats = RoutingStats(torch.tensor([15, 4, 1, 0]), *torch.zeros(4, dtype=torch.long))
    router.after_step(stats, scale=0.5)
    assert router.expert_bias.tolist() == pytest.approx([-0.005, 0.001, 0.004, 0.005])
    # a step without a token changes nothing
    router.after_step(RoutingStats(torch.zeros(4, dtype=torch.long), *torch.zeros(4, dtype=torch.long)))
    assert router.expert_bias.tolist() == pytest.approx([-0.005, 0.001, 0.004, 0.005])


@pytest.mark.parametrize(("rule", "is_even"), [("sign", False), ("proportional", True)])
def test_skewed_loads_are_even_in_the_mean_only_with_the_proportional_rule(rule: str, is_even: bool) -> None:
    """An expert that one step in ten sends everything and the others nothing: the sign feeds it for ever."""
    router = router_of(
        "softmax", n_experts=2, top_k=1, d_model=1, balance={"bias_update_rate": 0.001, "bias_update": rule},
        router={"name": "softmax", "normalize": "before"},
    )  # fmt: skip
    loads = [[19, 1] if step % 10 == 0 else [9, 11] for step in range(1000)]  # both 10 in the mean
    for load in loads:
        router.after_step(RoutingStats(torch.tensor(load), *torch.zeros(4, dtype=torch.long)))
    drift = float(router.expert_bias[0] - router.expert_bias[1])
    assert (abs(drift) < 1e-3) == is_even


def test_the_bias_keeps_its_rate_where_it_is_told_to() -> None:
    balance = {"bias_update_rate": 0.01, "bias_update_decay": False}
    router = router_of("softmax", n_experts=2, balance=balance)
    stats = RoutingStats(torch.tensor([3, 1]), *torch.zeros(4, dtype=torch.long))
    router.after_step(stats, scale=0.1)
    assert router.expert_bias.tolist() == pytest.approx([-0.01, 0.01])


def test_bias_update_compares_integers_exactly() -> None:
    # 2**24 + 1 has no float32: rounded, expert 1 would look as loaded as the mean
    router = router_of("softmax", n_experts=3, balance={"bias_update_rate": 1.0})
    stats = RoutingStats(torch.tensor([2**24, 2**24 + 1, 2**24 + 2]), *torch.zeros(4, dtype=torch.long))
    router.after_step(stats)
    assert router.expert_bias.tolist() == [1.0, 0.0, -1.0]


@pytest.mark.parametrize("name", ["softmax", "sigmoid", "top_p"])
def test_bias_rule_balances_a_lopsided_router(name: str) -> None:
    options = {"p": 0.999} if name == "top_p" else {}
    router = router_of(name, options, d_model=6, n_experts=8, top_k=2, balance={"bias_update_rate": 0.01})
    tokens = torch.randn(512, 6)
    tokens[:, 0] = 1.0
    with torch.no_grad():
        router.weight.normal_(std=0.3)
        router.weight[0, 0] += 2.0  # every token likes expert 0
    first = RoutingStats.from_plan(ask(router, tokens)).max_violation()
    for step in range(
        150
    ):  # the rate goes down with the learning rate: a constant one swings about the balance
        router.after_step(RoutingStats.from_plan(ask(router, tokens)), scale=1 - step / 150)
    last = RoutingStats.from_plan(ask(router, tokens)).max_violation()
    assert first > 1.5
    assert last < 0.1


def test_routers_that_take_no_bias_refuse_it() -> None:
    with pytest.raises(ConfigError, match=r"balance.bias_update_rate must be 0 with router 'hash'.*softmax"):
        router_of("hash", balance={"bias_update_rate": 0.1})


# ---------------------------------------------------------------- noisy top-k


def test_noisy_topk_is_quiet_in_evaluation_and_noisy_in_training() -> None:
    router = with_logits(router_of("noisy_topk", n_experts=3), [LN(1), LN(2), LN(5)])
    plan = ask(router, ONE)
    assert choices(plan) == [pytest.approx({1: 2 / 7, 2: 5 / 7})]
    assert plan.load_probs is None
    router.train()
    noise = ask(router, torch.ones(4000, 1)).router_logits - torch.tensor([0.0, LN(2), LN(5)])
    # untrained noise weights are zero: every deviation is softplus(0) + 0.01 = ln 2 + 0.01
    assert noise.mean(dim=0).abs().max() < 0.05
    assert noise.std(dim=0).tolist() == pytest.approx([LN(2) + 0.01] * 3, rel=0.05)


@pytest.mark.parametrize("biased", [False, True])
def test_noisy_topk_load_is_the_chance_of_being_chosen(biased: bool) -> None:
    """P(x, i) of eq. 8 and 9 by drawing the noise of expert i anew, that of the others as it fell."""
    fields = {"balance": {"bias_update_rate": 0.1}} if biased else {}
    router = router_of("noisy_topk", d_model=3, n_experts=5, top_k=2, **fields).train()
    with torch.no_grad():
        router.weight.normal_()
        router.noise_weight.normal_()
        if biased:
            router.expert_bias.normal_()
    tokens = torch.randn(6, 3)
    plan = ask(router, tokens)
    clean = tokens @ router.weight.t()
    deviation = torch.nn.functional.softplus(tokens @ router.noise_weight.t()) + 0.01
    bias = router.expert_bias if biased else torch.zeros(5)
    n_draws = 20000
    for t, i in itertools.product(range(6), range(5)):
        others = [e for e in range(5) if e != i]
        second_best = (plan.router_logits + bias)[t, others].topk(2).values[-1]
        drawn = clean[t, i] + bias[i] + deviation[t, i] * torch.randn(n_draws)
        share = float((drawn > second_best).float().mean())
        assert plan.load_probs[t, i].item() == pytest.approx(share, abs=0.02)


def test_noisy_topk_load_has_a_gradient_and_is_one_where_all_are_chosen() -> None:
    router = router_of("noisy_topk", d_model=3, n_experts=4, top_k=2).train()
    ask(router, torch.randn(5, 3)).load_probs.sum(dim=0)[0].backward()
    assert router.weight.grad.any()
    assert router.noise_weight.grad.any()
    every = router_of("noisy_topk", d_model=3, n_experts=2, top_k=2).train()
    assert ask(every, torch.randn(5, 3)).load_probs.tolist() == [[1.0, 1.0]] * 5


# ---------------------------------------------------------------- switch and gshard


def test_switch_takes_the_best_with_its_probability() -> None:
    router = with_logits(router_of("switch", n_experts=3, top_k=1), [LN(1), LN(2), LN(5)])
    assert choices(ask(router, ONE)) == [pytest.approx({2: 0.625})]
    with pytest.raises(ConfigError, match="top_k must be 1 with router 'switch'"):
        router_of("switch", top_k=2)


def test_switch_jitter_scales_inputs_in_training_only() -> None:
    router = with_logits(router_of("switch", {"jitter": 0.1}, n_experts=2, top_k=1), [3.0, 0.0])
    tokens = torch.full((4000, 1), 2.0)
    assert (ask(router, tokens).router_logits[:, 0] == 6.0).all()
    logits = ask(router.train(), tokens).router_logits[:, 0]
    # 6 times uniform(0.9, 1.1): standard deviation 6 * 0.2 / sqrt(12)
    assert logits.min() >= 5.4
    assert logits.max() <= 6.6
    assert logits.mean().item() == pytest.approx(6.0, abs=0.03)
    assert logits.std().item() == pytest.approx(1.2 / math.sqrt(12), rel=0.05)


def test_gshard_draws_the_second_expert() -> None:
    # of 3, 1 and 0.1 the two best are 3/4 and 1/4, so the second is kept with probability 2 * 1/4
    router = with_logits(router_of("gshard", n_experts=3), [LN(3), LN(1), LN(0.1)])
    tokens = torch.ones(4000, 1)
    assert choices(ask(router, tokens[:1])) == [pytest.approx({0: 0.75, 1: 0.25})]
    plan = ask(router.train(), tokens)
    assert plan.tokens_per_expert[0] == 4000
    assert float(plan.tokens_per_expert[1]) == pytest.approx(
        2000, abs=4 * math.sqrt(1000)
    )  # 4 standard deviations
    assert plan.tokens_per_expert[2] == 0
    for found in choices(plan)[:100]:  # the first keeps its weight whether or not the second came
        assert found in (pytest.approx({0: 0.75, 1: 0.25}), pytest.approx({0: 0.75}))
    even = with_logits(router_of("gshard", n_experts=3), [1.0, 1.0, 0.0]).train()
    assert ask(even, tokens).tokens_per_expert.tolist() == [4000, 4000, 0]
    with pytest.raises(ConfigError, match="top_k must be 2 with router 'gshard'"):
        router_of("gshard", top_k=3)


# ---------------------------------------------------------------- group-limited


@pytest.mark.parametrize("score", ["sigmoid", "softmax"])
@pytest.mark.parametrize("biased", [False, True])
def test_group_limited_against_all_subsets_of_groups(score: str, biased: bool) -> None:
    options = {"n_groups": 4, "top_groups": 2, "score": score, "normalize": False}
    fields = {"balance": {"bias_update_rate": 0.1}} if biased else {}
    router, tokens, logits = random_logits("group_limited", 60, 12, options, top_k=3, **fields)
    if biased:
        router.expert_bias.normal_(std=0.3)
    bias = router.expert_bias.double() if biased else torch.zeros(12).double()
    n_groups_used = set()
    for token, found in enumerate(choices(ask(router, tokens))):
        scores = torch.sigmoid(logits[token]) if score == "sigmoid" else logits[token].softmax(dim=0)
        value = (scores + bias).tolist()
        groups = [range(3 * g, 3 * g + 3) for g in range(4)]
        n_best = 2 if score == "sigmoid" else 1
        worth = [sum(sorted((value[e] for e in group), reverse=True)[:n_best]) for group in groups]
        pair = max(itertools.combinations(range(4), 2), key=lambda pair: worth[pair[0]] + worth[pair[1]])
        allowed = [e for g in pair for e in groups[g]]
        best = sorted(allowed, key=lambda e: -value[e])[:3]
        assert found == pytest.approx({e: float(scores[e]) for e in best}, rel=1e-4)
        n_groups_used.add(len({e // 3 for e in found}))
    assert max(n_groups_used) == 2


def test_group_limited_rules() -> None:
    with pytest.raises(ConfigError, match=r"n_groups must divide n_experts \(8\); got 3"):
        router_of("group_limited", {"n_groups": 3})
    with pytest.raises(ConfigError, match=r"top_groups must be at most n_groups \(2\); got 3"):
        router_of("group_limited", {"n_groups": 2, "top_groups": 3})
    with pytest.raises(
        ConfigError, match=r"top_k must be at most the experts in the top groups \(2\); got 3"
    ):
        router_of("group_limited", {"n_groups": 4, "top_groups": 1}, top_k=3)


# ---------------------------------------------------------------- hierarchical


@pytest.mark.parametrize(("top_groups", "top_k"), [(1, 2), (2, 2), (2, 4), (3, 3)])
def test_hierarchical_probability_is_group_times_expert_in_group(top_groups: int, top_k: int) -> None:
    options = {"n_groups": 3, "top_groups": top_groups, "normalize": False}
    router, tokens, logits = random_logits("hierarchical", 30, 9, options, top_k=top_k)
    with torch.no_grad():
        router.group_weight.normal_()
    group_logits = (tokens.double() @ router.group_weight.double().t()).detach()
    plan = ask(router, tokens)
    for token, found in enumerate(choices(plan)):
        group_probs = group_logits[token].softmax(dim=0)
        probs = []
        for g in range(3):
            inside = logits[token, 3 * g : 3 * g + 3].softmax(dim=0)
            probs += [float(group_probs[g] * p) for p in inside]
        assert plan.router_probs[token].tolist() == pytest.approx(probs, rel=1e-4)
        assert sum(probs) == pytest.approx(1.0)
        best_groups = sorted(range(3), key=lambda g: -group_probs[g])[:top_groups]
        expected = [
            e
            for g in best_groups
            for e in sorted(range(3 * g, 3 * g + 3), key=lambda e: -probs[e])[: top_k // top_groups]
        ]
        assert found == pytest.approx({e: probs[e] for e in expected}, rel=1e-4)


def test_hierarchical_normalised_and_its_rules() -> None:
    router = router_of("hierarchical", {"n_groups": 2, "top_groups": 2}, d_model=3, n_experts=4)
    for found in choices(ask(router, torch.randn(5, 3))):
        assert sum(found.values()) == pytest.approx(1.0)
        assert {e // 2 for e in found} == {0, 1}
    with pytest.raises(ConfigError, match="n_groups must divide n_experts"):
        router_of("hierarchical", {"n_groups": 3})
    with pytest.raises(
        ConfigError, match=r"top_groups must be at most n_groups \(4\) and divide top_k \(3\)"
    ):
        router_of("hierarchical", {"n_groups": 4, "top_groups": 2}, top_k=3)
    with pytest.raises(ConfigError, match="top_k must be at most top_groups"):
        router_of("hierarchical", {"n_groups": 4, "top_groups": 1}, top_k=3)


# ---------------------------------------------------------------- one expert per token


@pytest.mark.parametrize(
    ("name", "options", "is_taught"),
    [
        ("softmax", {"normalize": "after"}, False),
        ("softmax", {"normalize": "before"}, True),
        ("sigmoid", {"normalize": True}, False),
        ("sigmoid", {"normalize": False}, True),
        ("group_limited", {"n_groups": 2, "top_groups": 1, "normalize": True}, False),
        ("group_limited", {"n_groups": 2, "top_groups": 1, "normalize": False}, True),
        ("hierarchical", {"n_groups": 2, "top_groups": 1, "normalize": True}, False),
        ("noisy_topk", {}, False),
        ("switch", {}, True),
    ],
)
def test_a_router_that_the_task_cannot_teach_warns(name: str, options: dict, is_taught: bool) -> None:
    """The warning is true: the weights of one chosen expert have a gradient exactly where it is silent."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        router = router_of(name, options, d_model=6, n_experts=4, top_k=1)
    warned = [w for w in caught if w.category is UntaughtRouterWarning]
    assert len(warned) == (0 if is_taught else 1)
    plan = ask(router, torch.randn(20, 6))
    (plan.row_weight * torch.randn(20)).sum().backward()
    assert (router.weight.grad.abs().max() > 1e-5) == is_taught
    assert all("top_k 2 or more" in str(w.message) for w in warned)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        router_of(name, options, d_model=6, n_experts=4, top_k={"switch": 1}.get(name, 2))
