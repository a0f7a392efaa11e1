"""Small packages and documents that several tests of this folder use."""

from __future__ import annotations

import hashlib
from pathlib import Path

from moekit.data.clients import Package
from moekit.data.documents import Document


def sha256(path: Path) -> str:
    return "sha256:" + hashlib.sha256(path.read_bytes()).hexdigest()


def package_of(path: Path, **changes: object) -> Package:
    """A pip package `thing 1.0` whose digest is that of the archive."""
    fields = {"client": "pip", "name": "thing", "version": "1.0", "digest": sha256(path), "members": ("*",)}
    return Package(**{**fields, **changes})  # type: ignore[arg-type]


def numbered(domain: str, count: int, size: int = 200) -> list[Document]:
    """Documents of different words and lengths."""
    return [
        Document(
            " ".join(f"{domain}{i}w{(i * 7 + j * j) % 97}" for j in range(size // 8 + i % 5)),
            domain,
            f"{domain}/{i}",
        )
        for i in range(count)
    ]
