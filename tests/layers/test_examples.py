"""The examples in the docstrings of layers, kernels and models run as they stand."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
from collections.abc import Iterator

import pytest

import moekit.kernels
import moekit.layers
import moekit.models
from moekit.layers.routing import ROUTERS


def modules() -> Iterator[str]:
    for package in (moekit.layers, moekit.kernels, moekit.models):
        for info in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
            yield info.name


@pytest.mark.parametrize("name", list(modules()))
def test_examples_run(name: str) -> None:
    registered = dict(ROUTERS)
    try:
        result = doctest.testmod(importlib.import_module(name))
    finally:
        ROUTERS.clear()  # an example shows how to add a router
        ROUTERS.update(registered)
    assert result.failed == 0
