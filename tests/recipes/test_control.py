"""A task's model as a policy of stable-baselines3, and the recipe that trains it."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

pytest.importorskip("stable_baselines3", reason="the extra control is not installed")

import gymnasium
from click.testing import CliRunner
from gymnasium import spaces
from stable_baselines3 import A2C, PPO
from stable_baselines3.common.env_util import make_vec_env

from moekit.cli.main import cli
from moekit.config.errors import ConfigError
from moekit.config.task import TaskModelConfig
from moekit.evaluate.answers import answers_to
from moekit.models.twins import dense_twin
from moekit.recipes import control
from moekit.recipes.control_policy import TaskPolicy, episodes, with_loss
from moekit.recipes.running import run_recipe
from moekit.recipes.tasks import load_recipe
from moekit.train.trackers import read_metrics


class SignOfTheFirst(gymnasium.Env):
    """Ten rounds; whoever takes action 1 at a first number above 0 and else action 0 gets 1, else nothing."""

    observation_space = spaces.Box(-10.0, 10.0, (2,), np.float32)
    action_space = spaces.Discrete(2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.round = 0
        return self._state(), {}

    def step(self, action):
        reward = float(action == (self.state[0] > 0))
        self.round += 1
        return self._state(), reward, self.round == 10, False, {}

    def _state(self):
        self.state = self.np_random.normal(scale=3.0, size=2).astype(np.float32)
        return self.state


gymnasium.register("moekit/SignOfTheFirst-v0", SignOfTheFirst)
NAME = "moekit/SignOfTheFirst-v0"


def task(load_balance: float = 0.1, **fields) -> TaskModelConfig:
    balance = {"load_balance": load_balance, "router_z": 0.0}
    return TaskModelConfig.from_dict({
        "d_model": 16, "n_layers": 1, "n_heads": 2,
        "moe": {"n_experts": 4, "top_k": 2, "d_expert": 16, "balance": balance},
        "stems": {"state": {"kind": "fields", "n_numbers": 2}},
        "heads": {"act": {"kind": "policy", "actions": ["no", "yes"]}, "worth": {"kind": "value", "deviation": 5.0}},
        **fields,
    })  # fmt: skip


def ppo(model: TaskModelConfig, seed: int = 0, **settings) -> PPO:
    keywords = {"task": model, "deviations": [3.0, 3.0]}
    settings = {"n_steps": 64, "batch_size": 128, "n_epochs": 4, "learning_rate": 3e-3, **settings}
    return PPO(
        TaskPolicy,
        make_vec_env(NAME, 2, seed=seed),
        seed=seed,
        device="cpu",
        policy_kwargs=keywords,
        **settings,
    )


def test_a_loss_that_is_added_counts_once_whatever_the_rest_is_multiplied_by():
    for factor in (0.0, 1.0, 5.0):
        x = torch.tensor([2.0, 3.0], requires_grad=True)
        (factor * with_loss(x * x, 7.0 * x.sum())).sum().backward()
        torch.testing.assert_close(x.grad, factor * 2 * x.detach() + 7.0)


def gradients_of_an_update(load_balance: float) -> tuple[dict, TaskPolicy, torch.Tensor]:
    """Gradients of PPO's one gradient step, with the policy and the states that it was on."""
    algorithm = ppo(task(load_balance), n_epochs=1, max_grad_norm=1e9)
    policy, found = algorithm.policy, {}

    def keep() -> None:
        found.update({name: p.grad.clone() for name, p in policy.named_parameters() if p.grad is not None})

    policy.optimizer.step = lambda *_: keep()
    algorithm.learn(128)
    return found, policy, torch.as_tensor(algorithm.rollout_buffer.observations.reshape(-1, 2))


def test_ppo_trains_on_the_balancing_loss_with_exactly_its_coefficient():
    without, *_ = gradients_of_an_update(0.0)
    found, policy, states = gradients_of_an_update(0.5)
    loss = 0.5 * policy.run(states).aux_losses["load_balance"]
    named = dict(policy.named_parameters())
    assert set(without) == set(found) == set(named)
    expected = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    router = next(name for name in named if "router" in name)
    assert float((found[router] - without[router]).norm()) > 1e-3
    for name, gradient in zip(named, expected, strict=True):
        wanted = torch.zeros_like(found[name]) if gradient is None else gradient
        torch.testing.assert_close(found[name] - without[name], wanted, rtol=1e-3, atol=2e-5, msg=name)


