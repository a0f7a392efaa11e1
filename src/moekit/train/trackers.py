"""Where metrics go: one append-only JSONL file that is the truth, and adapters that copy it elsewhere.

A line is `{"step": 120, "time": 1760000000.0, "kind": "train", "loss": 3.21, …}`. The file is strict JSON: a
number that is not finite is null, and `"non_finite"` tells which (`{"loss": "NaN"}`).
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import secrets
import time
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from moekit.config.errors import ConfigError, DataError, MissingExtraError, nearest
from moekit.train.durable import make_folder, sync_folder, write_file

_NON_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}
_OWN_KEYS = ("step", "time", "kind", "non_finite")


class MetricsLog:
    """Append-only file of metrics, one JSON object a line, handed to the system line by line.

    Opening a file repairs it: a last line that a killed process wrote only in part is cut off. With
    `resume_step` the lines of later steps go as well, because the resumed run writes them again.

    Values are numbers, strings, booleans, None, tensors or arrays, and lists and dictionaries of them.
    Errors: `ConfigError` for another value or one of the names step, time, kind, non_finite; `DataError`
    where the file cannot be written.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "metrics.jsonl"
    >>> with MetricsLog(path) as log:
    ...     log.log(10, {"loss": 3.5, "load": [0.25, 0.75]})
    ...     log.log(20, {"loss": float("nan")}, kind="validation")
    >>> [(line["step"], line["kind"], line["loss"]) for line in read_metrics(path)]
    [(10, 'train', 3.5), (20, 'validation', nan)]
    """

    def __init__(self, path: Path | str, resume_step: int | None = None) -> None:
        self.path = Path(path)
        try:
            make_folder(self.path.parent)
            self._repair(resume_step)
            flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | getattr(os, "O_BINARY", 0)
            self._file: int | None = os.open(self.path, flags, 0o666)
        except OSError as error:
            raise self._unwritable(error) from error

    def log(self, step: int, metrics: Mapping[str, Any], kind: str = "train") -> None:
        """Append one line; it survives the death of the process as soon as this returns."""
        if self._file is None:
            raise DataError(f"{self.path} was closed: metrics of step {step} cannot be written")
        for name in _OWN_KEYS:
            if name in metrics:
                raise ConfigError(f"metric {name!r} is written by the log itself: choose another name")
        non_finite: dict[str, str] = {}
        values = _plain(metrics, (), non_finite)
        line = {"step": step, "time": time.time(), "kind": kind, **values}
        if non_finite:
            line["non_finite"] = non_finite
        data = json.dumps(line, ensure_ascii=False, allow_nan=False).encode() + b"\n"
        n_written = 0  # one write takes the whole line, unless the disk is full
        try:
            while n_written < len(data):
                n_written += os.write(self._file, data[n_written:])
        except OSError as error:
            with contextlib.suppress(OSError):  # no torn line in the middle, should the caller go on
                os.ftruncate(self._file, os.fstat(self._file).st_size - n_written)
            raise self._unwritable(error) from error

    def close(self) -> None:
        """Flush to the disk and close; a second call does nothing."""
        if self._file is not None:
            file, self._file = self._file, None
            try:
                os.fsync(file)
            except OSError as error:
                raise self._unwritable(error) from error
            finally:
                os.close(file)

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _repair(self, resume_step: int | None) -> None:
        if not self.path.exists():
            return
        content = self.path.read_bytes()
        lines = content.splitlines(keepends=True)
        if lines and not lines[-1].endswith(b"\n"):
            lines.pop()
        if resume_step is not None:
            lines = [line for line in lines if (_parse(line) or {"step": -1})["step"] <= resume_step]
        kept = b"".join(lines)
        if kept == content:
            return
        if content.startswith(kept):
            os.truncate(self.path, len(kept))
            return
        hidden = self.path.with_name(f".{self.path.name}.{secrets.token_hex(4)}")
        write_file(hidden, [memoryview(kept)])
        os.replace(hidden, self.path)
        sync_folder(self.path.parent)

    def _unwritable(self, error: OSError) -> DataError:
        return DataError(
            f"metrics cannot be written to {self.path}: {error.strerror or error}. "
            "Free some space or move runs_dir"
        )


def read_metrics(path: Path | str, kind: str | None = None) -> list[dict[str, Any]]:
    """Lines of a metrics file, of one `kind` where given, with NaN and infinity put back.

    A torn last line is left out silently, because a killed process leaves one; another line that is not
    JSON is left out with a warning. Errors: `DataError` where there is no such file.
    """
    try:
        lines = Path(path).read_bytes().splitlines(keepends=True)
    except OSError as error:
        raise DataError(f"metrics cannot be read from {path}: {error.strerror or error}") from error
    found, n_broken = [], 0
    for number, line in enumerate(lines, start=1):
        entry = _parse(line)
        if entry is None:
            n_broken += number < len(lines) or line.endswith(b"\n")
            continue
        for pointer, text in entry.pop("non_finite", {}).items():
            _put(entry, pointer, _NON_FINITE[text])
        if kind is None or entry["kind"] == kind:
            found.append(entry)
    if n_broken:
        warnings.warn(f"{path}: {n_broken} lines are not metrics and were left out", stacklevel=2)
    return found


class Tracker(Protocol):
    """What a further tracker must do."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


