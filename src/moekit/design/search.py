"""The search: trials of Optuna until time or trials are spent, by one process or several, resumable at any moment.

Two things are to become small: the figure (turned so that less is better) and the cost (active parameters of a design,
examples of a setting). The sampler is the multi-objective tree-structured Parzen estimator (Ozaki et al. 2022), not
NSGA-II: short searches have some dozens of trials, in which a population of fifty sees two generations. Optuna's
pruners know one objective alone, so that successive halving is `moekit.design.trial.falls_behind`.
"""

from __future__ import annotations

import multiprocessing
import signal
import statistics
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Literal

import torch

import moekit
from moekit.config.errors import Interrupted
from moekit.design.budget import DESIGN_LIMITS, TUNE_LIMITS, parse_budget
from moekit.design.hyper import TuneSpace
from moekit.design.space import Choice, DesignSpace, Space
from moekit.design.study import (
    Clock,
    alone,
    begin,
    design_id,
    give_back,
    intervals_of,
    open_study,
    release_lost,
    require_optuna,
    who,
)
from moekit.design.subject import Bench, Say, Subject
from moekit.design.trial import falls_behind, latency_of, run_trial
from moekit.train.material import TaskMaterial
from moekit.train.stop import Stop

TRIALS = 40
# trials before the sampler looks at any, the default and the ideas among them
STARTUP = 10
# of one choice that is drawn again and again
MOST_SEEDS = 3
# of the time, what the finals may keep from the search
MOST_FOR_FINALS = 0.6


@dataclass(frozen=True)
class Plan:
    """How a search is done.

    Attributes: kind: of what; budget: its text; effort: share of a whole run that a trial trains; trials: at most; None
        for as many as the time holds, or 40 without a time; seed: of the sampler, and first one of trials; finalists:
        trained again with `repeats` further seeds before one is chosen; seeds: of the finals.
    """

    kind: Literal["design", "tune"] = "design"
    budget: str = ""
    effort: float = 0.5
    trials: int | None = None
    seed: int = 0
    finalists: int = 4
    repeats: int = 2
    seeds: int = 3

    @property
    def time(self) -> float | None:
        return self.limits.time

    @property
    def limits(self) -> Any:
        return parse_budget(self.budget, DESIGN_LIMITS if self.kind == "design" else TUNE_LIMITS)

    @property
    def most_trials(self) -> int | None:
        return TRIALS if self.trials is None and self.time is None else self.trials


def stopped(stop: Stop, folder: Path) -> Interrupted:
    """The error of a search that was interrupted."""
    return stop.interrupted(
        f"stopped; {folder} holds all that was done. Go on with the same command, or look at it: "
        f"moekit design --report {folder}"
    )


