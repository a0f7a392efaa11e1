"""Checkpoints that are either complete or not there at all.

A checkpoint is a folder (`step-00000120`, or `step-00000120-m1` after one more micro-batch) with three files:

    tensors.safetensors   every tensor of the run under its own name; random states are tensors as well
    state.json            everything else: counters, data position, configuration
    manifest.json         size and SHA-256 of the other two, written last

It is written in a hidden sibling, flushed to the disk, and renamed into its place in one step. Whatever stops
the process, the folder of checkpoints therefore holds the previous checkpoint, the new one, or both. Loading
compares every file with the manifest, so that a file that broke later is noticed and not used.

    save_checkpoint ─► _write_files (hidden folder) ─► _publish (rename) ─► _prune
    latest_checkpoint ─► check_checkpoint, newest first ─► load_checkpoint
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import secrets
import shutil
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from moekit.config.errors import CheckpointError, require
from moekit.train.durable import make_folder, read_tensors, sha256_of, sync_folder, tensor_parts, write_file

if sys.platform != "win32":
    import fcntl

FORMAT = "moekit-checkpoint"
VERSION = 1
TENSORS, STATE, MANIFEST = "tensors.safetensors", "state.json", "manifest.json"

_NAME = re.compile(r"step-(\d{8,})(?:-m(\d+))?")
_HIDDEN = re.compile(r"\.(step-[-m\d]+)\.(writing|replaced|removed)-[0-9a-f]+")


class DamagedCheckpointWarning(UserWarning):
    """A checkpoint was passed over because it is incomplete or does not match its manifest."""


def checkpoint_name(step: int, micro: int = 0) -> str:
    """Folder name of the state after `step` optimizer steps and `micro` micro-batches of the next one.

    >>> checkpoint_name(120), checkpoint_name(120, micro=1)
    ('step-00000120', 'step-00000120-m1')
    """
    return f"step-{step:08d}" + (f"-m{micro}" if micro else "")


def save_checkpoint(
    folder: Path | str,
    step: int,
    tensors: Mapping[str, Tensor],
    state: Mapping[str, Any],
    keep: int,
    micro: int = 0,
) -> Path:
    """Write a checkpoint so that it appears complete or not at all, then prune to the newest `keep`.

    Tensors may lie on any device and have any dtype that safetensors knows; they are written one by one
    straight from memory, so that at most one tensor is copied at a time (none that is contiguous on the CPU).
    Names that share one tensor (tied weights) are stored once and are one tensor again after loading. `state`
    is JSON: tuples come back as lists and the keys of dictionaries as strings; NaN and infinity survive.

    Checkpoints of a later step belong to a history that this save leaves; where they are good they are
    renamed to `abandoned-…`, so that the newest checkpoint is the last one saved and nothing good is lost.

    Errors: `CheckpointError` where the folder cannot be written (disk full, read-only, in use by another
    process), a tensor is not a plain one, or `state` is not JSON. The earlier checkpoints are intact then.

    >>> import tempfile, torch
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = save_checkpoint(folder, 120, {"weight": torch.ones(2)}, {"epoch": 1}, keep=2)
    ...     tensors, state = load_checkpoint(latest_checkpoint(folder))
    >>> path.name, tensors, state
    ('step-00000120', {'weight': tensor([1., 1.])}, {'epoch': 1})
    """
    require(step >= 0, "step", step, "must be 0 or more")
    require(micro >= 0, "micro", micro, "must be 0 or more")
    require(keep >= 1, "keep", keep, "must be 1 or more", "Set train.keep_checkpoints")
    folder = Path(folder)
    name = checkpoint_name(step, micro)
    n_bytes, tensor_bytes = tensor_parts(tensors)
    try:
        state_bytes = json.dumps(dict(state), indent=1, ensure_ascii=False).encode()
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"the state of step {step} cannot be written as JSON: {error}") from None
    try:
        make_folder(folder)
        with _only_writer(folder):
            _clear_leftovers(folder)
            hidden = folder / f".{name}.writing-{secrets.token_hex(4)}"
            try:
                _write_files(hidden, step, micro, tensor_bytes, state_bytes)
                path = _publish(hidden, folder / name)
            except BaseException:
                shutil.rmtree(hidden, ignore_errors=True)  # gives the space back at once
                raise
            try:
                _prune(path, keep)
            except OSError as error:  # the new checkpoint is safe: an old one that stays is no reason to stop
                warnings.warn(f"old checkpoints in {folder} were not removed: {error}", stacklevel=2)
    except OSError as error:
        raise CheckpointError(_explain(error, folder, step, n_bytes)) from error
    return path


def latest_checkpoint(folder: Path | str) -> Path | None:
    """The newest checkpoint in `folder` that is complete and matches its hashes, or None.

    A newer one that is damaged is passed over, with a `DamagedCheckpointWarning` that says what is wrong.
    """
    for path in list_checkpoints(folder):
        try:
            check_checkpoint(path)
        except CheckpointError as error:
            warnings.warn(f"passed over a checkpoint: {error}", DamagedCheckpointWarning, stacklevel=2)
        else:
            return path
    return None


def list_checkpoints(folder: Path | str) -> list[Path]:
    """Folders of checkpoints, newest first; whether they are good is not checked.

    A checkpoint that was just being replaced by one of the same step when the process ended has a hidden name
    until the next save, and stands behind its successor here.
    """
    found = []
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        for entry in os.scandir(folder):
            hidden = _HIDDEN.fullmatch(entry.name)
            position = _position(hidden[1] if hidden and hidden[2] == "replaced" else entry.name)
            if position is not None and entry.is_dir():
                found.append((position, hidden is None, Path(entry.path)))
    return [path for _, _, path in sorted(found, reverse=True)]


def check_checkpoint(path: Path | str, verify: bool = True) -> None:
    """Raise `CheckpointError` that says what is wrong unless the checkpoint is complete.

    `verify` reads all files and compares their SHA-256; without it only the sizes are looked at.
    """
    path = Path(path)
    if not path.is_dir():
        raise CheckpointError(f"there is no checkpoint {path}")
    manifest = _read_json(path, MANIFEST)
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise _damaged(path, f"{MANIFEST} does not describe a checkpoint of moekit")
    if manifest.get("version") != VERSION:
        raise CheckpointError(
            f"checkpoint {path} has format version {manifest.get('version')!r}, this moekit reads {VERSION}. "
            f"Install the moekit that wrote it ({manifest.get('moekit', 'unknown version')})"
        )
    hidden = _HIDDEN.fullmatch(path.name)
    position = _position(hidden[1] if hidden else path.name)
    if position not in (None, (manifest.get("step"), manifest.get("micro"))):
        raise _damaged(path, f"{MANIFEST} says step {manifest.get('step')}, micro {manifest.get('micro')}")
    files = manifest.get("files")
    for name in (TENSORS, STATE):
        expected = files.get(name) if isinstance(files, dict) else None
        if not isinstance(expected, dict):
            raise _damaged(path, f"{MANIFEST} does not list {name}")
        try:
            n_bytes = os.stat(path / name).st_size
            if n_bytes != expected.get("bytes"):
                raise _damaged(path, f"{name} has {n_bytes} bytes instead of {expected.get('bytes')}")
            if verify and sha256_of(path / name) != expected.get("sha256"):
                raise _damaged(path, f"{name} does not match its SHA-256")
        except OSError as error:
            raise _damaged(path, f"{name} cannot be read ({error.strerror})") from error


def load_checkpoint(path: Path | str, verify: bool = True) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors (on the CPU) and state of a checkpoint, after comparing it with its manifest.

    `verify=False` leaves the hashes out, for a path that `latest_checkpoint` has just returned. The tensors
    are mapped from the file and read when they are used; changing them does not change the file.

    Errors: `CheckpointError` that says what is damaged and what to do.
    """
    path = Path(path)
    check_checkpoint(path, verify)
    try:
        tensors = read_tensors(path / TENSORS)
    except CheckpointError as error:
        raise _damaged(path, str(error)) from error
    state = _read_json(path, STATE)
    if not isinstance(state, dict):
        raise _damaged(path, f"{STATE} is not a JSON object")
    return tensors, state


