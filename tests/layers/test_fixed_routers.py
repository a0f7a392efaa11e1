"""Routers that learn nothing: hash, random, and rules over the input."""

from __future__ import annotations

import pytest
import torch
from routing_helpers import ask, choices, router_of, with_logits
from torch import Tensor

import moekit
from moekit.config.errors import ConfigError
from moekit.layers.routing import Router, keyword_rules

# ---------------------------------------------------------------- hash


def by_id(router: Router, ids: list[int] | Tensor) -> list[dict[int, float]]:
    ids = torch.as_tensor(ids)
    return choices(ask(router, torch.zeros(len(ids), 1), token_ids=ids))


def test_hash_sends_an_id_to_the_same_distinct_experts_always() -> None:
    router = router_of("hash", n_experts=8, top_k=3)
    table = by_id(router, torch.arange(100))
    assert all(list(found.values()) == pytest.approx([1 / 3] * 3) for found in table)
    assert by_id(router.train(), [7, 7, 99, 0]) == [table[7], table[7], table[99], table[0]]
    assert by_id(router_of("hash", n_experts=8, top_k=3), [42]) == [table[42]]
    # whatever integer type the ids have
    assert by_id(router, torch.arange(100, dtype=torch.int32)) == table


def test_hash_spreads_ids_evenly_and_pairs_too() -> None:
    router = router_of("hash", n_experts=8, top_k=2)
    table = by_id(router, torch.arange(8000))
    single, pairs = torch.zeros(8), torch.zeros(8, 8)
    for found in table:
        first, second = sorted(found)
        single[first] += 1
        single[second] += 1
        pairs[first, second] += 1
    # 2000 expected, deviation about sqrt(8000 * 1/4 * 3/4) = 39; pairs 286, deviation 17
    assert (single - 2000).abs().max() < 160
    assert (pairs[torch.ones(8, 8).triu(1).bool()] - 8000 / 28).abs().max() < 80


def test_hash_seed_gives_another_table_and_ids_are_needed() -> None:
    first, second = (router_of("hash", {"seed": seed}, n_experts=8) for seed in (0, 1))
    ids = torch.arange(400)
    same = sum(set(a) == set(b) for a, b in zip(by_id(first, ids), by_id(second, ids), strict=True))
    assert same < 50  # by chance 400 / 28
    with pytest.raises(ConfigError, match=r"call the layer with token_ids"):
        ask(first, torch.zeros(2, 1))


# ---------------------------------------------------------------- random


def test_random_draws_distinct_experts_uniformly() -> None:
    router = router_of("random", n_experts=5, top_k=2)
    plan = ask(router, torch.zeros(5000, 1))
    assert all(len(found) == 2 and set(found.values()) == {0.5} for found in choices(plan))
    # 2000 expected, deviation sqrt(5000 * 2/5 * 3/5) = 35
    assert (plan.tokens_per_expert - 2000).abs().max() < 140
    assert not torch.equal(
        ask(router, torch.zeros(50, 1)).token_index, ask(router, torch.zeros(50, 1)).token_index
    )


# ---------------------------------------------------------------- rules


def rule_router(*rules: tuple[int, list[list[int]]], top_k: int = 1, **options: object) -> Router:
    """Four experts; without a rule every token goes to expert 0, then 1, 2, 3."""
    keywords = [{"expert": expert, "token_ids": ids} for expert, ids in rules]
    router = router_of("rule", {"rules": keywords} | options, n_experts=4, top_k=top_k)
    return with_logits(router, [4.0, 3.0, 2.0, 1.0])


def experts_of(router: Router, ids: list[list[int]], **context: Tensor) -> list[list[set[int]]]:
    """The experts of each token of each row."""
    tensor = torch.tensor(ids)
    flat = {name: value.reshape(-1) for name, value in context.items()}
    plan = ask(
        router,
        torch.ones(tensor.numel(), 1),
        token_ids=tensor.view(-1),
        batch_shape=tuple(tensor.shape),
        **flat,
    )
    found = [set(choice) for choice in choices(plan)]
    return [found[i * tensor.shape[1] : (i + 1) * tensor.shape[1]] for i in range(tensor.shape[0])]


