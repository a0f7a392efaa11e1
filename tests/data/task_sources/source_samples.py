"""Packages whose files are written by hand, in place of those of a registry."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from moekit.data.clients import Package
from moekit.data.registry import PackageFolder

Files = Mapping[str, bytes | str]


def write_package(folder: Path, package: Package, files: Files) -> PackageFolder:
    """`package` with these files and no others."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return PackageFolder(package, folder, tuple(sorted(files)))


def fetcher_of(folder: Path, packages: Mapping[str, Files]) -> Callable[[Package], PackageFolder]:
    """A fetcher that knows these packages, by name."""
    return lambda package: write_package(folder / package.name, package, packages[package.name])
