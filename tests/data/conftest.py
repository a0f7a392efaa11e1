"""A cache of its own for every test, and archives made on the spot."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

MakeTar = Callable[..., Path]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No test reads or writes the user's cache."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("MOEKIT_CACHE", str(folder))
    return folder


@pytest.fixture
def make_tar(tmp_path: Path) -> MakeTar:
    """A .tar.gz from a dict of path -> text, plus any TarInfo objects as they are."""

    def make(files: dict[str, str], *extra: tarfile.TarInfo, name: str = "thing-1.0.tar.gz") -> Path:
        path = tmp_path / "archives" / name
        path.parent.mkdir(exist_ok=True)
        with tarfile.open(path, "w:gz") as tar:
            for member, text in files.items():
                data = text.encode()
                info = tarfile.TarInfo(member)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
            for info in extra:
                tar.addfile(info)
        return path

    return make
