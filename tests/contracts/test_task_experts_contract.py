"""Every head with every kind of task experts: gradients reach all of them, their losses are passed on, weights back."""

from __future__ import annotations

import pytest
import torch
from test_task_contract import HEAD_CASES, call, config

from moekit.config.errors import ConfigError
from moekit.config.train import OptimizerConfig
from moekit.layers.balancing import weighted_aux_loss
from moekit.layers.moe import MoE
from moekit.models.build import build_model
from moekit.train.optimizer import build_optimizer

KINDS = {
    "mmoe": {"kind": "mmoe", "n_experts": 3, "d_expert": 6},
    "mmoe-top-2": {"kind": "mmoe", "n_experts": 4, "d_expert": 6, "top_k": 2},
    "ple": {"kind": "ple", "n_experts": 2, "n_own": 2, "d_expert": 6},
    "ple-two-levels": {"kind": "ple", "n_experts": 2, "n_own": 1, "d_expert": 6, "levels": 2},
    "single": {"kind": "single", "n_experts": 3, "d_expert": 6},
    "shared": {"kind": "shared", "n_experts": 1, "d_expert": 6},
}
STEM = "patches"  # which most heads can answer
STEM_OF = {"rank": "ids"}
NOT_POOLED = {"codes", "ctc", "detect", "segment", "sequence", "tag", "tag crf"}
POOLED = sorted(set(HEAD_CASES) - NOT_POOLED)


def built(head: str, kind: str, **fields):
    torch.manual_seed(0)
    balance = {"load_balance": 0.1, "importance": 0.1}
    return build_model(
        config(STEM_OF.get(head, STEM), head, task_experts=KINDS[kind], moe={"balance": balance}, **fields)
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("head", POOLED)
def test_gradients_reach_every_expert_and_router(head, kind):
    model = built(head, kind)
    out = call(model, STEM_OF.get(head, STEM), head)
    mixtures = model.task_experts.mixtures
    assert len(out.routing) == len(model.moe_layers) == 2 + len(mixtures)
    assert [layer.config.n_choices for layer in model.moe_layers] == [
        len(plan.tokens_per_expert) for plan in out.routing
    ]
    out.loss.backward()
    for name, parameter in model.task_experts.named_parameters():
        assert parameter.grad is not None, name
        assert float(parameter.grad.norm()) > 0, name
    plans = iter(out.routing[2:])
    for level in model.task_experts.levels:
        asked = torch.zeros(level.n_experts, dtype=torch.bool)
        for mixture in level.mixtures:
            asked[mixture.seen[next(plans).tokens_per_expert > 0]] = True
            assert (mixture.router.weight.grad.norm(dim=1) > 0).all()
        assert asked.all() or "top" in kind
        reached = level.experts.w_out.grad.flatten(1).norm(dim=1) > 0
        assert torch.equal(reached, asked)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "shared"])
@pytest.mark.parametrize("head", POOLED)
def test_their_balancing_losses_join_the_others(head, kind):
    model = built(head, kind)
    out = call(model, STEM_OF.get(head, STEM), head)
    balance = model.config.balance
    assert balance == model.config.moe.balance
    totals = [
        out.loss + weighted_aux_loss(out.aux_losses, balance.replace(importance=coefficient))
        for coefficient in (0.0, 0.5)
    ]
    router = model.task_experts.mixtures[0].router.weight
    (gradient,) = torch.autograd.grad(totals[1] - totals[0], router)
    assert float(gradient.norm()) > 0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("head", POOLED)
def test_weights_come_back_and_an_optimizer_takes_them(head, kind):
    model, again = built(head, kind).eval(), built(head, kind).eval()
    for parameter in again.parameters():
        torch.nn.init.zeros_(parameter)
    again.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert torch.equal(
            call(model, STEM_OF.get(head, STEM), head).answers["answer"],
            call(again, STEM_OF.get(head, STEM), head).answers["answer"],
        )
    groups = build_optimizer(model, OptimizerConfig()).param_groups
    assert sum(p.numel() for group in groups for p in group["params"]) == sum(
        p.numel() for p in model.parameters()
    )


def test_heads_that_read_single_tokens_have_no_mixture():
    for name in NOT_POOLED:
        with pytest.raises(ConfigError, match=r"needs a target that is answered from the pooled vector"):
            build_model(config(STEM, name, task_experts=KINDS["mmoe"]))
    model = built("classify", "ple")
    assert {type(layer) for layer in model.moe_layers} != {MoE}
