"""Unpacking of archives from elsewhere: nothing leaves the folder, no links, no devices, no bombs."""

from __future__ import annotations

import contextlib
import fnmatch
import gzip
import lzma
import shutil
import subprocess
import tarfile
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import IO

from moekit.config.errors import DataError

MAX_FILE_BYTES = 256 * 2**20
MAX_TOTAL_BYTES = 1024 * 2**20
MAX_MEMBERS = 100_000
_BLOCK = 2**20
_BROKEN = (tarfile.TarError, zipfile.BadZipFile, gzip.BadGzipFile, zlib.error, lzma.LZMAError, EOFError)


def unpack(archive: Path, folder: Path, members: Sequence[str] = ("*",)) -> list[str]:
    """Write those files of an archive (.tar.gz, .tgz, .zip, .whl, .deb) that match a pattern into `folder`.

    Every member is checked, wanted or not, and one bad member refuses the whole archive. Sizes are counted as
    bytes come out, so a header that lies about them does not help. Permissions, owners and times are not
    restored.

    Returns: the paths that were written, relative to `folder`, sorted.

    Raises: DataError: for a path that is absolute or leaves the folder, a link (a hard link only where it matches a
        pattern), a device, a double, too many members or too many bytes, or a file that is no such archive.
    """
    written: list[str] = []
    total = 0
    count = 0
    try:
        for name, kind, stream in _members(archive):
            count += 1
            if count > MAX_MEMBERS:
                raise DataError(f"{archive.name}: more than {MAX_MEMBERS} members; refused")
            path = _safe_path(archive, name)
            wanted = any(fnmatch.fnmatchcase(path, pattern) for pattern in members)
            # packages of Debian store equal files as hard links; where none is asked for, none is made
            if kind == "other" or (kind == "hard link" and wanted):
                raise DataError(f"{archive.name}: member {name!r} is a link or a device; refused")
            if kind != "file" or not wanted:
                continue
            target = folder / path
            target.parent.mkdir(parents=True, exist_ok=True)
            if target.exists():
                raise DataError(f"{archive.name}: member {name!r} comes twice; refused")
            total += _copy(archive, name, stream, target, MAX_TOTAL_BYTES - total)
            written.append(path)
    except _BROKEN as error:
        raise DataError(f"{archive.name} is not a complete archive: {error}") from error
    return sorted(written)


def _safe_path(archive: Path, name: str) -> str:
    path = PurePosixPath(name)
    parts = path.parts
    bad = (
        not name
        or path.is_absolute()
        or ".." in parts
        or "\\" in name
        or "\0" in name
        or (parts and ":" in parts[0])  # a drive letter
    )
    if bad:
        raise DataError(f"{archive.name}: member {name!r} would leave its folder; refused")
    return str(path)


def _copy(archive: Path, name: str, stream: IO[bytes], target: Path, left: int) -> int:
    size = 0
    with open(target, "xb") as file:
        while block := stream.read(_BLOCK):
            size += len(block)
            if size > MAX_FILE_BYTES or size > left:
                limit = min(MAX_FILE_BYTES, MAX_TOTAL_BYTES)
                raise DataError(
                    f"{archive.name}: member {name!r} unpacks to more than {limit} bytes; refused"
                )
            file.write(block)
    return size


def _members(archive: Path) -> Iterator[tuple[str, str, IO[bytes]]]:
    """(name, "file", "folder", "hard link" or "other", stream) of each; the stream is open until the next one."""
    if archive.name.endswith((".zip", ".whl")):
        yield from _zip_members(archive)
    elif archive.name.endswith(".deb"):
        with _deb_stream(archive) as stream, tarfile.open(fileobj=stream, mode="r|") as tar:
            yield from _tar_members(tar)
    else:
        with tarfile.open(archive, mode="r:*") as tar:
            yield from _tar_members(tar)


def _tar_members(tar: tarfile.TarFile) -> Iterator[tuple[str, str, IO[bytes]]]:
    for member in tar:
        stream = tar.extractfile(member) if member.isreg() else None
        kind = "hard link" if member.islnk() else "folder" if member.isdir() else "other"
        yield member.name, "file" if stream is not None else kind, stream  # type: ignore[misc]


def _zip_members(archive: Path) -> Iterator[tuple[str, str, IO[bytes]]]:
    with zipfile.ZipFile(archive) as zipped:
        for member in zipped.infolist():
            type_bits = (member.external_attr >> 16) & 0o170000
            kind = "folder" if member.is_dir() else "file" if type_bits in (0, 0o100000) else "other"
            with zipped.open(member) as stream:
                yield member.filename, kind, stream


@contextlib.contextmanager
def _deb_stream(archive: Path) -> Iterator[IO[bytes]]:
    # dpkg-deb knows every compression that Debian uses; it only decompresses here, tarfile does the unpacking
    program = shutil.which("dpkg-deb")
    if program is None:
        raise DataError(f"{archive.name}: unpacking a .deb needs dpkg-deb, which this machine has not")
    process = subprocess.Popen([program, "--fsys-tarfile", str(archive)], stdout=subprocess.PIPE)
    assert process.stdout is not None
    try:
        yield process.stdout
    finally:
        process.stdout.close()
        process.wait()
