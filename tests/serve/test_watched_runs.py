"""What the dashboard reads of runs: only what is new, whatever state their files are in."""

from __future__ import annotations

import json
import math
import random
import time

import pytest
from run_folders import CONFIG, age, forming_record, line, make_run, write

from moekit.serve.dashboard.routing import RoutingFigures, figures
from moekit.serve.dashboard.run import WatchedRun
from moekit.serve.dashboard.series import Series
from moekit.serve.dashboard.tail import Tail
from moekit.serve.dashboard.watch import Watch


def test_tail_gives_whole_lines_once(tmp_path):
    path = tmp_path / "metrics.jsonl"
    tail = Tail(path)
    assert tail.read() == ([], False), "no file yet"
    path.write_bytes(b"one\ntw")
    assert tail.read() == ([b"one"], False)
    assert tail.read() == ([], False)
    with open(path, "ab") as file:
        file.write(b"o\nthree\n")
    assert tail.read() == ([b"two", b"three"], False)
    path.unlink()
    assert tail.read() == ([], True)
    assert tail.restarts == 1


@pytest.mark.parametrize("shorter", [True, False], ids=["shorter", "as long again"])
def test_tail_begins_anew_where_the_file_was_cut_back(tmp_path, shorter):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b"a 1\nb 1\nc 1\n")
    tail = Tail(path)
    tail.read()
    path.write_bytes(b"a 1\nb 2\n" if shorter else b"a 1\nb 2\nc 2\nd 2\n")
    lines, fresh = tail.read()
    assert fresh
    assert lines[:2] == [b"a 1", b"b 2"]


def test_tail_reads_a_large_file_in_pieces_and_no_byte_twice(tmp_path):
    path = tmp_path / "metrics.jsonl"
    draw = random.Random(0)
    lines = ["x" * draw.randrange(1, 60) for _ in range(500)]
    path.write_text("\n".join(lines) + "\n")
    tail, found, looks = Tail(path, block=256), [], 0
    while True:
        new, fresh = tail.read()
        assert not fresh
        if not new:
            break
        found += [one.decode() for one in new]
        looks += 1
        assert tail.behind == (len(found) < len(lines))
    assert found == lines
    assert looks > 20


def test_series_stays_small_and_keeps_the_mean():
    series = Series(most=50)
    for step in range(1, 10_001):
        series.add({"step": step, "loss": float(step % 7)})
        assert len(series) <= 100
    columns = series.since(0)
    assert columns["step"][-1] + len(series._open) == 10_000
    weight = series.stride
    total = weight * math.fsum(columns["loss"]) + math.fsum(row["loss"] for row in series._open)
    assert total == pytest.approx(sum(step % 7 for step in range(1, 10_001)), rel=1e-4)
    assert series.since(len(series)) == {}


def test_series_puts_null_where_a_row_has_nothing():
    series = Series(most=10)
    series.add({"step": 1, "loss": 1.0})
    series.add({"step": 2, "loss": None, "lr": 0.5})
    assert series.since(0) == {"step": [1, 2], "loss": [1.0, None], "lr": [None, 0.5]}
    assert series.since(1) == {"step": [2], "loss": [None], "lr": [0.5]}


def test_states(tmp_path):
    run = WatchedRun(make_run(tmp_path / "a"))
    run.refresh()
    assert run.summary()["state"] == "training", "its configuration is new"
    write(run.folder, line(10), line(20), line(20, "validation", validation_loss=2.0))
    run.refresh()
    found = run.summary()
    assert (found["state"], found["step"], found["steps"]) == ("training", 20, 100)
    assert found["loss"] == pytest.approx(4.8)
    assert found["bits_per_byte"] == pytest.approx(2.0 / math.log(2) / 2.0)
    assert found["seconds_left"] == pytest.approx(8.0), "80 steps of a tenth of a second"
    assert found["tokens_per_second"] == 640
    age(run.folder, 50)
    assert run.summary()["state"] == "training"
    age(run.folder, 300)
    found = run.summary()
    assert found["state"] == "stalled"
    assert found["words"] == "nothing written for 5 minutes; no checkpoint yet"
    (run.folder / "checkpoints" / "step-00000020").mkdir(parents=True)
    found = run.summary()
    assert found["state"] == "interrupted"
    assert "moekit resume" in found["words"]
    (run.folder / "final.json").write_text(json.dumps({"step": 100}))
    run.refresh()
    assert run.summary()["state"] == "finished"
    (run.folder / "final.json").unlink()
    write(run.folder, line(30))
    run.refresh()
    assert run.summary()["state"] == "training", "it was resumed with more steps"


def test_a_slow_run_is_given_time(tmp_path):
    run = WatchedRun(make_run(tmp_path / "a"))
    write(run.folder, *(line(step, time=100.0 * step) for step in range(1, 6)))
    run.refresh()
    age(run.folder, 500)
    assert run.summary()["state"] == "training", "it writes every 100 seconds"
    age(run.folder, 1_100)
    assert run.summary()["state"] == "stalled"


