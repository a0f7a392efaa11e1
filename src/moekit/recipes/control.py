"""Control: policies trained by PPO of stable-baselines3 in environments of gymnasium, at equal environment steps.

    environments ─► PPO: roll out, estimate advantages ─► TaskPolicy: stem fields ─► backbone ─► heads policy, value

Both libraries belong to the extra `control`. What the algorithm needs lies in `data.options` of the run's
configuration, see `ControlOptions`, so that `data.options.steps=20480` changes it as any other key. A finished run is a
run as any other: `moekit predict` answers observations from a file with actions, their probabilities and the experts.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import Field

from moekit import __version__
from moekit.config.atomic import write_json
from moekit.config.base import StrictConfig
from moekit.config.errors import require
from moekit.config.loading import save_run_config
from moekit.config.task import ActionTarget, FieldsInput, ReturnTarget
from moekit.config.task_run import TaskRunConfig
from moekit.data.encoding.actions import ActionEncoder, ReturnEncoder
from moekit.data.encoding.fields import FieldsEncoder
from moekit.data.encoding.whole import Encoding
from moekit.layers.statistics import RoutingStats
from moekit.models.accounting import active_parameters, total_parameters
from moekit.models.twins import dense_twin
from moekit.recipes.rows import Row, kept_row
from moekit.recipes.tasks import Recipe
from moekit.train.checkpoints import save_checkpoint
from moekit.train.run import RunResult, new_run_folder, train_run
from moekit.train.trackers import MetricsLog

Say = Callable[[str], None]
SPARSE, DENSE = "MoE", "dense twin"
# stable-baselines3's own networks: with the settings of PPO that the others have, and with those that it comes with
MLP, MLP_DEFAULT = "MlpPolicy", "MlpPolicy, PPO's defaults"
FIGURE, VIOLATION = "mean return", "max violation"
# seeds of the environments that policies are judged in lie apart from those that they are trained in
JUDGED_FROM, JUDGES = 1_000_000, 10


class PPOOptions(StrictConfig):
    """What PPO is called with; the learning rate may fall to 0 along a straight line."""

    n_steps: int = Field(default=256, ge=2, description="steps of each environment between updates")
    batch_size: int = Field(default=256, ge=2, description="steps in a gradient step")
    n_epochs: int = Field(default=10, ge=1, description="passes over what was rolled out")
    learning_rate: float = Field(default=1e-3, gt=0, description="Adam's, at the beginning")
    decay: bool = Field(default=True, description="the learning rate falls to 0 along a straight line")
    gamma: float = Field(default=0.99, gt=0, le=1, description="discount of later rewards")
    gae_lambda: float = Field(default=0.95, ge=0, le=1, description="of the advantages")
    clip_range: float = Field(default=0.2, gt=0, description="of the ratio of new to old probabilities")
    ent_coef: float = Field(default=0.0, ge=0, description="coefficient of the entropy")
    vf_coef: float = Field(default=0.5, ge=0, description="coefficient of the value's loss")
    max_grad_norm: float = Field(default=0.5, gt=0, description="largest norm of the gradient")

    def keywords(self) -> dict[str, Any]:
        """As the constructor of PPO takes them."""
        found = self.to_dict()
        rate = self.learning_rate
        if found.pop("decay"):
            found["learning_rate"] = lambda remaining: rate * remaining
        return found


class ControlOptions(StrictConfig):
    """`data.options` of a run of control."""

    environment: str = Field(description="registered with gymnasium")
    actions: tuple[str, ...] = Field(
        min_length=2, description="names of the actions, in the order of their numbers"
    )
    scales: tuple[float, ...] = Field(
        description="what each number of an observation is divided by, about its largest"
    )
    return_scale: float = Field(
        default=10.0, gt=0, description="what the value head's number is multiplied by"
    )
    steps: int = Field(
        default=98304, ge=1, description="environment steps to train on, over all environments"
    )
    environments: int = Field(default=8, ge=1, description="environments that run side by side")
    episodes: int = Field(default=100, ge=1, description="episodes that a policy is judged by")
    ppo: PPOOptions = Field(default_factory=PPOOptions)

    @classmethod
    def of(cls, config: TaskRunConfig) -> ControlOptions:
        """Those of a run. Errors: `ConfigError`, naming the field."""
        found = cls.from_dict(config.data.options, "data.options")
        together = found.ppo.n_steps * found.environments
        require(found.steps % together == 0, "data.options.steps", found.steps,
                f"must be a multiple of environments * ppo.n_steps ({together})")  # fmt: skip
        require(together % found.ppo.batch_size == 0, "data.options.ppo.batch_size", found.ppo.batch_size,
                f"must divide environments * ppo.n_steps ({together})")  # fmt: skip
        return found


def encoding_of(config: TaskRunConfig) -> Encoding:
    """The encoders of a run of control; nothing is fitted: scales and names stand in the configuration.

    Errors: `ConfigError` unless there is one input, of kind fields with as many numbers as scales, and there are two
    targets, of kinds action and return.
    """
    options = ControlOptions.of(config)
    inputs, targets = list(config.inputs.items()), list(config.targets.items())
    require(len(inputs) == 1 and isinstance(inputs[0][1], FieldsInput) and not inputs[0][1].categories, "inputs",
            list(config.inputs), "must be one of kind fields, without categories")  # fmt: skip
    kinds = sorted(target.kind for _, target in targets)
    require(
        kinds == ["action", "return"], "targets", kinds, "must be one of kind action and one of kind return"
    )
    name, fields = inputs[0]
    assert isinstance(fields, FieldsInput)
    n = len(fields.numbers)
    require(len(options.scales) == n, "data.options.scales", options.scales,
            f"must be as many as inputs.{name}.numbers ({n})")  # fmt: skip
    found: dict[str, Any] = {}
    for key, target in targets:
        if isinstance(target, ActionTarget):
            found[key] = ActionEncoder(target, options.actions)
        elif isinstance(target, ReturnTarget):
            found[key] = ReturnEncoder(target, 0.0, options.return_scale)
    return Encoding({name: FieldsEncoder(fields, [0.0] * n, options.scales, {})}, found)


@dataclass(frozen=True)
class Learned:
    """A trained algorithm of stable-baselines3, and what it cost.

    Attributes: algorithm; seconds of training; steps of the environments.
    """

    algorithm: Any
    seconds: float
    steps: int


def learn(
    config: TaskRunConfig, kind: str = SPARSE, log: Callable[[int, dict[str, Any]], None] | None = None
) -> Learned:
    """Train a policy.

    Args:
        config: whose model has its stem and heads, unless the policy is stable-baselines3's own.
        kind: whose policy: `MLP` and `MLP_DEFAULT` are stable-baselines3's, the others are the configuration's model.
        log: called after each rollout with the steps so far and what is known of the training.

    Errors: `MissingExtraError` without the extra `control`, `ConfigError` where environment and configuration do not
    fit each other.
    """
    from moekit.recipes.control_policy import Progress, TaskPolicy, algorithm

    options, seed = ControlOptions.of(config), config.train.seed
    if kind == MLP_DEFAULT:
        made = algorithm("MlpPolicy", options.environment, 1, seed)
    elif kind == MLP:
        made = algorithm(
            "MlpPolicy", options.environment, options.environments, seed, **options.ppo.keywords()
        )
    else:
        made = algorithm(
            TaskPolicy, options.environment, options.environments, seed, **options.ppo.keywords(),
            policy_kwargs={"task": config.model, "deviations": options.scales},
        )  # fmt: skip
    began = time.perf_counter()
    with _one_thread():
        made.learn(options.steps, callback=Progress(log))
    return Learned(made, time.perf_counter() - began, int(made.num_timesteps))


@contextmanager
def _one_thread() -> Iterator[None]:
    """Networks this small are fastest on one thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def judge(learned: Learned, config: TaskRunConfig) -> dict[str, Any]:
    """Returns of episodes that the policy never saw, with its most probable actions: mean, deviation, lowest, highest;
    and of sparse models the max violation of the experts' load in those episodes, the mean over the layers."""
    from moekit.recipes.control_policy import TaskPolicy, episodes

    options = ControlOptions.of(config)
    with _one_thread():
        returns, states = episodes(
            learned.algorithm,
            options.environment,
            options.episodes,
            JUDGES,
            JUDGED_FROM + JUDGES * config.train.seed,
        )
    found: dict[str, Any] = {
        FIGURE: float(np.mean(returns)),
        "deviation": float(np.std(returns)),
        "lowest": float(np.min(returns)),
        "highest": float(np.max(returns)),
        "episodes": len(returns),
    }
    policy = learned.algorithm.policy
    if isinstance(policy, TaskPolicy):
        with torch.no_grad(), _one_thread():
            plans = policy.run(torch.as_tensor(states)).routing
        if plans:
            found[VIOLATION] = float(
                np.mean([RoutingStats.from_plan(plan).max_violation() for plan in plans])
            )
    return found


