"""What the routers inside a finished Keras model do: a second model over the same layers."""

from __future__ import annotations

from typing import Any

import keras

from moekit.config.errors import ConfigError
from moekit.keras.layer import MixtureOfExperts


def routing_model(model: keras.Model) -> keras.Model:
    """A model from the inputs of `model` to the routing of each of its `MixtureOfExperts`, by the layer's name.

    It holds the layers of `model` themselves, so that it shows what they do now, after any training of `model`. It
    works for functional and sequential models, loaded ones too. Of a layer that is called several times it shows the
    first call; layers inside a nested model are that model's: ask for `routing_model(nested)`.

    It calls a layer of its own around each of them, because Keras 3.15 checks a graph with the number of tensors that
    the first call of a layer returned: another call that returns more, the routing too, counts as not connected.

    Errors: `ConfigError` where `model` has no symbolic inputs yet, or no `MixtureOfExperts` among its layers.

    >>> inputs = keras.Input((5, 16))
    >>> model = keras.Model(inputs, MixtureOfExperts(n_experts=8, d_expert=32, top_k=2, name="experts")(inputs))
    >>> routing = routing_model(model)(keras.ops.ones((3, 5, 16)))
    >>> tuple(routing["experts"]["expert_indices"].shape), int(keras.ops.sum(routing["experts"]["tokens_per_expert"]))
    ((3, 5, 2), 30)
    """
    if not getattr(model, "inputs", None):
        raise ConfigError(
            f"model ({type(model).__name__}) has no symbolic inputs: give a functional model, or call a sequential one "
            "on keras.Input(...) first; in a subclassed model, call the layer with return_routing=True"
        )
    layers = [layer for layer in model.layers if isinstance(layer, MixtureOfExperts)]
    if not layers:
        names = ", ".join(layer.name for layer in model.layers)
        raise ConfigError(
            f"model must have a MixtureOfExperts among its layers; got {names}. Of a nested model, give that one"
        )
    # the structure of a functional model's inputs; a sequential one has a single input and no such attribute
    inputs = model.inputs[0] if isinstance(model, keras.Sequential) else model.input
    return keras.Model(inputs, {layer.name: _routing(layer) for layer in layers})


def _routing(layer: MixtureOfExperts) -> dict[str, Any]:
    """The routing, symbolic, at the inputs of the layer's first call."""
    inputs = layer.input
    tokens, mask = inputs if isinstance(inputs, list | tuple) else (inputs, None)
    routing: dict[str, Any] = _Routing(layer)(tokens, mask=mask)
    return routing


class _Routing(keras.layers.Layer):
    """A layer around another one, of which it returns the routing alone."""

    def __init__(self, experts: MixtureOfExperts) -> None:
        super().__init__(name=f"{experts.name}_routing", dtype=experts.dtype_policy)
        self.experts = experts
        self.supports_masking = True

    def call(self, inputs: Any, mask: Any = None, training: bool | None = None) -> dict[str, Any]:
        _, routing = self.experts(inputs, mask=mask, training=training, return_routing=True)
        return dict(routing)

    def compute_output_spec(
        self, inputs: Any, mask: Any = None, training: bool | None = None
    ) -> dict[str, Any]:
        _, routing = self.experts.compute_output_spec(inputs, mask=mask, return_routing=True)
        return dict(routing)
