"""A file that another process appends to, read on from where the last look ended."""

from __future__ import annotations

import os
from pathlib import Path

BLOCK = 1 << 20  # bytes at one look
MARK = 256


class Tail:
    """The whole lines that came since the last look; a line that is half written waits for the next one.

    A file that was cut back or replaced meanwhile (a resumed run takes back lines of later steps) is read from its
    beginning again: the bytes before the place where the last look ended are no longer the same. A file that is missing
    has no lines.

    Attributes:
        path: of the file.
        restarts: how often it began anew.
        behind: whether the last look ended before the end of the file.
    """

    def __init__(self, path: Path, block: int = BLOCK) -> None:
        self.path, self.restarts, self.behind = path, 0, False
        self._block, self._offset, self._mark = block, 0, b""

    def read(self) -> tuple[list[bytes], bool]:
        """New lines, and whether they are the first ones of a file that began anew."""
        try:
            with open(self.path, "rb") as file:
                return self._read(file.fileno())
        except OSError:
            return [], self._restart()

    def _read(self, file: int) -> tuple[list[bytes], bool]:
        size = os.fstat(file).st_size
        fresh = False
        if size < self._offset or _at(file, self._offset - len(self._mark), len(self._mark)) != self._mark:
            fresh = self._restart()
        data = _at(file, self._offset, self._block)
        end = data.rfind(b"\n") + 1
        if end == 0 and len(data) == self._block:  # a line longer than that is none of moekit's
            end = len(data)
        self._mark = (self._mark + data[:end])[-MARK:]
        self._offset += end
        self.behind = self._offset + len(data) - end < size
        return data[:end].splitlines(), fresh

    def _restart(self) -> bool:
        if self._offset == 0:
            return False
        self._offset, self._mark, self.behind = 0, b"", False
        self.restarts += 1
        return True


def _at(file: int, offset: int, length: int) -> bytes:
    os.lseek(file, offset, os.SEEK_SET)
    parts = []
    while length > 0 and (part := os.read(file, length)):
        parts.append(part)
        length -= len(part)
    return b"".join(parts)
