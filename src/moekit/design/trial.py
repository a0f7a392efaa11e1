"""One trial: a choice trained for a share of a whole run, measured at its rungs, given up where it falls behind."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from moekit.config.errors import NonFiniteError, UntaughtRouterWarning
from moekit.design.subject import LOSS, Bench, Changes, changed
from moekit.models import build_model
from moekit.train.loop import Trainer
from moekit.train.material import AnyRunConfig

# at these shares of a trial its figure is compared with that of others
RUNGS = (0.25, 0.5)
# with fewer others at a rung, nothing is given up there
FEWEST = 4


@dataclass
class Outcome:
    """What became of a trial.

    Attributes: figures: of the whole trial on validation examples; empty where it was not finished. rungs: the figure
        at each rung it reached. ended: `complete`, `pruned`, `stopped` from outside, or `broken` (a loss that is not
        finite, or more memory than there is). steps, seconds.
    """

    ended: str = "complete"
    figures: dict[str, float] = field(default_factory=dict)
    rungs: list[float] = field(default_factory=list)
    steps: int = 0
    seconds: float = 0.0


def trial_config(bench: Bench, changes: Changes, *, seed: int, effort: float = 1.0) -> AnyRunConfig:
    """The configuration of a trial: steps and warm-up shortened by `effort`, nothing written meanwhile.

    The learning rate follows its whole schedule in the shorter run.
    """
    config = bench.fitted(changed(bench.subject.config, changes))
    train = config.train
    steps = max(1, math.ceil(train.steps * effort))
    warmup = min(round(train.schedule.warmup_steps * effort), steps)
    return config.replace(
        train=train.replace(
            steps=steps,
            seed=seed,
            record=None,
            trackers=(),
            schedule=train.schedule.replace(warmup_steps=warmup),
        )
    )


def run_trial(
    bench: Bench, changes: Changes, *, seed: int, effort: float = 1.0,
    gives_up: Callable[[int, float], bool] = lambda rung, worse: False,
    should_stop: Callable[[], bool] = lambda: False,
) -> Outcome:  # fmt: skip
    """Train a choice and measure it.

    With `effort` 1 the model is bit for bit that of `train_run` with the same configuration and seed.

    Args:
        bench: the data.
        changes: of the default configuration; none for the default itself.
        seed: of weights, order and noise.
        effort: share of the steps of a whole run.
        gives_up: asked at each rung with what trials are ordered by (`Subject.order`) there.
        should_stop: asked before every step.
    """
    began = time.perf_counter()
    config = trial_config(bench, changes, seed=seed, effort=effort)
    material = bench.material_of(config)
    steps = config.train.steps
    rungs = (
        {max(1, math.ceil(share * steps)): place for place, share in enumerate(RUNGS)} if steps >= 8 else {}
    )
    outcome = Outcome()
    loader = material.loader()
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UntaughtRouterWarning)
        model = build_model(config.model)
    material.begin(model)
    trainer = Trainer(model, config.train, loader, should_stop)
    try:
        for _ in trainer.steps():
            if trainer.step in rungs and trainer.step < steps:
                figures = bench.score(config, model)
                outcome.rungs.append(figures[bench.subject.key])
                if gives_up(rungs[trainer.step], bench.subject.order(figures)):
                    outcome.ended = "pruned"
                    break
        else:
            if trainer.step < steps:
                outcome.ended = "stopped"
            else:
                outcome.figures = bench.score(config, model)
                finite = all(map(math.isfinite, (outcome.figures[LOSS], outcome.figures[bench.subject.key])))
                outcome.ended = "complete" if finite else "broken"
    except (NonFiniteError, torch.OutOfMemoryError):
        outcome.ended = "broken"
    outcome.steps, outcome.seconds = trainer.step, time.perf_counter() - began
    return outcome


def latency_of(bench: Bench, changes: Changes) -> float:
    """Seconds of a forward pass of a choice, before it is trained."""
    config = trial_config(bench, changes, seed=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UntaughtRouterWarning)
        return bench.latency(build_model(config.model))


def falls_behind(own: float, cost: float, others: list[tuple[float, float]]) -> bool:
    """Whether a trial is given up at a rung: it is in the worse half of those that cost no more than it does.

    Successive halving without waiting (ASHA, Li et al. 2020, arXiv 1810.05934) that leaves a front of quality against
    cost alone: a small design is never given up because of a larger one.

    Args:
        own: its figure, less is better.
        cost: its cost.
        others: (figure, cost) of other trials at this rung.

    >>> others = [(1.0, 10), (2.0, 10), (3.0, 10), (0.1, 99)]
    >>> falls_behind(2.5, 10, others), falls_behind(1.5, 10, others), falls_behind(2.5, 9, others)
    (True, False, False)
    """
    alike = [figure for figure, spent in others if spent <= cost * 1.001]
    if len(alike) + 1 < FEWEST:
        return False
    return sum(figure < own for figure in alike) >= math.ceil((len(alike) + 1) / 2)
