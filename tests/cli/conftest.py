"""The command line run inside the test process, and stand-ins for the slow functions behind the verbs."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest

from moekit.cli.main import main


@dataclass(frozen=True)
class Outcome:
    """How a command ended and what it printed."""

    code: int
    out: str
    err: str


@pytest.fixture
def moekit_command(capsys) -> Callable[..., Outcome]:
    """Run `moekit ARGUMENTS`; a traceback would fail the test by itself."""

    def run(*arguments: str) -> Outcome:
        code = main(list(arguments))
        captured = capsys.readouterr()
        return Outcome(code, captured.out, captured.err)

    return run


@pytest.fixture
def stand_in(monkeypatch) -> Callable[..., None]:
    """Put functions in place of those of a module, without loading the module."""

    def put(module: str, **functions: Any) -> None:
        fake = types.ModuleType(module)
        for name, function in functions.items():
            setattr(fake, name, function)
        monkeypatch.setitem(sys.modules, module, fake)

    return put
