"""Kill -9 while a checkpoint is saved: what is found afterwards is always one that was written in full.

One test stops a child at every single call to the system that a save makes, and in the middle of every write.
Another lets a child save in a loop and kills it 100 times at random moments.
"""

from __future__ import annotations

import os
import random
import select
import shutil
import signal
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from moekit.train.checkpoints import latest_checkpoint, load_checkpoint, save_checkpoint

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")

CALLS = ("mkdir", "open", "write", "fsync", "close", "rename", "unlink", "rmdir")


def content(version: int):
    generator = torch.Generator().manual_seed(version)
    tensors = {f"layer {i}": torch.randn(1 + 997 * i, generator=generator) for i in range(4)}
    tensors["tied"] = tensors["layer 3"]
    return tensors, {"version": version, "text": "x" * (version % 7) * 100}


def assert_holds(path: Path, version: int) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tensors, state = load_checkpoint(path)
    expected, expected_state = content(version)
    assert state == expected_state
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensors[name], expected[name]) for name in expected)


def in_child(work: Callable[[], None]) -> int:
    """Run `work` in a forked process, which costs milliseconds instead of the seconds of importing torch."""
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", DeprecationWarning
        )  # Python 3.12 warns of threads, which stay unused here
        child = os.fork()
    if child == 0:
        try:
            work()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(1)
    return child


