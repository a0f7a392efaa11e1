"""Small gauges, and contestants without a model behind them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from moekit.evaluate.bench import limits
from moekit.evaluate.bench.checks import Tolerance
from moekit.evaluate.bench.compare import Contestant, Work


@pytest.fixture(autouse=True)
def _small_gauges(monkeypatch) -> None:
    """The limits of the machine mean nothing then; measuring them takes no time."""
    monkeypatch.setattr(limits, "MATRIX", 32)
    monkeypatch.setattr(limits, "BUFFER", 4096)


@pytest.fixture
def contestant() -> Callable[..., Contestant]:
    """Make one that answers `answer` where `truth` is right."""
    truth = torch.arange(1.0, 13.0).reshape(3, 4)

    def make(name: str, answer: torch.Tensor | None = None, **fields: Any) -> Contestant:
        fields.setdefault("run", lambda: {"output": truth if answer is None else answer})
        fields.setdefault("work", Work(flops=6.0, bytes=3.0, tokens=2))
        tolerance = {"output": Tolerance(0.01, 0.04)}
        return Contestant(name, expected=lambda: {"output": truth}, tolerance=tolerance, **fields)

    make.truth = truth  # type: ignore[attr-defined]
    return make