class TensorBoardTracker:
    """Scalars as TensorBoard event files in `folder` (extra `tensorboard`); look with `tensorboard --logdir`.

    After `resume_step` TensorBoard hides what an earlier process wrote for later steps.
    """

    def __init__(self, folder: Path | str, resume_step: int | None = None) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise _missing("tensorboard", error) from error
        purge = None if resume_step is None else resume_step + 1
        self._writer: Any = SummaryWriter(str(folder), purge_step=purge)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        for name, value in _scalars(metrics).items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class WandbTracker:
    """Scalars to Weights & Biases (extra `wandb`), or with `WANDB_MODE=offline` to `folder`/wandb only.

    The id of the W&B run is kept in `folder`/wandb-run-id.txt, so that a resumed run goes on in its place.
    Metrics are plotted over moekit's own step: W&B's may only grow, and a resumed run repeats some steps.
    """

    def __init__(
        self, folder: Path | str, run_name: str, config: Mapping[str, Any], project: str = "moekit"
    ) -> None:
        try:
            import wandb

            if not hasattr(
                wandb, "init"
            ):  # without the package, a folder "wandb" of earlier runs is imported
                raise ImportError("No module named 'wandb'")
        except ImportError as error:
            raise _missing("wandb", error) from error
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        id_file = folder / "wandb-run-id.txt"
        run_id = id_file.read_text().strip() if id_file.exists() else secrets.token_hex(4)
        try:
            self._run: Any = wandb.init(
                project=os.environ.get("WANDB_PROJECT", project),
                name=run_name,
                config=dict(config),
                dir=str(folder),
                id=run_id,
                resume="allow",
                settings=wandb.Settings(console="off"),  # the live view would fill W&B's log with its frames
            )
        except wandb.errors.Error as error:
            reason = str(error).rstrip(".")
            raise ConfigError(
                f"train.trackers holds 'wandb', which cannot start: {reason}. Run `wandb login`, "
                "set WANDB_API_KEY, or set WANDB_MODE=offline"
            ) from error
        id_file.write_text(f"{run_id}\n")
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log({**_scalars(metrics), "step": step})

    def close(self) -> None:
        self._run.finish()


class _Guarded:
    """A tracker whose failure costs a warning and its further data, never the training."""

    def __init__(self, name: str, tracker: Tracker) -> None:
        self.name = name
        self.tracker: Tracker | None = tracker

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        if self.tracker is not None:
            try:
                self.tracker.log(step, metrics)
            except Exception as error:
                self._give_up(error)

    def close(self) -> None:
        if self.tracker is not None:
            try:
                self.tracker.close()
            except Exception as error:
                self._give_up(error)
            self.tracker = None

    def _give_up(self, error: Exception) -> None:
        self.tracker = None
        warnings.warn(
            f"tracker {self.name!r} failed and is off for the rest of the run ({error}); "
            "the metrics file still gets everything",
            stacklevel=3,
        )


def make_trackers(
    names: Sequence[str],
    folder: Path | str,
    run_name: str,
    config: Mapping[str, Any],
    resume_step: int | None = None,
) -> list[Tracker]:
    """The further trackers of a run, by name: "tensorboard" (into `folder`/tensorboard), "wandb".

    A tracker that fails later warns once and stays silent. Errors: `MissingExtraError` where its package is
    not installed, `ConfigError` for an unknown name or a W&B without login.
    """
    trackers: list[Tracker] = []
    for name in names:
        if name == "tensorboard":
            tracker: Tracker = TensorBoardTracker(Path(folder) / "tensorboard", resume_step)
        elif name == "wandb":
            tracker = WandbTracker(folder, run_name, config)
        else:
            known = nearest(name, ["tensorboard", "wandb"])
            raise ConfigError(f"train.trackers: {name!r} is unknown: {known}")
        trackers.append(_Guarded(name, tracker))
    return trackers


def _missing(extra: str, error: ImportError) -> MissingExtraError:
    return MissingExtraError(
        f"train.trackers holds {extra!r}, whose package is not installed ({error}). "
        f"Install it: pip install 'moekit[{extra}]'"
    )


def _scalars(metrics: Mapping[str, Any]) -> dict[str, float]:
    """The numbers among the metrics; lists and text stay in the metrics file."""
    values = _plain(metrics, (), None)
    return {name: float(value) for name, value in values.items() if isinstance(value, (bool, int, float))}


def _plain(value: Any, path: tuple[str, ...], non_finite: dict[str, str] | None) -> Any:
    """`value` as JSON data.

    What is not finite becomes None and is noted in `non_finite` under its JSON pointer (RFC 6901, without the
    first slash); where `non_finite` is None it stays as it is.
    """
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        if math.isfinite(value) or non_finite is None:
            return float(value)  # numpy's float64 is a float as well
        name = "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
        non_finite["/".join(part.replace("~", "~0").replace("/", "~1") for part in path)] = name
        return None
    if isinstance(value, Mapping):
        return {str(key): _plain(item, (*path, str(key)), non_finite) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item, (*path, str(i)), non_finite) for i, item in enumerate(value)]
    if hasattr(value, "tolist"):  # tensors and arrays of any size
        return _plain(value.tolist(), path, non_finite)
    raise ConfigError(
        f"metric {'/'.join(path)} must be a number, text, or a list or dictionary of them; "
        f"got {type(value).__name__}"
    )


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        entry = json.loads(line)
    except ValueError:
        return None
    good = (
        isinstance(entry, dict) and isinstance(entry.get("step"), int) and isinstance(entry.get("kind"), str)
    )
    return entry if good else None


def _put(entry: Any, pointer: str, value: float) -> None:
    *path, last = (part.replace("~1", "/").replace("~0", "~") for part in pointer.split("/"))
    for part in path:
        entry = entry[int(part)] if isinstance(entry, list) else entry[part]
    entry[int(last) if isinstance(entry, list) else last] = value
