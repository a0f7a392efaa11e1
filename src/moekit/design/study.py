"""The folder of a search, and the study of Optuna in it.

FOLDER/
    design.json       what is searched, and within which limits
    study.journal     every trial, appended as it happens; several processes may work on it
    rows/             trials again with other seeds, and the finals, one file each
    runs/             the runs of the finals
    front/            a ready recipe for each design of the front
    best.yaml         the recipe to take
    report.json, report.html, front.png
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import socket
import time
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from moekit.config.atomic import write_json
from moekit.config.errors import CheckpointError, ConfigError, MissingExtraError
from moekit.design.subject import Changes

SETTINGS, JOURNAL, ROWS, RUNS = "design.json", "study.journal", "rows", "runs"
NAME = "moekit"
# seconds after which a trial that nobody has owned up to is nobody's
NAMELESS = 60


def require_optuna() -> Any:
    """The module, quiet. Errors: `MissingExtraError` with the command that installs it."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import optuna
    except ImportError:
        raise MissingExtraError(
            "moekit design and moekit tune search with Optuna, which is not installed. "
            "Install it: pip install 'moekit[design]'"
        ) from None
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    return optuna


def design_id(changes: Changes) -> str:
    """A short name of a choice: `default`, or eight letters of its changes' hash."""
    if not changes:
        return "default"
    return hashlib.sha256(json.dumps(changes, sort_keys=True).encode()).hexdigest()[:8]


def begin(folder: Path, settings: dict[str, Any]) -> None:
    """Write the settings of a search, or find that the folder holds the same one.

    Errors: `ConfigError` where it holds another one; `time` and `trials` may differ, so that a search can be given
    more.
    """
    path = folder / SETTINGS
    if path.is_file():
        known = json.loads(path.read_text("utf-8"))
        for key in settings:
            if key not in ("time", "trials", "created") and known.get(key) != json.loads(
                json.dumps(settings[key])
            ):
                raise ConfigError(
                    f"{folder} holds another search: its {key} is {_short(known.get(key))}, not "
                    f"{_short(settings[key])}. Name another folder with --out"
                )
        settings = {**known, **{key: settings[key] for key in ("time", "trials")}}
    folder.mkdir(parents=True, exist_ok=True)
    write_json(path, settings)


def read_settings(folder: Path) -> dict[str, Any]:
    """Errors: `CheckpointError` where the folder is no search."""
    path = folder / SETTINGS
    if not path.is_file():
        raise CheckpointError(
            f"{folder} is no search: it has no {SETTINGS}. Give the folder that `moekit design` printed"
        )
    settings: dict[str, Any] = json.loads(path.read_text("utf-8"))
    return settings


def open_study(folder: Path) -> Any:
    """The study in a folder, begun where there is none; the cost and the figure are both to become small.

    A journal file was chosen over SQLite: it needs no further package, is only ever appended to, and locks on network
    file systems as well.
    """
    optuna = require_optuna()
    from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock

    path = str(folder / JOURNAL)
    lock = JournalFileOpenLock(path)
    _mend(Path(path), lock)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        storage = optuna.storages.JournalStorage(JournalFileBackend(path, lock_obj=lock))
        return optuna.create_study(
            study_name=NAME, storage=storage, directions=["minimize", "minimize"], load_if_exists=True
        )


def _mend(path: Path, lock: Any) -> None:
    """Cut off a line that a killed process left half-written: nothing could be read behind it."""
    if not path.is_file():
        return
    lock.acquire()
    try:
        data = path.read_bytes()
        whole = data.rfind(b"\n") + 1
        if whole < len(data):
            os.truncate(path, whole)
    finally:
        lock.release()


def who() -> dict[str, Any]:
    """This process, as a trial's attribute."""
    return {"host": socket.gethostname(), "pid": os.getpid()}


def release_lost(study: Any) -> None:
    """Put trials of processes that are gone back into the queue."""
    optuna = require_optuna()
    running = optuna.trial.TrialState.RUNNING
    for trial in study.get_trials(deepcopy=False, states=(running,)):
        owner = trial.user_attrs.get("who")
        if owner is None:  # killed before it could say who it was, or about to say so
            lost = time.time() - trial.datetime_start.timestamp() > NAMELESS
        else:
            lost = owner["host"] == socket.gethostname() and not _lives(owner["pid"])
        if lost:
            give_back(study, trial)


def give_back(study: Any, trial: Any) -> None:
    """End an unfinished trial and queue it again, so that a resumed search goes on with what it was about to try."""
    optuna = require_optuna()
    attributes = {key: trial.user_attrs[key] for key in ("default",) if key in trial.user_attrs}
    params = dict(trial.params)
    study.tell(trial.number, state=optuna.trial.TrialState.FAIL)
    study.enqueue_trial(params, user_attrs={**attributes, "again": trial.number})


def _lives(pid: int) -> bool:
    if pid == os.getpid():
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:  # another user's
        return True
    return True


def seconds_spent(intervals: Iterable[tuple[float, float]]) -> float:
    """Length of the union of intervals: what several processes do at once counts once.

    >>> seconds_spent([(0, 2), (1, 3), (10, 11)])
    4.0
    """
    total, end = 0.0, float("-inf")
    for start, stop in sorted(intervals):
        total += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return total


def intervals_of(study: Any, folder: Path) -> list[tuple[float, float]]:
    """When trials and rows of a search were worked on, in seconds since the epoch."""
    found = [
        (trial.datetime_start.timestamp(), trial.datetime_complete.timestamp())
        for trial in study.get_trials(deepcopy=False)
        if trial.datetime_start is not None and trial.datetime_complete is not None
    ]
    found += [(row["began"], row["ended"]) for row in read_rows(folder)]
    return found


def read_rows(folder: Path) -> list[dict[str, Any]]:
    """Every row that is finished, in the order of its file's name."""
    return [json.loads(path.read_text("utf-8")) for path in sorted((folder / ROWS).glob("*.json"))]


@contextlib.contextmanager
def alone(folder: Path, what: str) -> Iterator[bool]:
    """Whether this process is the one that does `what`; the lock goes with the process, however that ends."""
    try:
        import fcntl
    except ImportError:  # no such locks on Windows: two processes would make the same rows
        yield True
        return
    with open(folder / f".{what}", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            yield False
            return
        yield True


class Clock:
    """The time of a search over all its processes and sittings."""

    def __init__(self, limit: float | None, spent: Iterable[tuple[float, float]] = ()) -> None:
        self.limit, self.earlier, self.began = limit, list(spent), time.time()

    @property
    def spent(self) -> float:
        return seconds_spent([*self.earlier, (self.began, time.time())])

    @property
    def left(self) -> float:
        return float("inf") if self.limit is None else self.limit - self.spent


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
