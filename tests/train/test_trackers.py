"""The metrics file, which is the truth, and the adapters, which may fail without harm."""

import errno
import json
import math
import os
import sys
import time
import types
import warnings

import numpy as np
import pytest
import torch

from moekit.config.errors import ConfigError, DataError, MissingExtraError
from moekit.train.trackers import MetricsLog, TensorBoardTracker, WandbTracker, make_trackers, read_metrics


@pytest.fixture
def path(tmp_path):
    return tmp_path / "run" / "metrics.jsonl"


def write(path, steps, **arguments):
    with MetricsLog(path, **arguments) as log:
        for step in steps:
            log.log(step, {"loss": step / 3})


def steps(path):
    return [line["step"] for line in read_metrics(path)]


def strict(line):
    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    return json.loads(line, parse_constant=refuse)


def test_lines_are_strict_json_with_step_time_and_kind(path):
    with MetricsLog(path) as log:
        log.log(
            1, {"loss": 0.1 + 0.2, "tokens": 4096, "note": "中文\nline", "load": [0.5, 0.5], "best": None}
        )
        log.log(1, {"bits_per_byte/code": 2.0}, kind="validation")
    first, second = (strict(line) for line in path.read_text().splitlines())
    assert first.pop("time") <= second.pop("time")
    assert first == {"step": 1, "kind": "train", "loss": 0.1 + 0.2, "tokens": 4096, "note": "中文\nline",
                     "load": [0.5, 0.5], "best": None}  # fmt: skip
    assert second == {"step": 1, "kind": "validation", "bits_per_byte/code": 2.0}


def test_non_finite_numbers_are_null_and_named_and_come_back(path):
    metrics = {
        "loss": math.nan,
        "largest": math.inf,
        "bits/code": -math.inf,
        "a~b": math.nan,
        "load": [0.5, math.nan, [math.inf]],
        "nested": {"x/y": math.nan, "fine": 1.0},
    }
    with MetricsLog(path) as log:
        log.log(7, metrics)
        log.log(8, {"loss": 1.0})
    line, fine = (strict(text) for text in path.read_text().splitlines())
    assert line["loss"] is None
    assert line["load"] == [0.5, None, [None]]
    assert line["non_finite"] == {
        "loss": "NaN",
        "largest": "Infinity",
        "bits~1code": "-Infinity",
        "a~0b": "NaN",
        "load/1": "NaN",
        "load/2/0": "Infinity",
        "nested/x~1y": "NaN",
    }
    assert "non_finite" not in fine
    back, _ = read_metrics(path)
    assert math.isnan(back["loss"])
    assert math.isnan(back["a~b"])
    assert (back["largest"], back["bits/code"]) == (math.inf, -math.inf)
    assert math.isnan(back["load"][1])
    assert back["load"][2] == [math.inf]
    assert math.isnan(back["nested"]["x/y"])
    assert "non_finite" not in back


def test_tensors_and_arrays(path):
    with MetricsLog(path) as log:
        log.log(1, {"a": torch.tensor(1.5), "b": torch.tensor([1, 2]), "c": np.float32(0.25),
                    "d": np.float64("nan"), "e": np.array([[True]]), "g": (1, 2),
                    "f": torch.tensor(math.inf, dtype=torch.bfloat16)})  # fmt: skip
    line = strict(path.read_text())
    assert [line[name] for name in "abcdefg"] == [1.5, [1, 2], 0.25, None, [[True]], None, [1, 2]]
    assert line["non_finite"] == {"d": "NaN", "f": "Infinity"}


@pytest.mark.parametrize(
    ("metrics", "message"),
    [
        ({"step": 3}, "metric 'step' is written by the log itself"),
        ({"kind": "x"}, "metric 'kind' is written by the log itself"),
        ({"nested": {"deep": [object()]}}, "metric nested/deep/0 must be a number, text, .*got object"),
    ],
)
def test_what_cannot_be_logged_is_refused_and_leaves_no_line(path, metrics, message):
    with MetricsLog(path) as log:
        with pytest.raises(ConfigError, match=message):
            log.log(1, metrics)
        log.log(2, {"loss": 1.0})
    assert steps(path) == [2]


