"""Task experts against plain loops over examples and experts; which expert serves which task; twins and counts."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from moekit.config.errors import ConfigError
from moekit.config.moe import BalanceConfig
from moekit.config.task import TaskModelConfig
from moekit.config.task_experts import TaskExpertsConfig
from moekit.models.accounting import active_parameters, total_parameters
from moekit.models.task_experts import TaskExperts
from moekit.models.twins import WIDTH_STEP, dense_twin

B, D = 7, 6
TASKS = ["income", "marriage"]
EVEN = {"load_balance": 0.1, "router_z": 0.0, "importance": 0.1}


def experts(tasks=TASKS, **fields) -> TaskExperts:
    torch.manual_seed(0)
    return TaskExperts(TaskExpertsConfig.from_dict({"d_expert": 5, **fields}), D, tasks).eval()


def one(level, number: int, x: torch.Tensor) -> torch.Tensor:
    """Expert `number` of a level on one vector."""
    gate, up = (level.experts.w_in[number] @ x).chunk(2)
    return level.experts.w_out[number] @ (F.silu(gate) * up)


def mixed(level, mixture, own: torch.Tensor, sources, top_k: int | None) -> torch.Tensor:
    """A task's mixture for one example; `sources` is the vector that each expert of the level reads."""
    probs = (mixture.router.weight @ own).softmax(dim=0)
    chosen = list(range(len(probs))) if top_k is None else probs.topk(top_k).indices.tolist()
    total = sum(probs[i] for i in chosen)
    places = mixture.seen.tolist()
    return sum(probs[i] / total * one(level, places[i], sources[places[i]]) for i in chosen)