def test_a2c_trains_on_it_too():
    found = {}
    for coefficient in (0.0, 0.5):
        keywords = {"task": task(coefficient), "deviations": [3.0, 3.0]}
        algorithm = A2C(TaskPolicy, make_vec_env(NAME, 2, seed=0), n_steps=8, seed=0, device="cpu",
                        max_grad_norm=1e9, policy_kwargs=keywords)  # fmt: skip
        algorithm.learn(16)
        found[coefficient] = algorithm.policy.model.moe_layers[0].router.weight.grad.clone()
    assert float((found[0.5] - found[0.0]).norm()) > 1e-3


@pytest.mark.parametrize("sparse", [True, False])
def test_it_learns(sparse):
    model = task(0.01) if sparse else dense_twin(task())
    algorithm = ppo(model)
    before, _ = episodes(algorithm, NAME, 20, 4, seed=1000)
    algorithm.learn(3072)
    returns, states = episodes(algorithm, NAME, 20, 4, seed=1000)
    assert np.mean(before) < 8
    assert np.mean(returns) > 9.3  # of 10; 5 by chance
    assert states.shape == (200, 2)
    assert bool(algorithm.policy.aux_losses) == sparse


def test_a_saved_policy_says_the_same(tmp_path):
    algorithm = ppo(task()).learn(256)
    algorithm.save(tmp_path / "policy.zip")
    again = PPO.load(tmp_path / "policy.zip", device="cpu")
    states = torch.as_tensor(np.random.default_rng(0).normal(size=(7, 2)), dtype=torch.float32)
    with torch.no_grad():
        first, second = (one.policy.eval().run(states).answers for one in (algorithm, again))
        value = again.policy.predict_values(states)
        scaled = again.policy.model(
            {"state": {"numbers": states / 3.0, "categories": torch.zeros(7, 0).long()}}
        )
    for name in ("act", "worth"):
        torch.testing.assert_close(first[name], second[name])
        torch.testing.assert_close(scaled.answers[name], second[name])
    torch.testing.assert_close(value, 5.0 * second["worth"][:, None])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stems": {"state": {"kind": "fields", "n_numbers": 3}}}, r"must be one of kind fields with n_numbers 2"),
        ({"heads": {"act": {"kind": "policy"}}}, r"must hold exactly one of kind value"),
        ({"heads": {"act": {"kind": "policy", "actions": ["a", "b", "c"]}, "worth": {"kind": "value"}}},
         r"actions must be as many as the actions of the environment \(2\)"),
    ],
)  # fmt: skip
def test_a_model_that_does_not_fit_the_environment_is_refused(change, message):
    with pytest.raises(ConfigError, match=message):
        ppo(task(**change))


def test_other_spaces_are_refused():
    with pytest.raises(ConfigError, match="action_space must be Discrete"):
        TaskPolicy(SignOfTheFirst.observation_space, spaces.Box(-1, 1, (1,)), lambda _: 1e-3, task=task())
    with pytest.raises(ConfigError, match="observation_space must be a Box of one axis"):
        TaskPolicy(spaces.Discrete(4), spaces.Discrete(2), lambda _: 1e-3, task=task())


SMALL = ("data.options.steps=512", "data.options.ppo.n_steps=32", "data.options.episodes=4", "model.d_model=16",
         "model.moe.d_expert=16", "model.moe.n_experts=4")  # fmt: skip


def test_the_recipe_compares_four_policies_at_equal_steps_and_keeps_its_rows(tmp_path, monkeypatch):
    overrides = ("data.options.steps=2048", *SMALL[1:])
    result = run_recipe("control", variant="cartpole", out=tmp_path, short=True, overrides=overrides)
    rows = result["rows"]
    assert set(rows) == {control.MLP, control.MLP_DEFAULT, control.DENSE, control.SPARSE}
    for name, (row,) in rows.items():
        assert row["steps"] == 2048, name
        assert 8 <= row["scores"]["mean return"] <= 500
        assert ("max violation" in row["scores"]) == (name == control.SPARSE)
    assert rows["MoE"][0]["total"] > rows["dense twin"][0]["active"] >= rows["MoE"][0]["active"]
    assert result["table"]["columns"][:2] == ["model", "mean return"]
    assert "environment steps" in result["note"]

    monkeypatch.setattr(control, "learn", None)  # nothing is trained again
    again = run_recipe("control", variant="cartpole", out=tmp_path, short=True, overrides=overrides)
    assert again["rows"] == json.loads(json.dumps(rows))
    with pytest.raises(TypeError):
        run_recipe(
            "control",
            variant="cartpole",
            out=tmp_path,
            short=True,
            overrides=[*overrides, "model.n_layers=2"],
        )


