"""Gradients of a Keras layer on whichever backend Keras runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import numpy as np


def gradients(layer: keras.layers.Layer, loss: Callable[[], Any]) -> dict[str, np.ndarray]:
    """By name of each trainable variable of `layer`, of the scalar `loss()`, which calls the layer."""
    variables = layer.trainable_variables
    backend = keras.config.backend()
    if backend == "torch":
        for variable in variables:
            variable.value.grad = None
        loss().backward()
        found = [variable.value.grad for variable in variables]
    elif backend == "jax":
        import jax

        def of_values(values: list[Any]) -> Any:
            with keras.StatelessScope(state_mapping=list(zip(variables, values, strict=True))):
                return loss()

        found = jax.jit(jax.grad(of_values))([variable.value for variable in variables])
    else:
        import tensorflow as tf

        with tf.GradientTape() as tape:
            value = loss()
        found = tape.gradient(value, [variable.value for variable in variables])
        found = [None if one is None else tf.convert_to_tensor(one) for one in found]
    return {
        variable.name: keras.ops.convert_to_numpy(one)
        for variable, one in zip(variables, found, strict=True)
        if one is not None
    }
