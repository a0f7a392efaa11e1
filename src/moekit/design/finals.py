"""The end of a search: the best few again with other seeds, then the chosen one against the default, both from scratch.

Among many trials the best figure is partly luck. So the finalists are trained again with seeds they have not had,
the best mean is chosen, and what is reported are whole runs with seeds that nothing was chosen by. The test
examples are looked at here, once, for these two alone.
"""

from __future__ import annotations

import time
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from moekit.config.atomic import write_json
from moekit.design.front import Design, designs_of
from moekit.design.search import Search, stopped
from moekit.design.study import ROWS, RUNS, read_rows
from moekit.design.subject import Bench, Changes, Subject, changed
from moekit.design.trial import run_trial
from moekit.train.run import load_run, load_task_run, resume_run, train_run
from moekit.train.stop import Stop

# seeds that no trial has had
FRESH = 1000


@dataclass(frozen=True)
class Job:
    """One row to make. `kind`: `again`, a trial with another seed, or `final`, a whole run."""

    kind: str
    id: str
    changes: Changes
    seed: int
    effort: float
    folder: Path

    @property
    def path(self) -> Path:
        return self.folder / ROWS / f"{self.kind}-{self.id}-{self.seed}.json"


def hold_finals(search: Search, workers: int = 1) -> None:
    """Everything behind the trials, as far as the time goes; what is there already stays."""
    plan, folder = search.plan, search.folder
    known = {design.id: design for design in known_designs(search)}
    # by trials alone: a finalist that disappoints does not make room for another one
    few = finalists(known_designs(search, rows=False), search.space.limits, plan.finalists)
    if "default" not in known:
        search.say(
            "the time was over before the default had been trained; raise budget.time or lower --effort"
        )
        return
    again = [
        Job("again", design.id, design.changes, search._seed(place), plan.effort, folder)
        for place in range(1, plan.repeats + 1)
        for design in few
        if search._seed(place) not in known[design.id].values
    ]
    _do(search, again, workers)
    best = chosen(known_designs(search), search.space.limits, plan.repeats)
    pair = [known["default"], *([best] if best is not None else [])]
    finals = [
        Job("final", design.id, design.changes, FRESH + plan.seed + place, 1.0, folder)
        for place in range(plan.seeds)
        for design in pair
    ]
    _do(search, finals, workers)


def known_designs(search: Search, rows: bool = True) -> list[Design]:
    """Every design with a finished trial, with its values; those of `rows` as well."""
    from moekit.design.report import trials_of

    again = [row for row in read_rows(search.folder) if row["kind"] == "again"] if rows else []
    return designs_of(trials_of(search.study, search.subject.key), again)


def finalists(designs: list[Design], limits: dict[str, float], n: int) -> list[Design]:
    """The default and the best `n` others within the limits."""
    others = [design for design in designs if design.id != "default" and design.within(limits)]
    found = sorted(others, key=lambda design: design.mean)[:n]
    return [design for design in designs if design.id == "default"] + found


def chosen(designs: list[Design], limits: dict[str, float], repeats: int) -> Design | None:
    """The best mean of those that were repeated; the default is none of them, it is compared with anyway.

    A design with one seed cannot win against one whose mean is over several: its luck has not been tried.
    """
    others = [design for design in designs if design.id != "default" and design.within(limits)]
    if not others:
        return None
    enough = min(1 + repeats, max(len(design.values) for design in others))
    return min((one for one in others if len(one.values) >= enough), key=lambda one: one.mean)


def _do(search: Search, jobs: list[Job], workers: int) -> None:
    """Make the rows that are missing, in order, as far as the time is likely to hold them."""
    jobs = [job for job in jobs if not job.path.is_file()]

    def left(job: Job) -> bool:
        trial, whole = search.seconds_of_run(job.id)
        return not search.stop() and search.clock.left > 1.1 * (trial if job.kind == "again" else whole)

    if workers == 1 or len(jobs) < 2:
        for job in jobs:
            if not left(job):
                return
            _keep(search, make_row(search.bench, job), job)
        return
    threads = max(1, torch.get_num_threads() // workers)
    with ProcessPoolExecutor(
        workers, mp_context=get_context("spawn"), initializer=_begin, initargs=(search.subject, threads)
    ) as pool:
        waiting: dict[Future[dict[str, Any]], Job] = {}
        while jobs or waiting:
            while jobs and len(waiting) < workers and left(jobs[0]):
                waiting[pool.submit(_make, jobs[0])] = jobs.pop(0)
            if not waiting:
                return
            done, _ = wait(waiting, return_when=FIRST_COMPLETED)
            for future in done:
                _keep(search, future.result(), waiting.pop(future))


def _keep(search: Search, row: dict[str, Any], job: Job) -> None:
    job.path.parent.mkdir(parents=True, exist_ok=True)
    write_json(job.path, row)
    figures = {part: row[part].get(search.subject.key) for part in ("validation", "test") if row.get(part)}
    said = ", ".join(f"{part} {value:.4f}" for part, value in figures.items() if value is not None)
    search.say(f"{job.kind} {job.id}, seed {job.seed}: {search.subject.key}: {said}")


def make_row(bench: Bench, job: Job) -> dict[str, Any]:
    """Train as the job says and measure.

    Errors: `Interrupted` where it was stopped; a whole run goes on from there the next time.
    """
    began = time.time()
    found: dict[str, Any] = {"kind": job.kind, "id": job.id, "seed": job.seed, "began": began}
    if job.kind == "again":
        stop = Stop()
        with stop.listening():
            outcome = run_trial(bench, job.changes, seed=job.seed, effort=job.effort, should_stop=stop)
        if outcome.ended == "stopped":
            raise stopped(stop, job.folder)
        found["validation"] = outcome.figures
    else:
        folder = _trained(bench, job)
        task = bench.config.to_dict().get("inputs") is not None
        loaded: Any = load_task_run(folder) if task else load_run(folder)
        found |= {
            "folder": str(folder),
            "validation": bench.score(loaded.config, loaded.model),
            "test": bench.score(loaded.config, loaded.model, "test"),
        }
    whole = bench.subject.key in found["validation"]
    found["figure"] = found["validation"].get(bench.subject.key)
    found["worse"] = bench.subject.order(found["validation"]) if whole else None
    return {**found, "ended": time.time()}


def _trained(bench: Bench, job: Job) -> Path:
    name, runs = f"{job.id}-{job.seed}", job.folder / RUNS
    config = changed(bench.subject.config, job.changes)
    config = config.replace(name=name, runs_dir=str(runs), train=config.train.replace(seed=job.seed))
    begun = runs / f"{name}-1"
    if (begun / "config.yaml").is_file() and any((begun / "checkpoints").glob("step-*")):
        return resume_run(begun, quiet=True).folder
    return train_run(config, data=bench.data, quiet=True).folder


_bench: Bench | None = None


def _begin(subject: Subject, threads: int) -> None:
    global _bench
    torch.set_num_threads(threads)
    _bench = Bench.open(subject)


def _make(job: Job) -> dict[str, Any]:
    assert _bench is not None
    return make_row(_bench, job)
