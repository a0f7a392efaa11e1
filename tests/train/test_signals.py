"""Real processes that are told to stop, or killed, while they train; `moekit resume` makes up for it.

Each starts `python -m moekit` on a run that would take hours, waits until the metrics file shows some steps,
and sends the signal. The run is then resumed with a few steps more than it has, and compared with one of
that length: its learning rate is constant, so that the length changes nothing before the end.
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from training_samples import assert_same_run, decoder, newest, run_config

from moekit.config.loading import save_run_config
from moekit.config.train import RunConfig
from moekit.train.run import train_run

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")


@pytest.fixture
def config(tmp_path):
    """Noise in the router, so that the random generator must go on too; saved as config.yaml."""
    config = run_config(
        tmp_path,
        decoder(router="noisy_topk"),
        steps=1_000_000,
        accumulation=3,
        checkpoint_every=4,
        validate_every=0,
        schedule={"kind": "constant", "warmup_steps": 3},
    )
    save_run_config(config, tmp_path / "config.yaml")
    return config


def start(*arguments: object) -> subprocess.Popen:
    command = [sys.executable, "-m", "moekit", *map(str, arguments), "--quiet"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )


def wait_for_steps(process: subprocess.Popen, run: Path, n_lines: int) -> None:
    """Until the run has logged `n_lines` lines; fails with what the process said where it ends before."""
    log, deadline = run / "metrics.jsonl", time.monotonic() + 120
    while not log.exists() or log.read_bytes().count(b"\n") < n_lines:
        if process.poll() is not None:
            pytest.fail(
                f"ended with {process.returncode} before it was to be stopped: {process.communicate()[1]}"
            )
        assert time.monotonic() < deadline, "no step within two minutes"
        time.sleep(0.005)


def stop(process: subprocess.Popen, number: int) -> tuple[int, float, str]:
    """Exit code, seconds until the process had ended, standard error."""
    began = time.monotonic()
    process.send_signal(number)
    _, error = process.communicate(timeout=60)
    return process.returncode, time.monotonic() - began, error


@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGTERM, 143), pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow)],
    ids=["SIGTERM", "SIGINT"],
)
def test_a_run_that_is_told_to_stop_saves_and_goes_on(tmp_path, config, number, code):
    run = tmp_path / "runs" / "tiny-1"
    process = start("train", tmp_path / "config.yaml")
    wait_for_steps(process, run, 5)
    got, seconds, error = stop(process, number)
    assert got == code, error
    assert seconds < 25
    name = signal.Signals(number).name
    assert f"stopped by {name}; a checkpoint was written. Go on with: moekit resume {run}" in error
    assert "Traceback" not in error
    assert newest(run)[1]["step"] >= 5
    # without a name, the unfinished run is found
    finish_and_compare(config, run, "--runs-dir", tmp_path / "runs")


def finish_and_compare(config: RunConfig, run: Path, *which: object) -> None:
    """Resume to five steps after the checkpoint; the same weights, state and metrics as without any stop."""
    steps = newest(run)[1]["step"] + 5
    process = start("resume", *which, f"train.steps={steps}")
    _, error = process.communicate(timeout=120)
    assert process.returncode == 0, error
    whole = train_run(config.replace(train=config.train.replace(steps=steps)), quiet=True)
    assert_same_run(run, whole.folder)


@pytest.mark.slow
def test_a_run_that_is_killed_again_and_again_ends_like_one_that_was_not(tmp_path, config):
    """SIGKILL at three moments; every fourth step writes a checkpoint."""
    run, n_lines = tmp_path / "runs" / "tiny-1", 0
    for attempt in range(3):
        process = start("train", tmp_path / "config.yaml") if attempt == 0 else start("resume", run)
        wait_for_steps(process, run, n_lines + 9 + attempt)
        got, _, error = stop(process, signal.SIGKILL)
        assert got == -signal.SIGKILL, error
        n_lines = (run / "metrics.jsonl").read_bytes().count(b"\n")
    finish_and_compare(config, run, run)
