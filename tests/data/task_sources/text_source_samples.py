"""Folders of small files in the formats of the packages behind the text sources."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from moekit.data.clients import Package
from moekit.data.examples import Examples, TaskData
from moekit.data.registry import PackageFolder


class Folders:
    """Stands for a `Fetcher`: the files given for each package, by its name."""

    def __init__(self, root: Path, files: Mapping[str, Mapping[str, str | bytes]]) -> None:
        self.root = root
        self.files = files

    def __call__(self, package: Package) -> PackageFolder:
        folder = self.root / package.name.replace("/", "-")
        for name, content in self.files[package.name].items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return PackageFolder(package, folder, tuple(sorted(self.files[package.name])))


def everything(data: TaskData, column: str) -> list[object]:
    """A column of all splits."""
    return [value for part in (data.train, data.validation, data.test) for value in part[column]]


def check_own_split(data: TaskData, together: str | None = None) -> None:
    """What holds of every source that is split here."""
    assert not data.given_test
    assert len(data.validation) == 0
    assert set(data.validation.columns) == set(data.train.columns) == set(data.test.columns)
    assert 0 < len(data.test) < len(data.train)
    if together is not None:
        assert not set(data.train[together]) & set(data.test[together])
    assert "no split is given" in data.sources[0].note


def rows(examples: Examples) -> list[dict[str, object]]:
    """The examples one by one."""
    return [{name: examples[name][i] for name in examples.columns} for i in range(len(examples))]