# --- writing


def _write_files(
    hidden: Path, step: int, micro: int, tensor_bytes: Iterable[memoryview], state_bytes: bytes
) -> None:
    from moekit import __version__

    os.mkdir(hidden)
    files = {
        TENSORS: write_file(hidden / TENSORS, tensor_bytes),
        STATE: write_file(hidden / STATE, [memoryview(state_bytes)]),
    }
    manifest = {"format": FORMAT, "version": VERSION, "moekit": __version__, "step": step, "micro": micro,
                "files": files}  # fmt: skip
    write_file(hidden / MANIFEST, [memoryview(json.dumps(manifest, indent=1).encode())])
    sync_folder(hidden)


def _publish(hidden: Path, path: Path) -> Path:
    """Give the complete folder its name; one that has the name already is removed only afterwards."""
    replaced = path.parent / f".{path.name}.replaced-{secrets.token_hex(4)}"
    # `list_checkpoints` knows the hidden name as well: there is no moment without a good checkpoint
    with contextlib.suppress(FileNotFoundError):
        os.rename(path, replaced)
    os.rename(hidden, path)
    sync_folder(path.parent)
    shutil.rmtree(replaced, ignore_errors=True)
    return path


def _prune(saved: Path, keep: int) -> None:
    """Keep `saved` and the `keep - 1` good checkpoints before it, remove the others."""
    position = _position(saved.name)
    n_kept = 0
    for path in list_checkpoints(saved.parent):
        try:
            check_checkpoint(path, verify=False)
            good = True
        except CheckpointError:
            good = False
        if path.name.startswith("."):
            continue  # was replaced by `saved`, and removing it failed: the next save tries again
        if good and _position(path.name) > position:  # type: ignore[operator]
            aside = path.with_name(f"abandoned-{path.name}-{secrets.token_hex(2)}")
            os.rename(path, aside)
            warnings.warn(
                f"{path} is of a later step than {saved.name}, which was just saved; it is now {aside.name}. "
                "Delete it when you do not need it",
                stacklevel=3,
            )
        elif good and n_kept < keep:
            n_kept += 1
        else:
            trash = path.parent / f".{path.name}.removed-{secrets.token_hex(4)}"
            os.rename(path, trash)  # so that a half-removed folder never looks like a checkpoint
            shutil.rmtree(trash, ignore_errors=True)


