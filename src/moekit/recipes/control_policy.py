"""A task's model as the policy of stable-baselines3, and the calls of that library that the recipe of control makes.

    PPO(TaskPolicy, env, policy_kwargs={"task": config})

Needs the extra `control`.

Shape legend: B states, N numbers of an observation, A actions.

Errors: `MissingExtraError` where stable-baselines3 is not installed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moekit.config.errors import ConfigError, MissingExtraError, require
from moekit.config.task import FieldStemConfig, PolicyHeadConfig, TaskModelConfig, ValueHeadConfig
from moekit.layers.balancing import weighted_aux_loss
from moekit.models.policy_heads import ValueHead
from moekit.models.task_model import TaskModel, TaskOutput

try:
    import gymnasium
    from gymnasium import spaces
    from stable_baselines3 import PPO
    from stable_baselines3.common.callbacks import BaseCallback
    from stable_baselines3.common.distributions import CategoricalDistribution, Distribution
    from stable_baselines3.common.env_util import make_vec_env
    from stable_baselines3.common.evaluation import evaluate_policy
    from stable_baselines3.common.policies import ActorCriticPolicy
except ImportError as error:
    raise MissingExtraError(
        f"control needs {error.name}, which is not installed: pip install 'moekit[control]'"
    ) from error


class _Added(torch.autograd.Function):
    """The identity on its first argument, in whose backward pass the second one, a scalar loss, gets gradient 1."""

    @staticmethod
    def forward(context: Any, values: Tensor, loss: Tensor) -> Tensor:
        return values.view_as(values)

    @staticmethod
    def backward(context: Any, *gradients: Any) -> Any:
        (gradient,) = gradients
        return gradient, gradient.new_ones(())


def with_loss(values: Tensor, loss: Tensor) -> Tensor:
    """`values`, such that training on anything computed of them trains on that plus `loss`.

    For a loop of somebody else's, which computes its loss of what a model gives and knows of no other loss. Whatever
    the loop multiplies its own loss by, `loss` counts once per backward pass.

    >>> x = torch.tensor([2.0], requires_grad=True)
    >>> with_loss(3 * x, (x ** 2).sum()).sum().backward()
    >>> float(x.grad)    # 3 of the values and 2 x of the loss
    7.0
    """
    added: Tensor = _Added.apply(values, loss)
    return added


class TaskPolicy(ActorCriticPolicy):
    """Actor and critic of stable-baselines3's on-policy algorithms (PPO, A2C) from one `TaskModel`.

    The balancing losses of its sparse layers reach the optimiser by `with_loss`, weighted by `task.moe.balance`: the
    algorithms compute their losses themselves, and of what the policy gives them. What was added last stands in
    `aux_losses`, detached.

    Args:
        observation_space: numbers, one axis.
        action_space: discrete.
        lr_schedule: as the algorithm gives it.
        task: the model, whose one stem is of kind fields with as many numbers as an observation has, and whose heads
            are one of kind policy, with as many actions as the space, and one of kind value.
        means, deviations: by which observations are standardised, `[N]` each; 0 and 1 where None.
        more: of `ActorCriticPolicy`, such as optimizer_class and optimizer_kwargs; it builds no networks of its own.

    Errors: `ConfigError` where spaces and model do not fit each other.
    """

    def __init__(
        self,
        observation_space: Any,
        action_space: Any,
        lr_schedule: Any,
        *,
        task: TaskModelConfig | Mapping[str, Any],
        means: Any = None,
        deviations: Any = None,
        **more: Any,
    ) -> None:
        self.task = task if isinstance(task, TaskModelConfig) else TaskModelConfig.from_dict(dict(task))
        self.stem, self.policy_head, self.value_head = _parts(self.task, observation_space, action_space)
        n = observation_space.shape[0]
        self.scale = [
            [fill] * n if given is None else [float(value) for value in given]
            for given, fill in ((means, 0.0), (deviations, 1.0))
        ]
        for name, values in zip(("means", "deviations"), self.scale, strict=True):
            require(len(values) == n, name, values, f"must be as many as the numbers of an observation ({n})")
        self.aux_losses: dict[str, float] = {}
        super().__init__(observation_space, action_space, lr_schedule, **more)

    def _build(self, lr_schedule: Any) -> None:
        self.model = TaskModel(self.task)
        self.register_buffer("scales", torch.tensor(self.scale))
        optimizer: Any = self.optimizer_class
        self.optimizer = optimizer(self.parameters(), lr=lr_schedule(1), **self.optimizer_kwargs)

    def _get_constructor_parameters(self) -> dict[str, Any]:
        found: dict[str, Any] = super()._get_constructor_parameters()
        return {
            **found,
            "task": self.task.to_dict(),
            "means": self.scale[0],
            "deviations": self.scale[1],
        }

    def run(self, observations: Tensor) -> TaskOutput:
        """The model's output on observations `[B, N]`."""
        scales: Any = self.scales  # [2, N]
        numbers: Tensor = (observations.float() - scales[0]) / scales[1]
        categories = torch.zeros(len(numbers), 0, dtype=torch.long, device=numbers.device)
        found: TaskOutput = self.model({self.stem: {"numbers": numbers, "categories": categories}})
        return found

    def forward(self, obs: Any, deterministic: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """Actions `[B]`, values `[B, 1]` and log(probabilities) `[B]`."""
        out = self.run(obs)
        distribution = self._distribution(out)
        actions = distribution.get_actions(deterministic=deterministic)
        return actions, self._values(out), distribution.log_prob(actions)

    def evaluate_actions(self, obs: Any, actions: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Values `[B, 1]`, log(probabilities) `[B]`, with the balancing losses beneath them, and entropies `[B]`."""
        out = self.run(obs)
        distribution = self._distribution(out)
        log_probs = distribution.log_prob(actions)
        if out.aux_losses and self.task.moe is not None:
            self.aux_losses = {name: float(value.detach()) for name, value in out.aux_losses.items()}
            weighted = weighted_aux_loss(out.aux_losses, self.task.moe.balance)
            if isinstance(weighted, Tensor):
                log_probs = with_loss(log_probs, weighted)
        return self._values(out), log_probs, distribution.entropy()

    def get_distribution(self, obs: Any) -> Distribution:
        """The distribution of the actions."""
        return self._distribution(self.run(obs))

    def predict_values(self, obs: Any) -> Tensor:
        """`[B, 1]`."""
        return self._values(self.run(obs))

    def _distribution(self, out: TaskOutput) -> Distribution:
        # one of its own each time: the base class would keep the latest on the policy
        actions: Any = self.action_space
        distribution = CategoricalDistribution(int(actions.n))
        return distribution.proba_distribution(action_logits=out.answers[self.policy_head])

    def _values(self, out: TaskOutput) -> Tensor:
        head = self.model.heads[self.value_head]
        assert isinstance(head, ValueHead)
        return head.in_units(out.answers[self.value_head])[:, None]


def _parts(task: TaskModelConfig, observations: Any, actions: Any) -> tuple[str, str, str]:
    """The names of the stem, the policy head and the value head. Errors: `ConfigError` where something does not fit."""
    if not isinstance(actions, spaces.Discrete):
        raise ConfigError(f"action_space must be Discrete; got {actions}")
    if not isinstance(observations, spaces.Box) or len(observations.shape) != 1:
        raise ConfigError(
            f"observation_space must be a Box of one axis; got {observations}. Wrap the environment, for example with "
            "gymnasium.wrappers.FlattenObservation"
        )
    n = observations.shape[0]
    (stem, *others) = task.stems.items() or [("", None)]
    fits = (
        isinstance(stem[1], FieldStemConfig) and not others and stem[1].n_numbers == n and not stem[1].sizes
    )
    require(fits, "task.stems", {name: part.to_dict() for name, part in task.stems.items()},
            f"must be one of kind fields with n_numbers {n} and no categories")  # fmt: skip
    found = []
    for kind in (PolicyHeadConfig, ValueHeadConfig):
        named = [name for name, head in task.heads.items() if isinstance(head, kind)]
        word = kind.model_fields["kind"].default
        require(len(named) == 1, "task.heads", list(task.heads), f"must hold exactly one of kind {word}")
        found.append(named[0])
    policy = task.heads[found[0]]
    assert isinstance(policy, PolicyHeadConfig)
    require(len(policy.actions) == actions.n, f"task.heads.{found[0]}.actions", policy.actions,
            f"must be as many as the actions of the environment ({actions.n})")  # fmt: skip
    return stem[0], found[0], found[1]


def algorithm(policy: Any, environment: str, n_environments: int, seed: int, **settings: Any) -> Any:
    """PPO with environments that are seeded from `seed` on.

    Errors: `ConfigError` for an environment that gymnasium does not know.
    """
    try:
        environments = make_vec_env(environment, n_environments, seed=seed)
    except gymnasium.error.Error as error:
        raise ConfigError(f"data.options.environment {environment!r} cannot be made: {error}") from None
    return PPO(policy, environments, seed=seed, device="cpu", **settings)


def episodes(
    algorithm: Any, environment: str, n: int, n_environments: int, seed: int
) -> tuple[list[float], np.ndarray]:
    """Returns of `n` episodes by the most probable actions, and the observations `[steps, N]` in them."""
    seen: list[np.ndarray] = []

    def keep(local: dict[str, Any], _: dict[str, Any]) -> None:
        seen.append(local["observations"][local["i"]])

    environments = make_vec_env(environment, min(n, n_environments), seed=seed)
    returns, _ = evaluate_policy(
        algorithm, environments, n_eval_episodes=n, callback=keep, return_episode_rewards=True
    )
    return [float(value) for value in np.asarray(returns)], np.stack(seen)


class Progress(BaseCallback):
    """After each rollout: what is known of the training so far, by short names.

    Args:
        log: called with the steps of the environments and the figures.
    """

    def __init__(self, log: Callable[[int, dict[str, Any]], None] | None) -> None:
        super().__init__()
        self.log = log

    def _on_step(self) -> bool:
        return True

    def _on_rollout_end(self) -> None:
        if self.log is None:
            return
        finished = [episode["r"] for episode in self.model.ep_info_buffer or ()]
        known = self.model.logger.name_to_value
        names = ("value_loss", "policy_gradient_loss", "entropy_loss", "explained_variance")
        self.log(
            int(self.num_timesteps),
            {
                **({"return": float(np.mean(finished))} if finished else {}),
                **{name: float(known[f"train/{name}"]) for name in names if f"train/{name}" in known},
                **getattr(self.model.policy, "aux_losses", {}),
            },
        )
