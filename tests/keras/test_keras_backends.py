"""A model saved on one backend answers the same on another, with the same gradients; and back."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("keras.ops", reason="Keras 3 is not installed")

import keras
from keras_gradients import gradients

from moekit.keras import MixtureOfExperts

HERE = Path(__file__).parent
OTHERS = ("jax", "tensorflow")


def installed(backend: str) -> str:
    if importlib.util.find_spec(backend) is None:
        pytest.skip(f"{backend} is not installed")
    if keras.config.backend() == backend:
        pytest.skip(f"{backend} is the backend of this process")
    return backend


def run(backend: str, *command: str) -> subprocess.CompletedProcess[str]:
    """Python on another backend of Keras."""
    quiet = {"TF_CPP_MIN_LOG_LEVEL": "3", "JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(
        [sys.executable, *command],
        env={**os.environ, **quiet, "KERAS_BACKEND": backend},
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
    )


@pytest.mark.parametrize("backend", OTHERS)
def test_saved_here_and_loaded_there_is_equal_and_back(tmp_path, backend):
    installed(backend)
    rng = np.random.default_rng(0)
    x = rng.normal(size=(3, 5, 8)).astype("float32")
    inputs = keras.Input((5, 8))
    experts = MixtureOfExperts(6, 7, 2, bias=True, name="experts")
    hidden, routing = experts(inputs, return_routing=True)
    outputs = {"answers": keras.layers.Dense(4)(hidden), "experts": routing["expert_indices"]}
    model = keras.Model(inputs, outputs)
    for variable in model.trainable_variables:
        variable.assign(rng.normal(size=variable.shape))
    model.save(tmp_path / "model.keras")
    np.save(tmp_path / "inputs.npy", x)

    done = run(backend, str(HERE / "other_backend.py"), str(tmp_path))
    assert done.returncode == 0, done.stderr
    theirs = np.load(tmp_path / "answers.npz")
    assert str(theirs["backend"]) == backend
    assert_equal(model, x, theirs, "before")

    def loss():
        y, routing = experts(x, return_routing=True)
        return keras.ops.mean(keras.ops.square(y)) + routing["load_balance"]

    ours = gradients(experts, loss)
    assert {f"gradient_{name}" for name in ours} == {name for name in theirs if name.startswith("gradient_")}
    for name, value in ours.items():
        assert np.abs(value).max() > 1e-3, name
        np.testing.assert_allclose(theirs[f"gradient_{name}"], value, rtol=1e-3, atol=1e-4, err_msg=name)

    assert_equal(keras.saving.load_model(tmp_path / "back.keras"), x, theirs, "after")
    assert np.abs(theirs["after_answers"] - theirs["before_answers"]).max() > 0.1  # the change arrived


def assert_equal(model, x, theirs, when: str) -> None:
    """Equal choices of experts, equal answers."""
    ours = model.predict(x, verbose=0)
    np.testing.assert_array_equal(ours["experts"], theirs[f"{when}_experts"])
    np.testing.assert_allclose(ours["answers"], theirs[f"{when}_answers"], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("backend", OTHERS)
def test_every_test_of_the_layer_passes_there(backend):
    installed(backend)
    done = run(backend, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(HERE / "test_keras_layer.py"))
    assert done.returncode == 0, done.stdout