def _clear_leftovers(folder: Path) -> None:
    """Remove what dead processes left behind. Only called by the one process that may write here."""
    for entry in list(os.scandir(folder)):
        hidden = _HIDDEN.fullmatch(entry.name)
        if hidden and hidden[2] == "replaced" and not (folder / hidden[1]).exists():
            os.rename(entry.path, folder / hidden[1])  # its successor never got the name
        elif hidden:
            shutil.rmtree(entry.path, ignore_errors=True)


@contextlib.contextmanager
def _only_writer(folder: Path) -> Iterator[None]:
    """Hold the lock of the folder. The system frees it when the process ends, however it ends."""
    if sys.platform == "win32":
        yield
        return
    file = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o666)
    try:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise CheckpointError(
                f"another process is saving a checkpoint in {folder}. Give each run its own folder "
                "(name or runs_dir)"
            ) from None
        except OSError:
            pass  # a file system without locks: the folder belongs to one run all the same
        yield
    finally:
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_UN)  # also for children forked meanwhile, which share the open file
        os.close(file)


# --- reading and messages


def _position(name: str) -> tuple[int, int] | None:
    match = _NAME.fullmatch(name)
    return (int(match[1]), int(match[2] or 0)) if match else None


def _read_json(path: Path, name: str) -> Any:
    try:
        return json.loads((path / name).read_bytes())
    except FileNotFoundError:
        raise _damaged(path, f"{name} is missing") from None
    except OSError as error:
        raise _damaged(path, f"{name} cannot be read ({error.strerror})") from error
    except ValueError as error:  # JSON and UTF-8 errors
        raise _damaged(path, f"{name} is not valid JSON ({error})") from error


def _damaged(path: Path, why: str) -> CheckpointError:
    return CheckpointError(
        f"checkpoint {path} is damaged: {why}. Delete this folder and resume from the checkpoint before it "
        "(moekit resume takes the newest good one by itself)"
    )


def _explain(error: OSError, folder: Path, step: int, n_bytes: int) -> str:
    text = f"the checkpoint of step {step} cannot be written in {folder}: {error.strerror or error}"
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        free = ""
        with contextlib.suppress(OSError):
            free = f", {shutil.disk_usage(folder).free / 1e6:,.1f} MB are free"
        text += (
            f" (it needs {n_bytes / 1e6:,.1f} MB{free}). Free some space, lower train.keep_checkpoints, "
            "or move runs_dir to a larger disk"
        )
    else:
        text += ". Check that runs_dir is a folder you may write to, on a disk that is not read-only"
    return f"{text}. Earlier checkpoints are intact"