@pytest.mark.parametrize(
    ("scope", "expected"),
    [
        ("token", [0, 0, 2, 0, 0]),
        ("onward", [0, 0, 2, 2, 2]),
        ("sequence", [2, 2, 2, 2, 2]),
    ],
)
def test_scope_of_a_keyword(scope: str, expected: list[int]) -> None:
    router = rule_router((2, [[8, 9]]), scope=scope)
    # the keyword 8 9 ends at position 2; the second row has its parts, but not together
    assert experts_of(router, [[1, 8, 9, 1, 1], [9, 8, 1, 9, 8]]) == [[{e} for e in expected], [{0}] * 5]
    assert router.causal is (scope != "sequence")


@pytest.mark.parametrize("scope", ["onward", "sequence"])
def test_rules_end_with_their_document(scope: str) -> None:
    router = rule_router((2, [[8, 9]]), scope=scope)
    documents = torch.tensor([[0, 0, 1, 1, 1, 1, 2, 2]])
    # 8 | 9 stand in two documents at first, then 8 9 in one
    before = {2} if scope == "sequence" else {0}
    expected = [[{0}, {0}, before, before, {2}, {2}, {0}, {0}]]
    assert experts_of(router, [[1, 8, 9, 8, 9, 1, 1, 1]], segment_ids=documents) == expected


def test_padding_holds_no_keyword() -> None:
    router = rule_router((2, [[9]]), scope="sequence")
    mask = torch.tensor([[True, True, False], [False, True, True]])
    assert experts_of(router, [[1, 1, 9], [9, 1, 9]], token_mask=mask) == [
        [{0}, {0}, set()],
        [set(), {2}, {2}],
    ]


def test_several_rules_at_once() -> None:
    # one keyword of two names expert 3; another names 2 as well
    router = rule_router((3, [[7], [8]]), (2, [[7]]), scope="token", top_k=2)
    assert experts_of(router, [[7, 8, 1]]) == [[{2, 3}, {3}, {0, 1}]]
    # both score 1: with room for one, the learned router prefers 2
    assert experts_of(rule_router((3, [[7]]), (2, [[7]]), scope="token"), [[7]]) == [[{2}]]


def test_higher_score_wins_whatever_the_learned_router_thinks() -> None:
    def scores(token_ids: Tensor, n_experts: int) -> Tensor:
        table = torch.tensor([0.0, 5000.0, 5000.0005, 5000.0])  # near each other, far from 0
        return table.expand(*token_ids.shape, n_experts)

    router = with_logits(router_of("rule", {"function": scores}, n_experts=4, top_k=1), [4.0, 3.0, 2.0, 1.0])
    assert experts_of(router, [[1]]) == [[{2}]]
    router = with_logits(router_of("rule", {"function": scores}, n_experts=4, top_k=2), [4.0, 1.0, 2.0, 3.0])
    assert experts_of(router, [[1]]) == [[{2, 3}]]


def test_weights_are_those_of_the_learned_router_among_the_chosen() -> None:
    router = rule_router((1, [[7]]), (3, [[7]]), top_k=2)
    plan = ask(router, torch.ones(1, 1), token_ids=torch.tensor([7]))
    e3, e1 = torch.tensor([3.0, 1.0]).exp().tolist()  # logits of experts 1 and 3
    assert choices(plan) == [pytest.approx({1: e3 / (e3 + e1), 3: e1 / (e3 + e1)})]


