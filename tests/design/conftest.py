"""Subjects of a search on a task that trains in a second."""

from __future__ import annotations

import pytest
from tiny_design import Accuracy, tiny_config

from moekit.design.subject import Subject


@pytest.fixture
def subject(tmp_path) -> Subject:
    """The points, improved by accuracy."""
    return Subject("points", tiny_config(tmp_path), "label.accuracy", True, Accuracy())


@pytest.fixture
def by_loss(tmp_path) -> Subject:
    """The points, improved by loss: needs no library of metrics."""
    return Subject("points", tiny_config(tmp_path))
