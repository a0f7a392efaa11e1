"""Settings of every test: one thread (tiny tensors are slower on two) and no deadlines by the clock."""

from __future__ import annotations

import os
from pathlib import Path

import hypothesis
import pytest
import torch

torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"  # for the processes that tests start
os.environ.setdefault("KERAS_BACKEND", "torch")  # Keras itself would look for TensorFlow

# a deadline in milliseconds fails by chance on a busy machine
hypothesis.settings.register_profile("moekit", deadline=None, derandomize=True, max_examples=50)
hypothesis.settings.load_profile("moekit")


@pytest.fixture(autouse=True)
def _fresh_seed() -> None:
    """Every test starts from the same random numbers, whatever ran before it."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the checkout."""
    return Path(__file__).resolve().parents[1]
