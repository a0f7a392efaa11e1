"""Searches end to end on a tiny task: resumed, shared, interrupted, out of time."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("optuna")

from moekit.config.errors import CheckpointError, ConfigError, Interrupted
from moekit.config.loading import load_any_config, save_run_config
from moekit.design.report import trials_of
from moekit.design.search import Plan, Search, Stop, search
from moekit.design.study import JOURNAL, Clock, begin, give_back, open_study, read_rows, release_lost

PLAN = Plan(trials=4, effort=1.0, finalists=1, repeats=1, seeds=1)


def done(folder: Path):
    """What was tried, in order, with what came of it; not when."""
    kept = ("id", "features", "seed", "worse", "ended", "rungs")
    return [{key: trial[key] for key in kept} for trial in trials_of(open_study(folder), "loss")]


class After:
    """A search's `say` that asks it to stop after some trials."""

    def __init__(self, n: int) -> None:
        self.n, self.stop = n, None

    def __call__(self, text: str) -> None:
        self.n -= text.startswith("trial")
        if self.n == 0 and self.stop is not None:
            self.stop.signal = 2


def test_a_resumed_search_is_the_one_that_was_never_interrupted(by_loss, tmp_path, monkeypatch):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    plan = replace(PLAN, trials=8)
    monkeypatch.setattr("moekit.design.search.STARTUP", 4)  # three of the trials are the sampler's own
    Search.open(by_loss, plan, whole, print, Stop()).trials()
    for n in (1, 5, 7):
        say, stop = After(n - len(done(parts)) if parts.exists() else n), Stop()
        say.stop = stop
        Search.open(by_loss, plan, parts, say, stop).trials()
        assert len(done(parts)) == n
    # and in the midst of a trial, as Ctrl-C comes
    stop = Stop()
    one = Search.open(by_loss, plan, parts, print, stop)
    stop.signal = 2
    assert not one._one_trial()
    Search.open(by_loss, plan, parts, print, Stop()).trials()
    assert done(parts) == done(whole)
    assert len(done(whole)) == 8
    assert done(whole)[0]["id"] == "default"


def test_some_trials_are_given_up_and_the_default_never(by_loss, tmp_path, monkeypatch):
    monkeypatch.setattr("moekit.design.search.falls_behind", lambda own, cost, others: len(others) >= 2)
    one = Search.open(by_loss, PLAN, tmp_path / "s", print, Stop())
    one.trials()
    ended = [trial["ended"] for trial in done(tmp_path / "s")]
    assert ended[0] == "complete"
    assert ended[2:] == ["pruned"] * 2
    assert all(len(trial["rungs"]) == 1 for trial in done(tmp_path / "s")[2:])


def test_a_whole_search(subject, tmp_path):
    pytest.importorskip("sklearn")
    folder, said = tmp_path / "s", []
    report = search(subject, PLAN, folder, say=said.append)
    assert [row["kind"] for row in read_rows(folder)].count("final") == 2
    assert {row["seed"] for row in read_rows(folder) if row["kind"] == "final"} == {1000}
    assert not {trial["seed"] for trial in done(folder)} & {1000}
    pair = report["finals"]["figures"]["test label.accuracy"]
    assert pair["difference"] == pytest.approx(pair["chosen"] - pair["default"])
    better = report["finals"]["figures"]["validation label.accuracy"]["difference"] > 0
    assert report["best"]["id"] == (report["finals"]["chosen"] if better else "default")
    chosen = next(one for one in report["designs"] if one["id"] == report["finals"]["chosen"])
    assert chosen["cost"]["active"] <= report["default"]["cost"]["active"]
    # again: nothing is trained, and the answer is the same
    before = [path.stat().st_mtime_ns for path in sorted((folder / "rows").iterdir())]
    again = search(subject, PLAN, folder, say=lambda text: pytest.fail(text))
    assert [path.stat().st_mtime_ns for path in sorted((folder / "rows").iterdir())] == before
    assert again["finals"] == report["finals"]


def test_two_processes_on_one_search(by_loss, tmp_path):
    from moekit.design.search import helpers

    plan, folder = replace(PLAN, trials=4), tmp_path / "s"
    one = Search.open(by_loss, plan, folder, print, Stop())
    with helpers(by_loss, plan, folder, 2):
        time.sleep(0)
        one.trials(2)
    found = done(folder)
    assert len(found) == 4
    assert [trial["id"] for trial in found].count("default") == 1


def test_interrupted_searches_leave_a_report(by_loss, tmp_path, monkeypatch):
    said = After(2)
    monkeypatch.setattr("moekit.design.search.Stop", lambda: setattr(said, "stop", Stop()) or said.stop)
    with pytest.raises(Interrupted, match="same command") as error:
        search(by_loss, PLAN, tmp_path / "s", say=said)
    assert error.value.exit_code == 130
    report = json.loads((tmp_path / "s" / "report.json").read_text())
    assert len(report["trials"]) == 2
    assert (tmp_path / "s" / "best.yaml").is_file()


