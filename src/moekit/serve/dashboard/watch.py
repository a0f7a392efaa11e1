"""The runs below some folders: those that are there now, looked at when somebody asks."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from moekit.serve.dashboard.run import QUIET, WatchedRun, looks_like_run

# seconds: a look is not repeated sooner, and does not last longer
PAUSE, BUDGET = 0.4, 0.8
# keys of a configuration that say nothing of the model or its training
PLACES = ("name", "runs_dir")


class Watch:
    """All runs that are, or will be, in `folders`; a folder is a run, or holds runs.

    Nothing is read while nobody asks. Files that are large the first time are read in pieces, so that an answer does
    not wait for them: `behind` counts the runs that are not read to their end.
    """

    def __init__(self, folders: Sequence[Path], quiet: float = QUIET) -> None:
        self.folders, self.quiet = tuple(folders), quiet
        self._runs: dict[Path, WatchedRun] = {}
        self._lock = threading.Lock()
        self._looked = float("-inf")

    def runs(self) -> dict[str, Any]:
        """The list of runs, the newest first, JSON-ready."""
        with self._lock:
            self._look()
            found = [run.summary() for run in self._runs.values()]
            behind = sum(run.behind for run in self._runs.values())
        twice = {name for name, times in Counter(one["name"] for one in found).items() if times > 1}
        for one in found:
            if one["name"] in twice:
                one["name"] = f"{Path(one['folder']).parent.name}/{one['name']}"
        found.sort(key=lambda one: (one["state"] != "training", -one["changed"], one["name"]))
        return {
            "now": time.time(), "folders": [str(folder) for folder in self.folders], "behind": behind, "runs": found
        }  # fmt: skip

    def since(self, identity: str, have: Mapping[str, int], generation: int | None) -> dict[str, Any] | None:
        """New points of a run; None where it is gone."""
        with self._lock:
            run = self._by_identity(identity)
            return None if run is None else run.since(have, generation)

    def folder(self, identity: str) -> Path | None:
        """Of a run."""
        with self._lock:
            run = self._by_identity(identity)
            return None if run is None else run.folder

    def differences(self, identities: Sequence[str]) -> list[dict[str, Any]]:
        """Keys of the configurations that are not the same in all of these runs, each with a value for each run."""
        with self._lock:
            found = [self._by_identity(identity) for identity in identities]
            return differing([{} if run is None else run.config for run in found])

    def _by_identity(self, identity: str) -> WatchedRun | None:
        if not self._runs:
            self._look()
        return next((run for run in self._runs.values() if run.identity == identity), None)

    def _look(self) -> None:
        began = time.monotonic()
        if began - self._looked < PAUSE:
            return
        there = run_folders([folder.absolute() for folder in self.folders])
        self._runs = {folder: self._runs.get(folder) or WatchedRun(folder, self.quiet) for folder in there}
        # those that were read to their end are soon done; the others share what time is left
        for run in sorted(self._runs.values(), key=lambda run: run.behind):
            run.refresh()
        while time.monotonic() - began < BUDGET:
            behind = [run for run in self._runs.values() if run.behind]
            if not behind:
                break
            behind[0].refresh()
        self._looked = time.monotonic()


def run_folders(folders: Sequence[Path]) -> list[Path]:
    """The runs among and in these folders; what cannot be read holds none."""
    found: dict[Path, None] = {}
    for folder in folders:
        if looks_like_run(folder):
            found[folder] = None
            continue
        try:
            inside = sorted(path for path in folder.iterdir() if path.is_dir())
        except OSError:
            continue
        found |= {path: None for path in inside if looks_like_run(path)}
    return list(found)


def flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted keys of a configuration.

    >>> flat({"train": {"steps": 5, "betas": [0.9]}, "name": "a"})
    {'train.steps': 5, 'train.betas': [0.9], 'name': 'a'}
    """
    found: dict[str, Any] = {}
    for key, value in config.items():
        name = f"{prefix}{key}"
        found |= flat(value, f"{name}.") if isinstance(value, Mapping) and value else {name: value}
    return found


def differing(configs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Keys with different values; None where a configuration has no such key.

    >>> differing([{"a": 1, "b": 2}, {"a": 1, "b": 3, "c": 4}])
    [{'key': 'b', 'values': [2, 3]}, {'key': 'c', 'values': [None, 4]}]
    """
    tables = [flat(config) for config in configs]
    keys = dict.fromkeys(key for table in tables for key in table if key not in PLACES)
    rows = [{"key": key, "values": [table.get(key) for table in tables]} for key in keys]
    return [row for row in rows if any(value != row["values"][0] for value in row["values"])]