@pytest.mark.parametrize("top_k", [None, 2])
def test_mmoe_is_a_softmax_over_all_experts_for_each_task(top_k):
    module = experts(kind="mmoe", n_experts=4, top_k=top_k)
    x = torch.randn(B, D)
    (level,) = module.levels
    normed = level.norm(x)
    found = module(x).vectors
    for task, mixture in zip(TASKS, module.mixtures, strict=True):
        assert mixture.name == task
        for row in range(B):
            expected = x[row] + mixed(level, mixture, normed[row], [normed[row]] * 4, top_k)
            torch.testing.assert_close(found[task][row], expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(found["income"], found["marriage"])


@pytest.mark.parametrize("top_k", [None, 2])
def test_two_levels_of_ple(top_k):
    """Own experts read their task's vector, shared ones the shared vector, which a router of its own makes."""
    module = experts(kind="ple", n_experts=2, n_own=1, levels=2, top_k=top_k)
    first, second = module.levels
    assert [mixture.name for mixture in first.mixtures] == [*TASKS, "shared"]
    assert [mixture.seen.tolist() for mixture in first.mixtures] == [[0, 1, 2], [0, 1, 3], [0, 1, 2, 3]]
    assert [mixture.name for mixture in second.mixtures] == TASKS
    assert second.mixtures[1].expert_names == ("shared 0", "shared 1", "marriage 0")
    x = torch.randn(B, D)
    found = module(x).vectors
    for row in range(B):
        normed = first.norm(x[row])
        streams = [x[row] + mixed(first, mixture, normed, [normed] * 4, top_k) for mixture in first.mixtures]
        income, marriage, shared = (second.norm(stream) for stream in streams)
        sources = [shared, shared, income, marriage]
        for number, (task, own) in enumerate(zip(TASKS, (income, marriage), strict=True)):
            expected = streams[number] + mixed(second, second.mixtures[number], own, sources, top_k)
            torch.testing.assert_close(found[task][row], expected, rtol=1e-4, atol=1e-5)


def test_an_own_expert_serves_its_task_alone():
    module = experts(kind="ple", n_experts=1, n_own=2)
    out = module(torch.randn(B, D))
    out.vectors["income"].square().sum().backward()
    reached = module.levels[0].experts.w_out.grad.flatten(1).norm(dim=1) > 0
    # shared, then income's two, then marriage's two
    assert reached.tolist() == [True, True, True, False, False]


def test_every_row_computes_once_however_many_tasks_ask(monkeypatch):
    module = experts(tasks=["a", "b", "c"], kind="mmoe", n_experts=4)
    seen = []
    module.levels[0].experts.register_forward_pre_hook(lambda _, given: seen.append(given[0].shape[0]))
    module(torch.randn(B, D))
    assert seen == [4 * B]
    sparse = experts(tasks=["a", "b", "c"], kind="mmoe", n_experts=4, top_k=1, router="switch")
    sparse.levels[0].experts.register_forward_pre_hook(lambda _, given: seen.append(given[0].shape[0]))
    out = sparse(torch.randn(B, D))
    asked = {
        (int(e), int(t))
        for plan in out.routing
        for e, t in zip(plan.expert_of_row(), plan.token_index, strict=True)
    }
    assert seen[1] == len(asked) < 3 * B


def test_one_router_and_no_router_give_all_tasks_one_vector():
    single = experts(kind="single", n_experts=3)
    x = torch.randn(B, D)
    out = single(x)
    assert out.vectors["income"] is not x
    assert torch.equal(out.vectors["income"], out.vectors["marriage"])
    assert len(out.routing) == 1
    shared = experts(kind="shared", n_experts=1)
    out = shared(x)
    assert torch.equal(out.vectors["income"], x + shared.bottom(shared.norm(x)))
    assert out.vectors["marriage"] is out.vectors["income"]
    assert (out.routing, out.layer_losses, shared.mixtures, shared.untouched) == ((), (), [], 0)


def test_balance_losses_are_those_of_each_mixture():
    module = TaskExperts(
        TaskExpertsConfig(kind="mmoe", n_experts=4, d_expert=5, top_k=2),
        D, TASKS, BalanceConfig.from_dict(EVEN),
    )  # fmt: skip
    x = torch.randn(B, D)
    out = module(x)
    assert [sorted(losses) for losses in out.layer_losses] == [["importance", "load_balance"]] * 2
    counts = [torch.tensor([0, 0, 0, 1000]), None]
    again = module(x, counts)
    shares = out.routing[0].router_probs.mean(dim=0).detach()
    before, after = (each.layer_losses[0]["load_balance"].item() for each in (out, again))
    # with so many earlier choices of the last expert its mean probability is what counts
    assert after == pytest.approx(float(4 * shares[3]), abs=0.1)
    assert after != before
    assert torch.equal(out.layer_losses[1]["load_balance"], again.layer_losses[1]["load_balance"])


def model(**fields) -> TaskModelConfig:
    return TaskModelConfig.from_dict({
        "d_model": 16, "n_layers": 2, "n_heads": 2, "d_ff": 24,
        "stems": {"f": {"kind": "fields", "n_numbers": 2, "sizes": [3]}},
        "heads": {"a": {"kind": "classify"}, "b": {"kind": "classify"}}, **fields,
    })  # fmt: skip


@pytest.mark.parametrize("moe", [None, {"n_experts": 4, "top_k": 2, "d_expert": 12}])
@pytest.mark.parametrize(
    "given",
    [
        {"kind": "mmoe", "n_experts": 6, "d_expert": 10},
        {"kind": "mmoe", "n_experts": 6, "d_expert": 10, "top_k": 2},
        {"kind": "ple", "n_experts": 3, "n_own": 2, "d_expert": 10, "levels": 2},
    ],
)
@pytest.mark.parametrize("equal", ["active", "total"])
def test_the_twin_has_a_shared_bottom_of_equal_size(moe, given, equal):
    config = model(moe=moe, task_experts=given)
    twin = dense_twin(config, equal)
    assert twin.moe is None
    assert twin.task_experts.kind == "shared"
    counted = active_parameters if equal == "active" else total_parameters
    narrower = twin.replace(
        task_experts=twin.task_experts.replace(d_expert=twin.task_experts.d_expert - WIDTH_STEP)
    )
    # the backbone's own twin may be one step above what it has to be
    step = 0 if moe is None else twin.n_layers * 3 * 16 * WIDTH_STEP
    assert total_parameters(narrower) - step < counted(config) <= total_parameters(twin)


def test_active_parameters_leave_out_experts_that_no_task_visits():
    given = {"kind": "mmoe", "n_experts": 6, "d_expert": 10}
    one_expert = 3 * 16 * 10
    assert active_parameters(model(task_experts=given)) == total_parameters(model(task_experts=given))
    sparse = model(task_experts={**given, "top_k": 2})  # two tasks: up to four of six
    assert total_parameters(sparse) - active_parameters(sparse) == 2 * one_expert
    everything = model(task_experts={**given, "top_k": 3})
    assert total_parameters(everything) == active_parameters(everything)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"kind": "mmoe", "n_own": 2}, r"n_own must be null with kind mmoe; got 2. Only kind: ple"),
        ({"kind": "mmoe", "levels": 2}, r"levels must be 1 with kind mmoe"),
        ({"kind": "shared", "n_experts": 4}, r"n_experts must be 1 with kind shared"),
        ({"kind": "ple", "n_experts": 2, "n_own": 1, "top_k": 4}, r"top_k must be in 1..3"),
        ({"kind": "mmoe", "router": "soft"}, r"router blends the tokens"),
        ({"kind": "mmeo"}, r"kind"),
    ],
)
def test_what_does_not_go_together_is_refused(given, message):
    with pytest.raises(ConfigError, match=message):
        TaskExpertsConfig.from_dict(given)


def test_balancing_is_said_once():
    with pytest.raises(ConfigError, match=r"task_experts.balance must be null beside moe"):
        model(moe={"n_experts": 4}, task_experts={"kind": "mmoe", "balance": {"importance": 0.1}})
    alone = model(task_experts={"kind": "mmoe", "balance": {"importance": 0.1}})
    assert alone.balance.importance == 0.1