def test_time_is_kept(by_loss, tmp_path):
    plan, began = replace(PLAN, budget="time=3s", trials=None, seeds=2), time.monotonic()
    report = search(by_loss, plan, tmp_path / "s")
    assert time.monotonic() - began < 12  # a busy machine; what was begun is ended
    assert 0 < len(report["trials"]) < 500
    assert report["seconds"] < 8
    # more time goes on
    more = search(by_loss, replace(plan, budget="time=5s"), tmp_path / "s")
    assert more["seconds"] > report["seconds"]


def test_a_time_that_holds_no_trial(by_loss, tmp_path):
    report = search(by_loss, replace(PLAN, budget="time=1us"), tmp_path / "s")
    assert report["trials"] == []
    assert report["verdict"] == "No trial is finished yet."


def test_another_search_in_the_folder_is_refused(by_loss, tmp_path):
    Search.open(by_loss, PLAN, tmp_path / "s", print, Stop())
    with pytest.raises(ConfigError, match=r"its effort is 1\.0, not 0\.25.*--out"):
        Search.open(by_loss, replace(PLAN, effort=0.25), tmp_path / "s", print, Stop())
    Search.open(by_loss, replace(PLAN, trials=9), tmp_path / "s", print, Stop())


def test_a_line_that_was_half_written_is_cut_off(by_loss, tmp_path):
    folder = tmp_path / "s"
    Search.open(by_loss, replace(PLAN, trials=2), folder, print, Stop()).trials()
    before = done(folder)
    with open(folder / JOURNAL, "ab") as file:
        file.write(b'{"op_code": 8, "trial_id": 1, "user_')
    Search.open(by_loss, replace(PLAN, trials=3), folder, print, Stop()).trials()
    assert done(folder)[:2] == before
    assert len(done(folder)) == 3


def test_the_trial_of_a_killed_process_is_tried_again(by_loss, tmp_path):
    folder = tmp_path / "s"
    one = Search.open(by_loss, PLAN, folder, print, Stop())
    lost = one.study.ask()
    lost.set_user_attr("who", {**__import__("moekit.design.study", fromlist=["who"]).who(), "pid": 2**22 - 1})
    running = one.study.ask()  # of a process that lives: this one
    running.set_user_attr("who", __import__("moekit.design.study", fromlist=["who"]).who())
    release_lost(one.study)
    states = [trial.state.name for trial in one.study.trials]
    assert states[:2] == ["FAIL", "RUNNING"]
    assert one.study.trials[-1].user_attrs == {"default": True, "again": 0}
    give_back(one.study, one.study.trials[1])
    one.trials()
    assert [trial["id"] for trial in done(folder)].count("default") == 1


def test_finals_that_are_interrupted_go_on(by_loss, tmp_path, monkeypatch):
    from moekit.design import finals

    real, calls = finals.train_run, []

    def cut(config, **more):
        calls.append(config.name)
        if len(calls) == 1:  # a checkpoint is written, as for SIGINT in the midst of a run
            half = config.replace(train=config.train.replace(steps=6))
            folder = real(half, **more).folder
            whole = load_any_config(folder / "config.yaml", ["train.steps=12"])
            save_run_config(whole, folder / "config.yaml")
            error = Interrupted("stopped")
            error.exit_code = 130
            raise error
        return real(config, **more)

    monkeypatch.setattr(finals, "train_run", cut)
    with pytest.raises(Interrupted) as error:
        search(by_loss, replace(PLAN, trials=2), tmp_path / "s")
    assert error.value.exit_code == 130
    assert (tmp_path / "s" / "report.html").is_file()
    report = search(by_loss, replace(PLAN, trials=2), tmp_path / "s")
    assert report["finals"]["seeds"] == 1
    assert calls[0] == "default-1000"
    assert "default-1000" not in calls[1:]  # resumed, not begun again


def test_a_choice_that_is_drawn_again_gets_another_seed(by_loss, tmp_path):
    one = Search.open(by_loss, PLAN, tmp_path / "s", print, Stop())
    for _ in range(4):
        one.study.enqueue_trial(one.space.ideas()[0])
    one.plan = replace(PLAN, trials=9)
    one.trials()
    found = done(tmp_path / "s")
    seeds = [trial["seed"] for trial in found if trial["id"] == found[1]["id"]]
    assert seeds == [0, 1, 2, 3, 4]
    assert [trial["ended"] for trial in found if trial["id"] == found[1]["id"]][3:] == ["known", "known"]


def test_a_latency_that_nothing_keeps(by_loss, tmp_path):
    plan = replace(PLAN, budget="latency=1us", trials=3)
    report = search(by_loss, plan, tmp_path / "s")
    assert [trial["ended"] for trial in report["trials"]] == ["complete", "too slow", "too slow"]
    assert report["front"] == []
    assert report["best"] is None
    assert "latency" in report["verdict"]


def test_the_clock_counts_what_is_done_at_once_once():
    now = time.time()
    clock = Clock(100.0, [(now - 50, now - 40), (now - 45, now - 30)])
    assert clock.left == pytest.approx(80.0, abs=0.5)
    assert Clock(None).left == float("inf")


def test_a_folder_that_is_no_search(tmp_path):
    from moekit.design.report import write_report

    with pytest.raises(CheckpointError, match=r"no search.*design\.json"):
        write_report(tmp_path)
    begin(tmp_path, {"kind": "design", "time": None, "trials": 3})
    assert json.loads((tmp_path / "design.json").read_text())["trials"] == 3
