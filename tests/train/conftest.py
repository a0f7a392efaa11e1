"""A cache of its own for every test."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No test reads or writes the user's cache; processes that a test starts inherit the setting."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("MOEKIT_CACHE", str(folder))
    return folder