def train(config: TaskRunConfig, *, quiet: bool = False) -> RunResult:
    """Train the model of a configuration in a new folder, judge it, and leave a run that `moekit predict` reads.

    With `data.path`, a file of logged actions, there is no environment: the run is one of the ordinary loop.

    Errors: those of `learn` and `encoding_of`.
    """
    if config.data.path is not None:
        return train_run(config, quiet=quiet)
    encoding = encoding_of(config)
    config = config.replace(model=encoding.fill(config.model))
    import moekit.recipes.control_policy  # noqa: F401  (a missing extra leaves no folder behind)

    folder = new_run_folder(config)
    encoding.save(folder)
    sizes = {
        "total_parameters": total_parameters(config.model),
        "active_parameters": active_parameters(config.model),
    }
    write_json(
        folder / "run.json", {"moekit": __version__, "torch": torch.__version__, "sources": [], **sizes}
    )
    save_run_config(config, folder / "config.yaml")
    options = ControlOptions.of(config)
    with MetricsLog(folder / "metrics.jsonl", resume_step=0) as metrics:

        def log(step: int, values: dict[str, Any]) -> None:
            metrics.log(step, values)
            if not quiet:
                said = ", ".join(f"{name} {value:.4g}" for name, value in values.items())
                print(f"{step:,} of {options.steps:,} steps: {said}", flush=True)

        learned = learn(config, log=log)
        found = judge(learned, config)
        metrics.log(learned.steps, found, "validation")
    tensors = {
        f"model.{name}": tensor for name, tensor in learned.algorithm.policy.model.state_dict().items()
    }
    save_checkpoint(folder / "checkpoints", learned.steps, tensors, {"step": learned.steps}, keep=1)
    final = {"step": learned.steps, "train_seconds": learned.seconds, **found}
    write_json(folder / "final.json", final)
    return RunResult(folder, final)


