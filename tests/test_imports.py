"""Importing moekit costs no more than importing torch, and its public names are there."""

from __future__ import annotations

import subprocess
import sys

import pytest

import moekit


def processor_seconds(code: str) -> float:
    """What a fresh interpreter spends on `code`, in processor time: other programs do not count."""
    command = [sys.executable, "-c", f"{code}; import time; print(time.process_time())"]
    return float(
        subprocess.run(command, check=True, capture_output=True, text=True, stdin=subprocess.DEVNULL).stdout
    )


@pytest.fixture(scope="module")
def torch_alone() -> float:
    return min(processor_seconds("import torch") for _ in range(2))


# the second one also reads the configuration classes and the layers
@pytest.mark.parametrize(("code", "limit"), [("import moekit", 0.3), ("import moekit; moekit.MoE", 0.8)])
def test_import_costs_no_more_than_torch_and_a_little(torch_alone, code, limit):
    assert min(processor_seconds(code) for _ in range(2)) <= torch_alone + limit


def test_import_alone_loads_nothing_heavy():
    heavy = ("torch", "numpy", "pydantic", "rich", "click", "yaml")
    code = f"import sys, moekit; print([name for name in {heavy} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert result.stdout.strip() == "[]"


@pytest.mark.parametrize("name", moekit.__all__)
def test_every_public_name_loads(name):
    assert getattr(moekit, name) is not None
    assert name in dir(moekit)


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(AttributeError, match="build_model"):
        moekit.nonsense  # noqa: B018


def test_the_package_is_typed(repository):
    assert (repository / "src" / "moekit" / "py.typed").exists()
