"""A model called at one routing setting: for code that calls models and knows nothing of settings."""

from __future__ import annotations

from typing import Any

from torch import nn

from moekit.config.errors import ConfigError
from moekit.layers.elastic import Elastic
from moekit.layers.moe import MoE


class AtSetting(nn.Module):
    """`model` with every call made at `elastic`; shares the model's weights and changes nothing of it.

    Errors: `ConfigError` where some sparse layer cannot follow the setting, or there is none.

    >>> import torch
    >>> from moekit import MoEConfig, ModelConfig, build_model
    >>> model = build_model(ModelConfig(vocab_size=300, d_model=32, n_layers=1, moe=MoEConfig(d_expert=16)))
    >>> out = AtSetting(model, Elastic(top_k=1))(torch.zeros(1, 5, dtype=torch.long))
    >>> int(out.routing[0].requested.sum())
    5
    """

    def __init__(self, model: nn.Module, elastic: Elastic) -> None:
        super().__init__()
        require_elastic_model(model, elastic)
        self.model, self.elastic = model, elastic

    def forward(self, *arguments: Any, **more: Any) -> Any:
        return self.model(*arguments, **({"elastic": self.elastic} if self.elastic else {}), **more)


def require_elastic_model(model: nn.Module, elastic: Elastic | None) -> None:
    """Raise `ConfigError` naming the first sparse layer of `model` that cannot follow `elastic`."""
    if not elastic:
        return
    layers = [layer for layer in getattr(model, "moe_layers", ()) if isinstance(layer, MoE)]
    if not layers:
        raise ConfigError(
            f"elastic ({elastic}) needs a model with sparse layers; {type(model).__name__} has none here"
        )
    for number, layer in enumerate(layers):
        try:
            layer.router.require_elastic(elastic)
        except ConfigError as error:
            raise ConfigError(f"sparse layer {number}: {error}") from None