def run(
    recipe: Recipe, variant: str, seeds: int, out: Path, short: bool, overrides: Sequence[str], say: Say
) -> dict[str, list[Row]]:
    """The rows of the recipe's table: stable-baselines3's policies, the dense twin, the MoE; all at equal steps."""
    config = recipe.config(variant, short=short, overrides=overrides).replace(runs_dir=str(out / "runs"))
    sparse = config.replace(model=encoding_of(config).fill(config.model))
    dense = sparse.replace(name=f"{config.name}-dense", model=dense_twin(sparse.model))
    found: dict[str, list[Row]] = {}
    for seed in range(seeds):
        for kind in (MLP_DEFAULT, MLP, DENSE, SPARSE):
            chosen = dense if kind == DENSE else sparse
            chosen = chosen.replace(train=chosen.train.replace(seed=seed))
            found.setdefault(kind, []).append(_kept(recipe, variant, kind, chosen, out, say))
    return found


def note(recipe: Recipe, variant: str, seeds: int) -> str:
    """Below the table."""
    options = ControlOptions.of(recipe.config(variant))
    over = "one seed" if seeds == 1 else f"mean ± deviation over {seeds} seeds"
    return (
        f"{recipe.about} {options.environment}, {options.steps:,} environment steps for each policy; the mean return "
        f"of {options.episodes} episodes that no policy was trained in, by the most probable actions, {over}. MoE, "
        "dense twin (equal active parameters) and MlpPolicy have the same settings of PPO; MlpPolicy with PPO's "
        "defaults is what stable-baselines3 gives who sets nothing. MlpPolicy is two networks of two layers of 64, one "
        "for the actions and one for the value."
    )


def _kept(recipe: Recipe, variant: str, kind: str, config: TaskRunConfig, out: Path, say: Say) -> Row:
    """A row from its file, where nothing that it depends on has changed; or made and written there."""
    name = "-".join("".join(c if c.isalnum() else " " for c in kind).split())
    path = out / "rows" / f"{recipe.name}-{variant}-{name}-{config.train.seed}.json"

    def said(row: Row) -> None:
        say(
            f"{recipe.name} {variant}: {kind}, seed {config.train.seed}: {FIGURE} {row['scores'][FIGURE]:.1f}; "
            f"{row['seconds']:.0f} s"
        )

    return kept_row(path, [kind, config.replace(runs_dir="").to_dict()], lambda: _row(kind, config), said)


def _row(kind: str, config: TaskRunConfig) -> Row:
    if kind in (MLP, MLP_DEFAULT):
        learned = learn(config, kind)
        found = judge(learned, config)
        size = sum(parameter.numel() for parameter in learned.algorithm.policy.parameters())
        steps, seconds, more = learned.steps, learned.seconds, {"active": size, "total": size}
    else:
        trained = train(config, quiet=True)
        found = dict(trained.final)
        steps, seconds = found["step"], found["train_seconds"]
        more = {"active": active_parameters(config.model), "total": total_parameters(config.model)}
        more["folder"] = str(trained.folder)
    scores = {name: found[name] for name in (FIGURE, VIOLATION) if name in found}
    rest = {name: found[name] for name in ("deviation", "lowest", "highest", "episodes")}
    return {"scores": scores, "seconds": seconds, "steps": steps, **more, **rest}