def test_every_line_is_there_at_once(path):
    log = MetricsLog(path)
    for step in range(3):
        log.log(step, {"loss": 1.0})
        assert steps(path) == list(range(step + 1))
    log.close()
    log.close()
    with pytest.raises(DataError, match="was closed"):
        log.log(4, {})


def test_a_last_line_torn_at_any_byte_is_cut_off(path):
    write(path, [1, 2, 3])
    whole = path.read_bytes()
    start = whole[:-1].rindex(b"\n") + 1
    for end in range(start, len(whole)):
        path.write_bytes(whole[:end])
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert (
                steps(path) == [1, 2] or end == len(whole) - 1
            )  # all but the line feed: readable, yet repaired
        write(path, [3, 4])
        assert steps(path) == [1, 2, 3, 4]
        assert path.read_bytes().startswith(whole[:start])


def test_resume_takes_back_the_lines_of_later_steps(path):
    write(path, [10, 20, 30, 40])
    path.write_bytes(path.read_bytes() + b'{"step": 50, "ti')
    inode = path.stat().st_ino
    write(path, [30, 40, 50], resume_step=20)
    assert steps(path) == [10, 20, 30, 40, 50]
    assert path.stat().st_ino == inode  # cut in place, so that a program following the file stays with it
    write(path, [], resume_step=50)
    assert steps(path) == [10, 20, 30, 40, 50]
    write(path, [1], resume_step=0)
    assert steps(path) == [1]


def test_resume_where_later_steps_stand_in_the_middle(path):
    write(path, [10, 20, 30])
    write(path, [15])
    write(path, [], resume_step=20)
    assert steps(path) == [10, 20, 15]
    assert [entry.name for entry in path.parent.iterdir()] == ["metrics.jsonl"]


def test_a_broken_line_in_the_middle_is_reported(path):
    write(path, [1])
    with path.open("ab") as file:
        file.write(b'{"step": 2\n[]\n{"step": "x", "kind": "train"}\n')
    write(path, [3])
    with pytest.warns(UserWarning, match="3 lines are not metrics"):
        assert steps(path) == [1, 3]
    with pytest.raises(DataError, match=r"cannot be read from .*none"):
        read_metrics(path.with_name("none"))


def test_reading_one_kind(path):
    with MetricsLog(path) as log:
        log.log(1, {"loss": 1.0})
        log.log(1, {"loss": 2.0}, kind="validation")
    assert [line["loss"] for line in read_metrics(path, "validation")] == [2.0]


def test_disk_full_in_the_middle_of_a_line(path, monkeypatch):
    with MetricsLog(path) as log:
        log.log(1, {"loss": 1.0})
        real, n_calls = os.write, 0

        def full(file, data):
            nonlocal n_calls
            n_calls += 1
            if n_calls == 2:
                raise OSError(errno.ENOSPC, "No space left on device")
            return real(file, data[:5])

        with monkeypatch.context() as patch:
            patch.setattr(os, "write", full)
            with pytest.raises(DataError, match=r"cannot be written to .*metrics\.jsonl: No space left"):
                log.log(2, {"loss": 1.0})
        log.log(3, {"loss": 1.0})  # space came back: no torn line in between
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert steps(path) == [1, 3]


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "run").write_text("")
    with pytest.raises(DataError, match="cannot be written"):
        MetricsLog(tmp_path / "run" / "metrics.jsonl")


# --- adapters


@pytest.mark.parametrize(("name", "module"), [("tensorboard", "torch.utils.tensorboard"), ("wandb", "wandb")])
def test_a_missing_extra_names_the_command(tmp_path, monkeypatch, name, module):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingExtraError, match=rf"'{name}'.*pip install 'moekit\[{name}\]'") as caught:
        make_trackers([name], tmp_path, "run", {})
    assert caught.value.exit_code == 6


