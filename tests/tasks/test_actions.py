"""Heads and targets of control: losses worked out by hand, names and numbers back, imitation of what was done."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from moekit.config.errors import DataError
from moekit.config.task import ActionTarget, PolicyHeadConfig, ReturnTarget, ValueHeadConfig
from moekit.config.task_run import TaskRunConfig
from moekit.data.encoding.actions import ActionEncoder, ReturnEncoder
from moekit.data.examples import Examples, TaskData
from moekit.evaluate.answers import answers_to
from moekit.models.policy_heads import PolicyHead, ValueHead
from moekit.models.task_heads import Hidden
from moekit.train.run import train_run

NAN = float("nan")


def test_the_loss_of_a_policy_is_the_policy_gradients():
    """Two actions at logits 0 and log 3 have probabilities 1/4 and 3/4."""
    head = PolicyHead(PolicyHeadConfig(actions=("stay", "go")), 4)
    logits = torch.tensor([[0.0, math.log(3)]] * 3, requires_grad=True)
    loss, counted = head.loss(logits, torch.tensor([[0.0, 2.0], [1.0, -1.0], [NAN, 5.0]]))
    assert counted == 2
    assert float(loss.detach()) == pytest.approx((2 * math.log(4) - math.log(4 / 3)) / 2)
    loss.backward()
    # advantage * (probability - taken) / number: the first action's probability rises, the second one's falls
    torch.testing.assert_close(logits.grad, torch.tensor([[-0.75, 0.75], [-0.125, 0.125], [0.0, 0.0]]))


def test_a_new_policy_is_nearly_uniform():
    torch.manual_seed(0)
    head = PolicyHead(PolicyHeadConfig(actions=("a", "b", "c")), 16)
    pooled = torch.randn(50, 16)
    probs = head.answer(Hidden(pooled[:, None], None, pooled, {}, {})).softmax(dim=1).detach()
    assert float((probs - 1 / 3).abs().max()) < 0.03
    assert float((probs - 1 / 3).abs().max()) > 0


def test_a_value_is_learnt_in_deviations_and_said_in_units():
    head = ValueHead(ValueHeadConfig(mean=10.0, deviation=4.0), 4)
    answer = torch.tensor([0.5, 0.0, 3.0])
    loss, counted = head.loss(answer, torch.tensor([14.0, 2.0, NAN]))
    assert counted == 2
    assert float(loss) == pytest.approx((0.5**2 + 2.0**2) / 2)
    assert head.in_units(answer).tolist() == [12.0, 10.0, 22.0]


def test_nothing_known_is_no_loss():
    policy, value = PolicyHead(PolicyHeadConfig(), 4), ValueHead(ValueHeadConfig(), 4)
    loss, counted = policy.loss(torch.zeros(2, 2), torch.full((2, 2), NAN))
    assert (float(loss), counted) == (0.0, 0)
    loss, counted = value.loss(torch.zeros(2), torch.full((2,), NAN))
    assert (float(loss), counted) == (0.0, 0)


def test_actions_are_numbered_with_their_advantages():
    examples = Examples({"move": ["right", "left", None, "up"], "gain": [0.5, -1.0, 2.0, 1.0]})
    config = ActionTarget(column="move", advantage="gain")
    encoder = ActionEncoder(config, ["left", "right"])
    found = encoder.encode(examples).batch(np.arange(4))["targets"]
    np.testing.assert_array_equal(found.numpy(), [[1, 0.5], [0, -1.0], [NAN, 2.0], [NAN, 1.0]])
    again = ActionEncoder.from_state(config, encoder.state())
    assert again.answers(torch.tensor([[0.0, math.log(3)]]), 0)["prediction"] == "right"
    assert again.answers(torch.tensor([[0.0, math.log(3)]]), 0)["probability"] == pytest.approx(0.75)
    alone = ActionEncoder.fit(ActionTarget(column="move"), examples.rows([0, 1]))
    assert alone.part().actions == ("left", "right")
    assert alone.encode(examples.rows([0])).batch(np.arange(1))["targets"].tolist() == [[1.0, 1.0]]


def test_returns_that_are_all_equal_are_refused():
    with pytest.raises(DataError, match="must hold different numbers to learn"):
        ReturnEncoder.fit(ReturnTarget(), Examples({"return": [1.0, 1.0]}))


def test_a_run_imitates_what_paid(tmp_path):
    """Logged actions at random; those that agree with the sign of the state paid, and came to a return of 3."""
    rng = np.random.default_rng(0)
    state, right = rng.normal(size=600), rng.integers(0, 2, 600)
    paid = (state > 0) == (right == 1)
    examples = Examples({
        "state": state, "action": ["right" if one else "left" for one in right],
        "advantage": np.where(paid, 1.0, 0.0), "return": np.where(state > 0, 3.0, 1.0),
    })  # fmt: skip
    config = TaskRunConfig.from_dict({
        "runs_dir": str(tmp_path),
        "inputs": {"state": {"kind": "fields", "numbers": ["state"]}},
        "targets": {"action": {"kind": "action", "advantage": "advantage"}, "worth": {"kind": "return"}},
        "model": {"d_model": 16, "n_layers": 1, "n_heads": 2, "moe": {"n_experts": 4, "top_k": 2, "d_expert": 16}},
        "train": {"steps": 120, "batch_size": 64, "optimizer": {"lr": 1e-2}, "schedule": {"warmup_steps": 5},
                  "device": "cpu"},
    })  # fmt: skip
    whole = TaskData(examples, examples.rows(range(100)), examples.rows([]), given_test=True)
    folder = train_run(config, data=whole, quiet=True).folder
    (tmp_path / "asked.csv").write_text("state\n-1.5\n1.5\n")
    left, right = answers_to(folder, str(tmp_path / "asked.csv"))
    assert (left["answers"]["action"]["prediction"], right["answers"]["action"]["prediction"]) == (
        "left",
        "right",
    )
    assert left["answers"]["worth"]["prediction"] == pytest.approx(1.0, abs=0.3)
    assert right["answers"]["worth"]["prediction"] == pytest.approx(3.0, abs=0.3)
    assert right["experts"]