def test_the_run_that_is_left_acts_as_the_policy_did(tmp_path, monkeypatch):
    learned = []
    learn = control.learn
    monkeypatch.setattr(
        control, "learn", lambda *args, **more: learned.append(learn(*args, **more)) or learned[0]
    )
    done = CliRunner().invoke(
        cli, ["train", "recipe:control:acrobot", f"runs_dir={tmp_path}", "--quiet", "--json", *SMALL]
    )
    assert done.exit_code == 0, done.output
    final = json.loads(done.stdout)
    assert final["final"]["step"] == 512
    assert [line["kind"] for line in read_metrics(f"{final['folder']}/metrics.jsonl")] == ["train"] * 2 + [
        "validation"
    ]

    _, states = episodes(learned[0].algorithm, "Acrobot-v1", 1, 1, seed=5)
    states = states[:20]
    names = load_recipe("control").config("acrobot").inputs["state"].numbers
    lines = [",".join(names), *(",".join(map(repr, map(float, row))) for row in states)]
    (tmp_path / "seen.csv").write_text("\n".join(lines))
    actions, _ = learned[0].algorithm.predict(states, deterministic=True)
    with torch.no_grad():
        values = learned[0].algorithm.policy.predict_values(torch.as_tensor(states))[:, 0]
    for said, action, value in zip(
        answers_to(final["folder"], str(tmp_path / "seen.csv")), actions, values, strict=True
    ):
        assert said["answers"]["action"]["prediction"] == ["clockwise", "none", "counterclockwise"][action]
        assert said["answers"]["value"]["prediction"] == pytest.approx(float(value), rel=1e-3, abs=1e-3)
        assert said["experts"]


def test_logged_actions_take_the_place_of_an_environment(tmp_path, monkeypatch):
    monkeypatch.setattr(control, "learn", None)
    rng = np.random.default_rng(0)
    names = load_recipe("control").config("cartpole").inputs["state"].numbers
    states = rng.normal(size=(80, 4))
    lines = [",".join([*names, "action", "return"])]
    lines += [",".join([*map(str, row), "right" if row[2] > 0 else "left", str(row[0])]) for row in states]
    (tmp_path / "log.csv").write_text("\n".join(lines))
    arguments = ["recipe:control", f"data.path={tmp_path / 'log.csv'}", f"runs_dir={tmp_path}"]
    done = CliRunner().invoke(cli, ["validate", *arguments])
    assert done.exit_code == 0, done.output
    done = CliRunner().invoke(cli, ["train", *arguments, "train.steps=5", "--quiet", "--json"])
    assert done.exit_code == 0, done.output
    folder = json.loads(done.stdout)["folder"]
    said = answers_to(folder, str(tmp_path / "log.csv"))
    assert {one["answers"]["action"]["prediction"] for one in said} <= {"left", "right"}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.options.steps=1000", "data.options.steps must be a multiple of environments"),
        ("data.options.ppo.batch_size=300", "data.options.ppo.batch_size must divide environments"),
        ("data.options.ppo.epochs=3", "data.options.ppo.epochs is not a known key: did you mean 'n_epochs'"),
        ("data.options.scales=[1.0]", r"data.options.scales must be as many as inputs.state.numbers \(4\)"),
        ("data.options.environment=CartPol-v7", "environment 'CartPol-v7' cannot be made"),
    ],
)  # fmt: skip
def test_wrong_options_are_named(tmp_path, override, message):
    config = load_recipe("control").config(
        "cartpole", short=True, overrides=[override, f"runs_dir={tmp_path}"]
    )
    with pytest.raises(ConfigError, match=message):
        control.train(config, quiet=True)