def test_bias_mode_adds_strength_to_the_logit() -> None:
    router = rule_router((3, [[7]]), mode="bias", strength=2.5, scope="token")
    tensor = torch.tensor([7, 1])
    plan = ask(router, torch.ones(2, 1), token_ids=tensor)
    assert plan.router_logits.tolist() == [[4.0, 3.0, 2.0, 3.5], [4.0, 3.0, 2.0, 1.0]]
    assert experts_of(router, [[7, 1]]) == [[{0}, {0}]]  # 3.5 is not enough
    assert experts_of(rule_router((3, [[7]]), mode="bias", strength=3.5, scope="token"), [[7, 1]]) == [
        [{3}, {0}]
    ]


def odd_ids_to_the_last(token_ids: Tensor, n_experts: int) -> Tensor:
    """A rule that tests import by its path."""
    scores = torch.zeros(*token_ids.shape, n_experts)
    scores[..., -1] = (token_ids % 2).float()
    return scores


def test_function_by_value_and_by_import_path() -> None:
    for function in (odd_ids_to_the_last, f"{__name__}:odd_ids_to_the_last"):
        router = with_logits(
            router_of("rule", {"function": function}, n_experts=4, top_k=1), [4.0, 3.0, 2.0, 1.0]
        )
        assert experts_of(router, [[1, 2, 3]]) == [[{3}, {0}, {3}]]
        assert not router.causal
    assert router_of("rule", {"function": odd_ids_to_the_last, "function_is_causal": True}).causal


def test_errors_of_rules_name_the_remedy() -> None:
    with pytest.raises(ConfigError, match=r"needs `rules` or a `function`.*keyword_rules"):
        router_of("rule")
    with pytest.raises(ConfigError, match=r"rules.expert must be below n_experts \(4\); got 4"):
        rule_router((4, [[1]]))
    with pytest.raises(ConfigError, match=r"router\(rule\).function must be a callable or an import path"):
        router_of("rule", {"function": 3})
    with pytest.raises(ConfigError, match="cannot be imported: No module named 'nowhere'"):
        router_of("rule", {"function": "nowhere:rule"})
    with pytest.raises(ConfigError, match="cannot be imported: module 'math' has no attribute 'rule'"):
        router_of("rule", {"function": "math:rule"})
    with pytest.raises(ConfigError, match="reads token ids; call the layer with token_ids"):
        ask(rule_router((1, [[1]])), torch.ones(1, 1))
    wrong = router_of("rule", {"function": lambda ids, n_experts: torch.zeros(3)}, n_experts=4)
    with pytest.raises(ConfigError, match=r"must return scores of shape \(1, 2, 4\)"):
        experts_of(wrong, [[1, 2]])
    with pytest.raises(ConfigError, match=r"router\(rule\).scop is not a known key: did you mean 'scope'"):
        rule_router((1, [[1]]), scop="token")


def test_keyword_rules_write_the_spellings() -> None:
    encode = {"def": [5], " def": [6, 7], "Def": [5], " Def": [8]}
    assert keyword_rules(lambda text: encode[text], {1: ["def"]}) == [
        {"expert": 1, "token_ids": [[5], [6, 7], [8]]}
    ]
    router = rule_router(
        *[(r["expert"], r["token_ids"]) for r in keyword_rules(encode.__getitem__, {1: ["def"]})]
    )
    assert experts_of(router, [[6, 7, 1]]) == [[{0}, {1}, {1}]]


def test_the_hash_table_holds_what_the_hash_gives() -> None:
    router = moekit.MoE(8, n_experts=6, d_expert=4, top_k=2, router="hash").router
    for ids in (
        [3, 0, 3],
        [50, 2],
        [7],
        [10**7, 4],
        [-1, 4],
    ):  # the table grows; far and negative ids go without it
        ids = torch.tensor(ids)
        assert router._choices(ids).equal(router._hashed(ids))
    assert 51 <= len(router._table) < 200


