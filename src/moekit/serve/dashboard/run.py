"""One run as the dashboard sees it: what its files say, read again only where they have changed."""

from __future__ import annotations

import hashlib
import json
import math
import re
import time
from collections import deque
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

from moekit.config.errors import MoekitError
from moekit.config.yamlio import parse_yaml
from moekit.observe.record import JSON_FILE
from moekit.serve.dashboard.series import Series, rounded
from moekit.serve.dashboard.tail import Tail

# seconds without a line after which a run is said to be still, and how many of its usual gaps that must be
QUIET, GAPS = 60.0, 10
# points of a curve, moments of a heat map, alarms that are kept
POINTS, MOMENTS, ALARMS = 750, 60, 500
CHECKPOINT = re.compile(r"step-(\d+)")
NAMES = ("train", "validation", "layers", "loads")


def looks_like_run(folder: Path) -> bool:
    """Whether a folder is that of a run, or of one that begins."""
    return (folder / "config.yaml").is_file() or (folder / "metrics.jsonl").is_file()


class WatchedRun:
    """The state and the curves of one run.

    Attributes:
        identity: a short name that no other folder has.
        folder: of the run.
        series: curves by `NAMES`: lines of kind "train" and "validation", measures by layer, loads of experts.
        alarms: lines of kind "alarm".
        config: what config.yaml says; empty while it is not there.
    """

    def __init__(self, folder: Path, quiet: float = QUIET) -> None:
        self.folder, self.quiet = folder, quiet
        self.identity = hashlib.sha256(str(folder.absolute()).encode()).hexdigest()[:12]
        self._tail = Tail(folder / "metrics.jsonl")
        self.series = {name: Series(MOMENTS if name == "loads" else POINTS) for name in NAMES}
        self.alarms: deque[dict[str, Any]] = deque(maxlen=ALARMS)
        self.config: dict[str, Any] = {}
        self._about: dict[str, Any] = {}
        self._final: dict[str, Any] | None = None
        self._seen: dict[str, tuple[int, int] | None] = {}
        self._recent: deque[dict[str, Any]] = deque(maxlen=20)
        self._validation: dict[str, Any] = {}
        self._step = 0

    @property
    def generation(self) -> int:
        """Changes whenever points that a reader may have are no longer true."""
        return self._tail.restarts + sum(series.generation for series in self.series.values())

    @property
    def behind(self) -> bool:
        """Whether lines are there that were not read yet."""
        return self._tail.behind

    def refresh(self) -> None:
        """Read what is new."""
        self._read_small_files()
        lines, fresh = self._tail.read()
        if fresh:
            for series in self.series.values():
                series.clear()
            self.alarms.clear()
            self._recent.clear()
            self._validation, self._step = {}, 0
        for line in lines:
            self._take(line)

    def _read_small_files(self) -> None:
        if self._changed("config.yaml"):
            self.config = _mapping(self._parsed("config.yaml"))
        if self._changed("run.json"):
            self._about = _mapping(self._parsed("run.json"))
        if self._changed("final.json"):
            found = self._parsed("final.json")
            self._final = found if isinstance(found, dict) else None

    def _changed(self, name: str) -> bool:
        now = stamp(self.folder / name)
        if name in self._seen and self._seen[name] == now:
            return False
        self._seen[name] = now
        return True

    def _parsed(self, name: str) -> Any:
        try:
            text = (self.folder / name).read_text("utf-8")
            return parse_yaml(text, name) if name.endswith(".yaml") else json.loads(text)
        except (OSError, ValueError, MoekitError):  # missing, or half written: it will change again
            return None

    def _take(self, line: bytes) -> None:
        try:
            entry = json.loads(line)
            step, kind = int(entry["step"]), entry["kind"]
        except (ValueError, TypeError, KeyError, RecursionError):
            return
        self._step = max(self._step, step)
        values = {name: value for name, value in entry.items() if name not in ("kind", "non_finite")}
        if kind == "alarm":
            self.alarms.append(values)
        elif kind == "validation":
            self._validation = values
            self.series["validation"].add(rounded(_numbers(values)))
        elif kind == "train":
            self._recent.append(values)
            self.series["train"].add(rounded(_numbers(values)))
            if isinstance(values.get("by_layer"), dict):
                self.series["layers"].add(rounded({"step": step, **values["by_layer"]}))
            if isinstance(values.get("load"), list):
                self.series["loads"].add(rounded({"step": step, "load": values["load"]}))

    def summary(self) -> dict[str, Any]:
        """What the list of runs shows of it, JSON-ready."""
        last = self._recent[-1] if self._recent else {}
        steps = _number(_mapping(self.config.get("train")).get("steps"))
        state, words = self._state(steps)
        validation_loss = _number(self._validation.get("validation_loss"))
        bytes_per_token = _number(self._about.get("bytes_per_token"))
        bits = None
        if validation_loss is not None and bytes_per_token:
            bits = validation_loss / math.log(2) / bytes_per_token
        return {
            "id": self.identity, "name": self.folder.name, "folder": str(self.folder), "state": state, "words": words,
            "task": "targets" in self.config, "step": self._step, "steps": steps, "tokens": _number(last.get("tokens")),
            "loss": _number(last.get("loss")), "validation_loss": validation_loss, "bits_per_byte": bits,
            "bytes_per_token": bytes_per_token, "tokens_per_second": self._speed(),
            "seconds_left": self._seconds_left(steps) if state == "training" else None,
            "parameters": _number(self._about.get("total_parameters")),
            "active": _number(self._about.get("active_parameters")),
            "changed": self._last_sign(), "alarms": list(self.alarms)[-20:], "n_alarms": len(self.alarms),
            "generation": self.generation, "lengths": {name: len(series) for name, series in self.series.items()},
            "routing": self.routing_version(), "explained": (self.folder / "explain.html").is_file(),
        }  # fmt: skip

    def routing_version(self) -> str | None:
        """Changes with the routing record; None where there is none."""
        found = stamp(self.folder / "routing" / JSON_FILE)
        return None if found is None else f"{found[0]}-{found[1]}"

    def since(self, have: Mapping[str, int], generation: int | None) -> dict[str, Any]:
        """Points beyond those that a reader has; all of them where its generation is not this one."""
        start = dict(have) if generation == self.generation else {}
        return {
            "generation": self.generation,
            "series": {
                name: {
                    "from": min(start.get(name, 0), len(series)), "columns": series.since(start.get(name, 0)),
                    "last": series.last,
                }
                for name, series in self.series.items()
            },
        }  # fmt: skip

    def _state(self, steps: float | None) -> tuple[str, str]:
        """ "finished", "training", "interrupted" or "stalled", and a sentence where there is more to say."""
        if self._final is not None:
            return "finished", ""
        silent = time.time() - self._last_sign()
        if silent <= self._patience():
            return "training", "" if self._recent else "begins"
        checkpoint = self._newest_checkpoint()
        if checkpoint is not None and checkpoint >= self._step:
            return (
                "interrupted",
                f"stopped at its checkpoint of step {checkpoint}: moekit resume {self.folder}",
            )
        known = "no checkpoint yet" if checkpoint is None else f"last checkpoint at step {checkpoint}"
        return "stalled", f"nothing written for {_time(silent)}; {known}"

    def _patience(self) -> float:
        times = [entry["time"] for entry in self._recent if _number(entry.get("time")) is not None]
        gaps = sorted(then - now for now, then in pairwise(times) if then > now)
        return max(self.quiet, GAPS * gaps[len(gaps) // 2] if gaps else 0.0)

    def _last_sign(self) -> float:
        """Seconds since the epoch at which the run last wrote what every run writes."""
        found = [stamp(self.folder / name) for name in ("metrics.jsonl", "config.yaml")]
        return max((one[0] for one in found if one is not None), default=0) / 1e9

    def _newest_checkpoint(self) -> int | None:
        try:
            names = [path.name for path in (self.folder / "checkpoints").iterdir()]
        except OSError:
            return None
        steps = [int(found[1]) for found in map(CHECKPOINT.match, names) if found]
        return max(steps, default=None)

    def _speed(self) -> float | None:
        values = [_number(entry.get("tokens_per_second")) for entry in list(self._recent)[-5:]]
        known = [value for value in values if value is not None]
        return sum(known) / len(known) if known else None

    def _seconds_left(self, steps: float | None) -> float | None:
        if steps is None or len(self._recent) < 2:
            return None
        first, last = self._recent[0], self._recent[-1]
        walked, passed = last["step"] - first["step"], last.get("time", 0) - first.get("time", 0)
        # the clock of a run that was resumed stood still meanwhile: its own seconds did not
        own = [_number(entry.get("seconds")) for entry in (first, last)]
        if own[0] is not None and own[1] is not None and own[1] > own[0]:
            passed = min(passed, 3 * (own[1] - own[0]))
        return max(steps - self._step, 0) * passed / walked if walked > 0 and passed > 0 else None


def stamp(path: Path) -> tuple[int, int] | None:
    """When a file was changed, in nanoseconds, and its size; None where there is none."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _number(value: Any) -> float | None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return value if is_number and math.isfinite(value) else None


def _numbers(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is None or _number(value) is not None}


def _time(seconds: float) -> str:
    for unit, size in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} seconds"