@dataclass
class Search:
    """One process at work on a search."""

    subject: Subject
    plan: Plan
    folder: Path
    bench: Bench
    space: Space
    study: Any
    clock: Clock
    say: Say
    stop: Stop

    @classmethod
    def open(cls, subject: Subject, plan: Plan, folder: Path, say: Say, stop: Stop) -> Search:
        """Errors: those of the budget, the data and the space; `ConfigError` where the folder holds another search."""
        require_optuna()
        began, limits = time.time(), plan.limits  # a budget that is wrong is said before any data is read
        bench = Bench.open(subject, None)
        space = space_of(plan, bench)
        begin(folder, settings_of(subject, plan, space))
        study = open_study(folder)
        with alone(folder, "queue") as first:
            if first and not study.get_trials(deepcopy=False):
                study.enqueue_trial({}, user_attrs={"default": True})
                for idea in space.ideas():
                    study.enqueue_trial(idea)
            if first:
                release_lost(study)
        clock = Clock(limits.time, [*intervals_of(study, folder), (began, time.time())])
        return cls(subject, plan, folder, bench, space, study, clock, say, stop)

    def trials(self, workers: int = 1) -> None:
        """Trials until there are enough, or the time that is not kept for the finals is over."""
        while not self.stop() and self._goes_on(workers):
            if not self._one_trial():
                return

    def _goes_on(self, workers: int) -> bool:
        most, states = self.plan.most_trials, require_optuna().trial.TrialState
        known = self.study.get_trials(deepcopy=False)
        done = [trial for trial in known if trial.state in (states.COMPLETE, states.PRUNED)]
        running = [trial for trial in known if trial.state == states.RUNNING]
        if most is not None and len(done) + len(running) >= most:
            return False
        seconds = [trial.user_attrs["seconds"] for trial in done if "seconds" in trial.user_attrs]
        if not seconds or self.clock.limit is None:
            return self.clock.left > 0
        return self.clock.left > self.kept_for_finals(workers) + statistics.fmean(seconds)

    def kept_for_finals(self, workers: int = 1) -> float:
        """Seconds that finalists and finals will take, as far as the trials so far tell."""
        assert self.clock.limit is not None
        trial, whole = self.seconds_of_run()
        need = self.plan.finalists * self.plan.repeats * trial + 2 * self.plan.seeds * whole * 1.1
        return min(need / workers, MOST_FOR_FINALS * self.clock.limit)

    def seconds_of_run(self, name: str | None = None) -> tuple[float, float]:
        """Seconds of a trial that is not given up, and of a whole run: of one design, or of all."""
        complete = require_optuna().trial.TrialState.COMPLETE
        seconds = [
            trial.user_attrs["seconds"]
            for trial in self.study.get_trials(deepcopy=False, states=(complete,))
            if "seconds" in trial.user_attrs and name in (None, trial.user_attrs["id"])
        ]
        typical = statistics.fmean(seconds) if seconds else 0.0
        return typical, typical / self.plan.effort

    def _one_trial(self) -> bool:
        """False where it was stopped."""
        states, others = require_optuna().trial.TrialState, self.study.get_trials(deepcopy=False)
        self.study.sampler = self._sampler(others)
        trial = self.study.ask()
        trial.set_user_attr("who", who())
        choice = self.space.default() if trial.user_attrs.get("default") else self.space.sample(trial)
        name = design_id(choice.changes)
        ended = (states.COMPLETE, states.PRUNED)
        same = [one for one in others if one.user_attrs.get("id") == name and one.state in ended]
        for key, value in {**asdict(choice), "id": name, "seed": self._seed(len(same))}.items():
            trial.set_user_attr(key, value)
        if len(same) >= MOST_SEEDS:  # it is known well enough
            trial.set_user_attr("ended", "known")
            values = [one.values[0] for one in same if one.state == states.COMPLETE]
            if values:
                self.study.tell(trial, [statistics.fmean(values), choice.cost[self.space.axis]])
            else:
                self.study.tell(trial, state=states.PRUNED)
            return True
        if self.space.axis == "active" and self._too_slow(trial, choice):
            trial.set_user_attr("ended", "too slow")
            self.study.tell(trial, state=states.PRUNED)
            return True
        cost, reached = choice.cost[self.space.axis], []

        def gives_up(rung: int, worse: float) -> bool:
            reached.append(worse)
            trial.set_user_attr("rungs", reached)
            at = [
                (one.user_attrs["rungs"][rung], one.user_attrs["cost"][self.space.axis])
                for one in self.study.get_trials(deepcopy=False)
                if one.number != trial.number and len(one.user_attrs.get("rungs", ())) > rung
            ]
            return name != "default" and falls_behind(worse, cost, at)

        outcome = run_trial(
            self.bench, choice.changes, seed=self._seed(len(same)), effort=self.plan.effort, gives_up=gives_up,
            should_stop=lambda: self.stop() or self.clock.left <= 0,
        )  # fmt: skip
        if outcome.ended == "stopped":
            give_back(self.study, self.study.trials[trial.number])
            return False
        trial.set_user_attr("seconds", outcome.seconds)
        trial.set_user_attr("figures", outcome.figures)
        trial.set_user_attr("rung_figures", outcome.rungs)
        trial.set_user_attr("ended", outcome.ended)
        if outcome.ended == "complete":
            value = self.subject.order(outcome.figures)
            self.study.tell(trial, [value, cost])
        else:
            self.study.tell(trial, state=states.PRUNED)
        self._told(trial.number, name, choice, outcome)
        return True

    def _told(self, number: int, name: str, choice: Choice, outcome: Any) -> None:
        figure = outcome.figures.get(self.subject.key)
        shown = f"{self.subject.key} {figure:.4f}" if outcome.ended == "complete" else outcome.ended
        picked = ", ".join(f"{key} {value}" for key, value in choice.features.items())
        self.say(f"trial {number} {name}: {shown} in {outcome.seconds:.0f} s ({picked})")

    def _seed(self, place: int) -> int:
        return int(self.subject.config.train.seed) + self.plan.seed + place

    def _sampler(self, trials: list[Any]) -> Any:
        """A new one for each trial, seeded by what is known: an interrupted search draws what it would have drawn."""
        optuna = require_optuna()
        states = optuna.trial.TrialState
        done = sum(trial.state in (states.COMPLETE, states.PRUNED) for trial in trials)
        running = sum(trial.state == states.RUNNING for trial in trials)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return optuna.samplers.TPESampler(
                seed=1000 * self.plan.seed + 100_000 * running + done, multivariate=True, group=True,
                n_startup_trials=STARTUP, constant_liar=True,
            )  # fmt: skip

    def _too_slow(self, trial: Any, choice: Choice) -> bool:
        limit = self.space.limits.get("latency")
        seconds = latency_of(self.bench, choice.changes)
        trial.set_user_attr("cost", {**choice.cost, "latency": seconds})
        return limit is not None and seconds > limit and bool(choice.changes)