def test_otherwise_one_expert_takes_what_no_rule_names() -> None:
    router = rule_router((2, [[9]]), scope="token", otherwise=3, top_k=2)
    assert experts_of(router, [[9, 1, 1]]) == [[{2}, {3}, {3}]]
    named = rule_router(
        (2, [[9]]), scope="token", otherwise="chat", names=["law", "tax", "home", "chat"], top_k=2
    )
    assert experts_of(named, [[9, 1, 1]]) == [[{2}, {3}, {3}]]
    assert named.expert_names == ("law", "tax", "home", "chat")
    plan = ask(named, torch.ones(1, 1), token_ids=torch.tensor([1]))
    assert choices(plan) == [{3: 1.0}]


def test_the_learned_choice_follows_the_rules_by_a_loss_of_the_routers_own() -> None:
    ids = torch.tensor([9, 1, 9, 7])
    silent = rule_router((2, [[9]]), (1, [[9]]), scope="token", top_k=2)
    assert ask(silent, torch.ones(4, 1), token_ids=ids).losses == {}
    router = rule_router((2, [[9]]), (1, [[9]]), scope="token", top_k=2, teach=0.5)
    mask = torch.tensor([True, True, False, True])
    plan = ask(router, torch.ones(4, 1), token_ids=ids, token_mask=mask)
    log_probs = torch.tensor([4.0, 3.0, 2.0, 1.0]).log_softmax(dim=0)
    # of the only real token that rules name: half for each of its two experts
    expected = -0.5 * (log_probs[1] + log_probs[2]) / 2
    assert plan.losses["rule_teaching"].item() == pytest.approx(expected.item(), rel=1e-5)
    plan.losses["rule_teaching"].backward()
    # the gradient raises the named experts' logits and lowers the others'
    assert (router.weight.grad.flatten() < 0).tolist() == [False, True, True, False]
    nothing = ask(router, torch.ones(1, 1), token_ids=torch.tensor([1])).losses["rule_teaching"]
    assert nothing.item() == 0


def test_a_taught_router_says_without_rules_what_the_rules_said() -> None:
    """Two kinds of tokens, a keyword in one example of each: the choice goes on where there is none."""
    torch.manual_seed(0)
    layer = moekit.MoE(2, n_experts=4, d_expert=4, top_k=1, router={
        "name": "rule", "scope": "token", "teach": 1.0,
        "rules": [{"expert": 2, "token_ids": [[8]]}, {"expert": 3, "token_ids": [[9]]}],
    })  # fmt: skip
    tokens, ids = torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([8, 9])
    optimizer = torch.optim.SGD(layer.parameters(), lr=1.0)
    for _ in range(30):
        optimizer.zero_grad()
        layer(tokens, token_ids=ids).aux_losses["rule_teaching"].backward()
        optimizer.step()
    plan = layer(tokens, token_ids=torch.tensor([1, 1])).routing
    assert plan.tokens_per_expert.tolist() == [0, 0, 1, 1]
    assert plan.token_index.tolist() == [0, 1]


def test_errors_of_what_is_new_in_rules() -> None:
    with pytest.raises(ConfigError, match=r"otherwise needs mode: decide|otherwise.*needs mode: decide"):
        rule_router((1, [[1]]), mode="bias", otherwise=0)
    with pytest.raises(ConfigError, match=r"teach.*needs mode: decide"):
        rule_router((1, [[1]]), mode="bias", teach=1.0)
    with pytest.raises(ConfigError, match=r"teach must be 0 with otherwise"):
        rule_router((1, [[1]]), otherwise=0, teach=1.0)
    with pytest.raises(ConfigError, match=r"otherwise must be in 0..3"):
        rule_router((1, [[1]]), otherwise=4)
    with pytest.raises(ConfigError, match=r"otherwise must be a number or one of the names: none are given"):
        rule_router((1, [[1]]), otherwise="law")
    with pytest.raises(ConfigError, match=r"names must be as many as experts \(4\)"):
        rule_router((1, [[1]]), names=["law"])
    with pytest.raises(ConfigError, match=r"Keywords become rules where a task's text is encoded"):
        router_of("rule", {"keywords": {"law": ["court"]}})
