"""What sources say about where their examples came from."""

from __future__ import annotations

from moekit.data.clients import Package
from moekit.data.documents import SourceInfo

_REGISTRIES = {"pip": "PyPI", "pip-wheel": "PyPI", "npm": "npm", "apt": "Debian"}


def origin_of(package: Package, described: str, licence: str, note: str = "") -> SourceInfo:
    """Origin and licence of examples that came out of a registry's package, with the hash that it was checked by.

    >>> from moekit.data.clients import Package
    >>> origin_of(Package("npm", "digits", "1.0", "sha512-AAAA"), "ten digits", "MIT").note
    'checked against sha512-AAAA'
    """
    if not package.digest.startswith("sha256:"):
        note = "; ".join(part for part in (note, f"checked against {package.digest}") if part)
    return SourceInfo(
        name=f"{package.name} {package.version}",
        origin=f"{_REGISTRIES[package.client]}; {described}",
        licence=licence,
        sha256=package.digest.removeprefix("sha256:") if package.digest.startswith("sha256:") else None,
        note=note,
    )