def test_broken_lines_and_files_are_passed_over(tmp_path):
    folder = tmp_path / "a"
    folder.mkdir()
    write(
        folder,
        "{\n",
        "[]\n",
        '{"step": "x", "kind": "train"}\n',
        "\x00\n",
        '{"kind": "train"}\n',
        line(10),
        '{"step": 1',
    )
    (folder / "config.yaml").write_text("train: {steps: [}")
    (folder / "run.json").write_text('{"total')
    run = WatchedRun(folder)
    run.refresh()
    assert run.summary()["step"] == 10
    assert run.summary()["steps"] is None
    assert len(run.series["train"]) == 1
    (folder / "config.yaml").write_text(CONFIG)
    run.refresh()
    assert run.summary()["steps"] == 100


def test_points_are_sent_once_and_again_after_a_resume(tmp_path):
    run = WatchedRun(make_run(tmp_path / "a"))
    write(run.folder, line(10), line(20))
    run.refresh()
    first = run.since({}, None)
    assert first["series"]["train"]["columns"]["step"] == [10, 20]
    assert first["series"]["layers"]["columns"]["dead_experts"] == [[0, 1], [0, 1]]
    assert first["series"]["loads"]["columns"]["load"][0] == [0.1, 0.2, 0.3, 0.4]
    write(run.folder, line(30))
    run.refresh()
    have = {name: len(part["columns"]["step"]) for name, part in first["series"].items() if part["columns"]}
    then = run.since(have, first["generation"])
    assert then["series"]["train"] == {"from": 2, "last": None, "columns": {
        "step": [30], "time": [1003.0], "tokens": [1920], "seconds": [3.0], "loss": [4.7], "tokens_per_second": [640.0],
    }}  # fmt: skip
    (run.folder / "metrics.jsonl").write_text(line(10) + line(20, loss=9.0))
    run.refresh()
    again = run.since({**have, "train": 3}, then["generation"])
    assert again["series"]["train"]["from"] == 0
    assert again["series"]["train"]["columns"]["loss"] == [4.9, 9.0]
    assert run.summary()["step"] == 20


def test_runs_come_and_go(tmp_path):
    watch = Watch([tmp_path / "runs"])
    assert watch.runs()["runs"] == []
    one = make_run(tmp_path / "runs" / "a")
    (tmp_path / "runs" / "no run").mkdir()
    watch._looked = 0
    assert [run["name"] for run in watch.runs()["runs"]] == ["a"]
    assert watch.folder(watch.runs()["runs"][0]["id"]) == one
    make_run(tmp_path / "runs" / "b", CONFIG.replace("3e-3", "1e-3"))
    watch._looked = 0
    found = watch.runs()["runs"]
    ids = [next(run["id"] for run in found if run["name"] == name) for name in "ab"]
    assert watch.differences(ids) == [{"key": "train.optimizer.lr", "values": [0.003, 0.001]}]
    for path in one.iterdir():
        path.unlink()
    one.rmdir()
    watch._looked = 0
    assert [run["name"] for run in watch.runs()["runs"]] == ["b"]
    assert watch.since(ids[0], {}, None) is None


def test_runs_of_one_name_are_told_apart(tmp_path):
    for parent in ("old", "new"):
        make_run(tmp_path / parent / "a")
    watch = Watch([tmp_path / "old", tmp_path / "new"])
    assert {run["name"] for run in watch.runs()["runs"]} == {"old/a", "new/a"}


def test_ten_thousand_lines_are_read_once(tmp_path):
    run = make_run(tmp_path / "runs" / "a")
    write(run, *(line(step) for step in range(1, 10_001)))
    watch = Watch([tmp_path / "runs"])
    began = time.monotonic()
    while watch.runs()["behind"]:
        watch._looked = 0
        assert time.monotonic() - began < 60
    (found,) = watch.runs()["runs"]
    assert found["step"] == 10_000
    assert found["lengths"]["train"] <= 1_500
    offset = watch._runs[run]._tail._offset
    assert offset == (run / "metrics.jsonl").stat().st_size
    watch._looked = 0
    began = time.process_time()
    watch.runs()
    assert time.process_time() - began < 0.05, "nothing new: nothing is read"


def test_figures_of_a_record():
    (layer,) = figures(forming_record())["layers"]
    history = layer["history"]
    assert len(history["step"]) == 100
    assert history["step"][-1] == 300
    assert history["load"][0] == [1.0, 1.0, 1.0]
    assert history["load"][-1] == [2.0, 1.0, 0.0]
    assert history["load_entropy"][0] == 1.0
    assert history["dead_experts"][-1] == 1
    assert history["max_violation"][-1] == 1.0
    measures = layer["measures"]
    assert measures["step"] == [10, 20]
    assert measures["group"][1] == pytest.approx(1.0, abs=1e-6)
    assert measures["group"][0] < 0.1
    assert measures["chance"][1] < 0.2, "far below what the router reached"
    assert measures["saturation"]["share"][1] == 1.0


def test_a_record_is_measured_once_until_it_changes(tmp_path, monkeypatch):
    known = RoutingFigures()
    assert known.of(tmp_path) is None
    forming_record().save(tmp_path)
    first = known.of(tmp_path)
    assert first is not None
    monkeypatch.setattr("moekit.serve.dashboard.routing.figures", lambda record: {"new": True})
    assert known.of(tmp_path) is first
    (tmp_path / "routing.safetensors").write_bytes(b"half")
    text = (tmp_path / "routing.json").read_text()
    (tmp_path / "routing.json").write_text(text + "\n")
    assert known.of(tmp_path) is first, "what does not fit together is tried again later"
    forming_record().save(tmp_path)
    assert known.of(tmp_path) == {"new": True}
