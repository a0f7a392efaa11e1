"""Safetensors files read in pieces: where each tensor lies, and any part of it straight into memory that is there.

Explicit reads, not a memory map: pages of a map count as the process's own memory and come 4 KB at a time, in the
middle of a product, where a read of a whole expert runs beside it in another thread. The system keeps what was read in
its page cache as long as nothing else wants that memory; `keep_pages=False` tells it not to.

The layout is https://github.com/huggingface/safetensors#format: 8 bytes of length, a JSON header, the tensors.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moekit.config.errors import DataError

_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
_LARGEST_HEADER = 100 << 20


@dataclass(frozen=True)
class Place:
    """Where a tensor lies: which file, from which byte on, its type and shape."""

    file: int
    start: int
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def n_bytes(self) -> int:
        return self.dtype.itemsize * torch.Size(self.shape).numel()

    def part(self, first: int, n: int = 1) -> Place:
        """Entries `first` to `first + n` of the first dimension."""
        step = self.n_bytes // max(self.shape[0], 1)
        return Place(self.file, self.start + first * step, self.dtype, (n, *self.shape[1:]))


class WeightFiles(Mapping[str, Tensor]):
    """The tensors of some safetensors files by name; each `[name]` is read anew.

    The files stay open: one that is replaced by another of its name is read on as it was. One that is changed in place
    is noticed at the next read.

    Args:
        paths: the files.
        prefix: of the names that count; it is taken off them.
        keep_pages: whether the system may keep what was read in its page cache.

    Errors: `DataError` naming the file that is missing, damaged, cut short or changed.
    """

    def __init__(self, paths: Iterable[Path], prefix: str = "", keep_pages: bool = True) -> None:
        self.paths, self.keep_pages = list(paths), keep_pages
        self.places: dict[str, Place] = {}
        self.bytes_read = 0
        self._files: list[int] = []
        self._states: list[tuple[int, int]] = []
        self._lock = threading.Lock()
        try:
            for number, path in enumerate(self.paths):
                self._open(number, path, prefix)
        except BaseException:
            self.close()
            raise

    def __getitem__(self, name: str) -> Tensor:
        place = self.places[name]
        tensor = torch.empty(place.shape, dtype=place.dtype)
        self.read(place, tensor)
        return tensor

    def __contains__(self, name: object) -> bool:
        return name in self.places  # a Mapping would read the tensor to find out

    def __iter__(self) -> Iterator[str]:
        return iter(self.places)

    def __len__(self) -> int:
        return len(self.places)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: place.shape for name, place in self.places.items()}

    def read(self, place: Place, to: Tensor) -> None:
        """Fill a contiguous tensor of as many values; of another floating-point type they are rounded to it.

        Threads may read at the same time.
        """
        if to.dtype != place.dtype:
            exact = torch.empty(place.shape, dtype=place.dtype)
            self.read(place, exact)
            to.copy_(exact.view(to.shape))
            return
        path = self.paths[place.file]
        if not self._files:
            raise DataError(f"{path} is closed: the model was closed while it was in use")
        file, view = self._files[place.file], to.view(-1).view(torch.uint8).numpy().data
        done = 0
        try:
            state = _state_of(file)
            while done < len(view):
                n = self._read_some(file, view[done:], place.start + done)
                if n == 0:
                    break
                done += n
            if not self.keep_pages and hasattr(os, "posix_fadvise"):
                os.posix_fadvise(file, place.start, len(view), os.POSIX_FADV_DONTNEED)
        except OSError as error:
            raise DataError(f"{path} cannot be read: {error.strerror}") from error
        if done < len(view) or state != self._states[place.file]:
            what = "was cut short" if done < len(view) else "was changed"
            raise DataError(
                f"{path} {what} while the model was open: the weights in memory and on disk no longer belong together. "
                "Open the model again"
            )
        self.bytes_read += done  # for reports: a race of two threads may lose some

    def drop_pages(self) -> None:
        """Ask the system to forget what it keeps of the files, so that the next reads come from the disk."""
        for file in self._files:
            os.fsync(file)
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)

    def close(self) -> None:
        """Let go of the files."""
        files, self._files = self._files, []
        for file in files:
            with contextlib.suppress(OSError):
                os.close(file)

    def _read_some(self, file: int, view: memoryview, start: int) -> int:
        if hasattr(os, "preadv"):
            return os.preadv(file, [view], start)
        with self._lock:  # no such call on Windows: the place in the file is shared
            os.lseek(file, start, os.SEEK_SET)
            data = os.read(file, len(view))
        view[: len(data)] = data
        return len(data)

    def _open(self, number: int, path: Path, prefix: str) -> None:
        try:
            file = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
        except OSError as error:
            raise DataError(f"{path} cannot be read: {error.strerror}") from None
        self._files.append(file)
        state = _state_of(file)
        self._states.append(state)
        header, begin = _header(path, file, state[0])
        for name, entry in header.items():
            if name == "__metadata__" or not name.startswith(prefix):
                continue
            try:
                first, last = entry["data_offsets"]
                place = Place(number, begin + first, _DTYPES[entry["dtype"]], tuple(entry["shape"]))
            except (KeyError, TypeError, ValueError):
                raise DataError(
                    f"{path}: the header says nothing moekit reads of {name!r}: {entry}"
                ) from None
            if first < 0 or last - first != place.n_bytes:
                raise DataError(
                    f"{path} is damaged: {name!r} has {last - first} bytes for shape {place.shape}"
                )
            if begin + last > state[0]:
                raise DataError(
                    f"{path} is cut short: {name!r} ends at byte {begin + last:,}, the file at {state[0]:,}. "
                    "Copy or download it again"
                )
            self.places[name.removeprefix(prefix)] = place


def _state_of(file: int) -> tuple[int, int]:
    """What shows that a file was changed: its size, and when it was written last."""
    status = os.fstat(file)
    return status.st_size, status.st_mtime_ns


def _header(path: Path, file: int, size: int) -> tuple[dict[str, Any], int]:
    """The JSON header, and where the tensors begin."""
    with os.fdopen(os.dup(file), "rb") as stream:
        stream.seek(0)
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > min(_LARGEST_HEADER, size - 8):
            raise DataError(f"{path} is damaged, cut short or no safetensors file: its header has no end")
        try:
            header = json.loads(stream.read(length))
        except ValueError as error:
            raise DataError(f"{path} is damaged or no safetensors file: {error}") from None
    if not isinstance(header, dict):
        raise DataError(f"{path} is no safetensors file: its header is no object")
    return header, 8 + length