def space_of(plan: Plan, bench: Bench) -> Space:
    """What the plan draws from."""
    if plan.kind == "design":
        return DesignSpace(bench.config, plan.limits)
    n_train = len(bench.material.train) if isinstance(bench.material, TaskMaterial) else None
    return TuneSpace(bench.config, plan.limits, n_train)


def settings_of(subject: Subject, plan: Plan, space: Space) -> dict[str, Any]:
    """What a folder keeps of a search; another search in the same folder is known by them."""
    return {
        "kind": plan.kind, "title": subject.title, "key": subject.key, "higher": subject.higher, "axis": space.axis,
        "config": {**subject.config.to_dict(), "runs_dir": ""}, "limits": space.limits,
        "default": asdict(space.default()), "effort": plan.effort, "seed": plan.seed, "finalists": plan.finalists,
        "repeats": plan.repeats, "seeds": plan.seeds, "time": plan.time, "trials": plan.trials,
        "moekit_version": moekit.__version__, "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }  # fmt: skip


@contextmanager
def helpers(subject: Subject, plan: Plan, folder: Path, workers: int) -> Iterator[None]:
    """Further processes on the same search while the block runs; waited for at its end, stopped on an error."""
    context = multiprocessing.get_context("spawn")
    threads = max(1, torch.get_num_threads() // workers)
    began = [
        context.Process(target=_help, args=(subject, plan, folder, workers, threads))
        for _ in range(workers - 1)
    ]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    for process in began:
        process.start()
    try:
        yield
    except BaseException:
        for process in began:
            process.terminate()
        raise
    finally:
        for process in began:
            process.join()
        torch.set_num_threads(before)


def _help(subject: Subject, plan: Plan, folder: Path, workers: int, threads: int) -> None:
    torch.set_num_threads(threads)
    stop = Stop()
    with stop.listening():
        Search.open(subject, plan, folder, lambda message: print(message, flush=True), stop).trials(workers)


def search(
    subject: Subject, plan: Plan, folder: Path, *, workers: int = 1, say: Say = lambda message: None
) -> dict[str, Any]:
    """Search, choose, compare and report: everything of `moekit design` and `moekit tune`; returns the report.

    Called again with the same folder it goes on where it was. Several processes may be at work on one folder.

    Args:
        subject: what is searched for.
        plan: how.
        folder: of the search.
        workers: processes at once.
        say: called with lines of text.

    Errors: `Interrupted` after SIGINT or SIGTERM, the report written; those of data, space and training.
    """
    from moekit.design.finals import hold_finals
    from moekit.design.report import write_report

    folder, stop = Path(folder), Stop()
    with stop.listening():
        one = Search.open(subject, plan, folder, say, stop)
        with helpers(subject, plan, folder, workers):
            one.trials(workers)
        if not stop():
            _wait_for_others(one)
            with alone(folder, "closing") as first:
                if first and not stop():
                    try:
                        hold_finals(one, workers)
                    except Interrupted as error:
                        stop.signal = signal.SIGINT if error.exit_code == 130 else signal.SIGTERM
    report = write_report(folder, subject.config)
    if stop():
        raise stopped(stop, folder)
    return report


def _wait_for_others(one: Search) -> None:
    """Until no other process of this machine has a trial under way, or the time is over."""
    running, here = require_optuna().trial.TrialState.RUNNING, who()
    while not one.stop() and one.clock.left > 0:
        release_lost(one.study)
        owners = [
            trial.user_attrs.get("who") for trial in one.study.get_trials(deepcopy=False, states=(running,))
        ]
        # whether a process of another machine still lives cannot be known
        if not [
            owner for owner in owners if owner is None or (owner["host"] == here["host"] and owner != here)
        ]:
            return
        time.sleep(0.5)
