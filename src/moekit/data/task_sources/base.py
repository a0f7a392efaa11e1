"""The registry of named sources of examples: one function and one line add a source."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from moekit.config.errors import ConfigError, nearest
from moekit.data.clients import Package
from moekit.data.examples import TaskData
from moekit.data.registry import PackageFolder, fetch_package

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Fetcher:
    """How a source gets its packages: with the user's progress line, and without a network where that is forbidden."""

    offline: bool = False
    progress: Progress = field(default=lambda message: None)

    def __call__(self, package: Package) -> PackageFolder:
        """The package's files; see `fetch_package` for what it raises."""
        return fetch_package(package, offline=self.offline, progress=self.progress)


@dataclass(frozen=True)
class TaskSource:
    """A named source.

    Attributes: load: makes the examples; its first argument is a `Fetcher`, the others are the source's options, each
        with a default. description: what the examples are, and how many. columns: the names of the columns and what
        they hold. licence: in a few words. research_only: whether the licence forbids other use.
    """

    name: str
    load: Callable[..., TaskData] = field(repr=False)
    description: str
    columns: Mapping[str, str]
    licence: str
    research_only: bool = False

    @property
    def options(self) -> dict[str, Any]:
        """The options and their defaults."""
        parameters = list(inspect.signature(self.load).parameters.values())[1:]
        return {parameter.name: parameter.default for parameter in parameters}


TASK_SOURCES: dict[str, TaskSource] = {}


def register_source(
    name: str, description: str, *, columns: Mapping[str, str], licence: str, research_only: bool = False
) -> Callable[[Callable[..., TaskData]], Callable[..., TaskData]]:
    """Decorator: the function becomes the source `name`."""

    def add(load: Callable[..., TaskData]) -> Callable[..., TaskData]:
        TASK_SOURCES[name] = TaskSource(name, load, description, dict(columns), licence, research_only)
        return load

    return add


def task_sources() -> dict[str, TaskSource]:
    """All sources, those of moekit and those that others registered, by name."""
    package = importlib.import_module("moekit.data.task_sources")
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"moekit.data.task_sources.{module.name}")
    return dict(sorted(TASK_SOURCES.items()))


def load_source(name: str, options: Mapping[str, Any], fetch: Fetcher) -> TaskData:
    """The examples of a named source.

    Errors: `ConfigError` for an unknown source or option, with the nearest name; `DataError` where a package cannot be
    had or is not what its hash says.
    """
    known = task_sources()
    if name not in known:
        raise ConfigError(f"data.source {name!r} is unknown: {nearest(name, known)}")
    source = known[name]
    for option in options:
        if option not in source.options:
            raise ConfigError(
                f"data.options.{option} is no option of {name!r}: {nearest(option, source.options)}"
            )
    return source.load(fetch, **options)