def test_a_folder_named_wandb_is_not_the_package(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", types.ModuleType("wandb"))  # what Python makes of such a folder
    with pytest.raises(MissingExtraError, match="pip install"):
        WandbTracker(tmp_path, "run", {})


def test_no_trackers_unless_asked_and_unknown_ones_are_named(tmp_path):
    assert make_trackers([], tmp_path, "run", {}) == []
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(
        ConfigError, match=r"train\.trackers: 'tensorbord' is unknown: did you mean 'tensorboard'"
    ):
        make_trackers(["tensorbord"], tmp_path, "run", {})


class FakeWandb(types.ModuleType):
    """Stands for the package where it is not installed; the real one is tried below."""

    class Error(Exception):
        pass

    def __init__(self, fail_at=None):
        super().__init__("wandb")
        self.errors = types.SimpleNamespace(Error=self.Error)
        self.calls, self.fail_at = [], fail_at

    def Settings(self, **settings):
        return settings

    def init(self, **arguments):
        if self.fail_at == "init":
            raise self.Error("No API key configured.")
        self.calls.append(("init", arguments))
        return self

    def define_metric(self, name, step_metric=None):
        self.calls.append(("define", name, step_metric))

    def log(self, values):
        if self.fail_at == "log":
            raise ConnectionError("network gone")
        self.calls.append(("log", values))

    def finish(self):
        self.calls.append(("finish",))


def test_wandb_gets_scalars_over_our_step_and_resumes_under_its_id(tmp_path, monkeypatch):
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    for _ in range(2):
        (tracker,) = make_trackers(["wandb"], tmp_path / "run", "name", {"train": {"steps": 3}})
        tracker.log(
            10, {"loss": torch.tensor(2.0), "bad": math.nan, "load": [1, 2], "note": "text", "ok": True}
        )
        tracker.close()
    inits = [call[1] for call in fake.calls if call[0] == "init"]
    assert inits[0]["id"] == inits[1]["id"]
    assert inits[0]["resume"] == "allow"
    assert inits[0]["dir"] == str(tmp_path / "run")
    assert inits[0]["config"] == {"train": {"steps": 3}}
    assert ("define", "*", "step") in fake.calls
    logged = next(call[1] for call in fake.calls if call[0] == "log")
    assert math.isnan(logged.pop("bad"))
    assert logged == {"loss": 2.0, "ok": 1.0, "step": 10}


def test_wandb_without_login_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", FakeWandb(fail_at="init"))
    with pytest.raises(ConfigError, match=r"No API key configured\. Run `wandb login`.*WANDB_MODE=offline"):
        make_trackers(["wandb"], tmp_path, "run", {})


def test_a_tracker_that_fails_later_warns_once_and_is_off(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", FakeWandb(fail_at="log"))
    (tracker,) = make_trackers(["wandb"], tmp_path, "run", {})
    with pytest.warns(UserWarning, match=r"tracker 'wandb' failed and is off.*network gone"):
        tracker.log(1, {"loss": 1.0})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tracker.log(2, {"loss": 1.0})
        tracker.close()


def test_tensorboard_for_real(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for resume, steps_ in ((None, (10, 20, 30)), (20, (30, 40))):
        (tracker,) = make_trackers(["tensorboard"], tmp_path, "run", {}, resume_step=resume)
        for step in steps_:
            tracker.log(step, {"loss": step / (1 if resume is None else 2), "load": [1.0]})
        tracker.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert events.Tags()["scalars"] == ["loss"]
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [
        (10, 10),
        (20, 20),
        (30, 15),
        (40, 20),
    ]
    assert TensorBoardTracker(tmp_path / "second").close() is None


def test_wandb_offline_for_real(tmp_path, monkeypatch):
    pytest.importorskip("wandb.sdk")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    (tracker,) = make_trackers(["wandb"], tmp_path, "run", {"train": {"steps": 3}})
    tracker.log(10, {"unlikely_name": 2.5})
    tracker.close()
    (file,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    deadline = time.monotonic() + 20  # a process of W&B's own writes the file
    while b"unlikely_name" not in file.read_bytes():
        assert time.monotonic() < deadline
        time.sleep(0.1)