@pytest.fixture
def quick_folder():
    """A folder in memory where there is one: a kill leaves the same files there, and flushing is free."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else None) as folder:
        yield Path(folder)


def watch(act: Callable[[int, str, Callable, tuple], None]) -> None:
    """Call `act(number, name, real, arguments)` before every call that changes the disk."""
    n_calls = 0

    def wrap(name: str, real: Callable):
        def call(*args, **kwargs):
            nonlocal n_calls
            act(n_calls, name, real, args)
            n_calls += 1
            return real(*args, **kwargs)

        return call

    for name in CALLS:
        setattr(os, name, wrap(name, getattr(os, name)))


def kill_at(position: int, half: bool = False) -> None:
    """Make the call with this number the last: stop before it, or after half of what it writes."""

    def act(number, _, real, args):
        if number == position:
            if half:
                real(args[0], bytes(args[1])[: len(args[1]) // 2])
            os.kill(os.getpid(), signal.SIGKILL)

    watch(act)


def calls_of(work: Callable[[], None]) -> list[str]:
    """Names of the calls that change the disk, in order, from a child that runs to its end."""
    receive, send = os.pipe()

    def recorded():
        names: list[str] = []
        write = os.write
        watch(lambda number, name, real, args: names.append(name))
        work()
        write(send, " ".join(names).encode())

    child = in_child(recorded)
    os.close(send)
    with os.fdopen(receive, "rb") as pipe:
        names = pipe.read().decode().split()
    assert os.waitpid(child, 0)[1] == 0
    return names


def save(folder: Path, step: int, version: int, keep: int) -> None:
    save_checkpoint(folder, step, *content(version), keep)


# what lies there, the save that is killed, and the versions that may be found afterwards
SCENES = {
    "the first one": ([], (1, 11, 1), (None, 11)),
    "a further one": ([(1, 1, 2)], (2, 12, 2), (1, 12)),
    "the only one is pruned": ([(1, 1, 1)], (2, 12, 1), (1, 12)),
    "the same step again": ([(1, 1, 1)], (1, 11, 1), (1, 11)),
    "an earlier step": ([(1, 1, 5), (9, 9, 5)], (5, 15, 5), (9, 15)),
}


@pytest.mark.parametrize("scene", SCENES)
def test_kill_at_every_call_to_the_system(quick_folder, scene):
    before, (step, version, keep), allowed = SCENES[scene]
    start = quick_folder / "start"
    start.mkdir()
    for earlier in before:
        save(start, *earlier)

    def killed(folder):
        warnings.simplefilter("ignore")  # about the later step that is set aside
        save(folder, step, version, keep)

    shutil.copytree(start, quick_folder / "dry")
    calls = calls_of(lambda: killed(quick_folder / "dry"))
    assert len(calls) > 20
    places = [
        (i, half) for i, call in enumerate(calls) for half in (False, True) if call == "write" or not half
    ]
    found = []
    for position, half in places:
        folder = quick_folder / f"{position} {half}"
        shutil.copytree(start, folder)
        where = f"{scene}: call {position} ({calls[position]}), half {half}"
        child = in_child(lambda folder=folder, at=position, half=half: (kill_at(at, half), killed(folder)))
        assert os.waitpid(child, 0)[1] == signal.SIGKILL, where

        with warnings.catch_warnings():
            warnings.simplefilter("error")  # nothing damaged is even met: complete, or hidden
            path = latest_checkpoint(folder)
        got = None if path is None else load_checkpoint(path)[1]["version"]
        assert got in allowed, f"{where}: found {got}"
        if path is not None:
            assert_holds(path, got)
        found.append(got)

        # the run goes on: one more save, after which no trace of the killed one is left
        save(folder, 20, 20, keep=1)
        assert_holds(latest_checkpoint(folder), 20)
        left = {entry.name for entry in folder.iterdir() if not entry.name.startswith("abandoned-")}
        assert left == {".lock", "step-00000020"}, where
        shutil.rmtree(folder)
    assert set(found) == set(allowed)
    assert found == sorted(found, key=allowed.index), "once the new one was there it must not vanish again"


def test_kill_again_while_the_traces_of_a_kill_are_cleared(quick_folder):
    """Every call of a save that finds the traces of one killed at its worst moment, between two renames."""
    start = quick_folder / "start"
    save(start, 1, 1, keep=1)
    save(start, 1, 11, keep=1)
    dry = quick_folder / "dry"
    shutil.copytree(start, dry)
    first, second = [
        i for i, call in enumerate(calls_of(lambda: save(dry, 1, 11, keep=1))) if call == "rename"
    ]
    assert second == first + 1
    os.waitpid(in_child(lambda: (kill_at(second), save(start, 1, 21, keep=1))), 0)
    assert len(list(start.glob(".step-00000001.*"))) == 2
    assert_holds(latest_checkpoint(start), 11)

    shutil.rmtree(dry)
    shutil.copytree(start, dry)
    calls = calls_of(lambda: save(dry, 1, 31, keep=1))
    assert len(calls) > 25
    for position in range(len(calls)):
        folder = quick_folder / str(position)
        shutil.copytree(start, folder)
        child = in_child(lambda folder=folder, at=position: (kill_at(at), save(folder, 1, 31, keep=1)))
        assert os.waitpid(child, 0)[1] == signal.SIGKILL
        path = latest_checkpoint(folder)
        assert path is not None, f"call {position} ({calls[position]})"
        assert_holds(path, 31 if load_checkpoint(path)[1]["version"] == 31 else 11)
        shutil.rmtree(folder)


def test_100_kills_at_random_moments(tmp_path):
    seed = random.SystemRandom().randrange(2**32)
    print(f"seed of the kills: {seed}")  # pytest shows it where the test fails
    rng = random.Random(seed)
    n_cut = 0
    began = time.perf_counter()
    save(tmp_path, 1, 1, keep=2)
    usual = time.perf_counter() - began
    newest = 1
    for _ in range(100):
        receive, send = os.pipe()

        def work(start=newest, send=send):
            os.write(send, b"go......")
            for step in range(start + 1, start + 1000):
                save(tmp_path, step, step, keep=2)
                os.write(send, step.to_bytes(8, "little"))

        child = in_child(work)
        os.close(send)
        assert os.read(receive, 8) == b"go......"
        time.sleep(rng.uniform(0, 3 * usual))
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status), f"seed {seed}: the child failed by itself"
        reported = newest
        while select.select([receive], [], [], 0)[0] and (data := os.read(receive, 8)):
            reported = int.from_bytes(data, "little")
        os.close(receive)

        with warnings.catch_warnings():
            warnings.simplefilter("error")
            path = latest_checkpoint(tmp_path)
        assert path is not None, f"seed {seed}"
        step = int(path.name.split("-")[1])
        # nothing that a save reported as done is lost, and at most the one in progress is there besides
        assert reported <= step <= reported + 1, f"seed {seed}"
        assert_holds(path, step)
        n_cut += any(".writing-" in entry.name for entry in tmp_path.iterdir())
        newest = step
    print(f"{n_cut} of 100 kills left a half-written folder; step {newest} was reached")
    assert n_cut >= 10, f"seed {seed}: too few kills fell into a save to mean anything"


def test_a_killed_metrics_log_loses_at_most_the_line_being_written(tmp_path):
    from moekit.train.trackers import MetricsLog, read_metrics

    path = tmp_path / "metrics.jsonl"
    for round_ in range(10):

        def work(start=10 * round_):
            log = MetricsLog(path, resume_step=start)
            for step in range(start + 1, start + 8):
                log.log(step, {"loss": step / 3})
            kill_at(0, half=True)  # from here on the first call is the write of a line
            log.log(start + 8, {"loss": 1.0})

        _, status = os.waitpid(in_child(work), 0)
        assert os.WTERMSIG(status) == signal.SIGKILL
        assert not path.read_bytes().endswith(b"\n")
        steps = [line["step"] for line in read_metrics(path)]
        assert steps == [10 * r + i for r in range(round_ + 1) for i in range(1, 8)]
    with MetricsLog(path, resume_step=95) as log:
        log.log(96, {"loss": float("inf")})
    lines = read_metrics(path)
    assert [line["step"] for line in lines[-3:]] == [94, 95, 96]
    assert lines[-2]["loss"] == 95 / 3
