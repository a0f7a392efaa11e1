"""From a configuration to a model."""

from __future__ import annotations

from torch import nn

from moekit.config.model import ModelConfig, TransformerXLConfig


def build_model(config: ModelConfig | TransformerXLConfig) -> nn.Module:
    """The language model that `config.kind` names, with initial weights from torch's global generator."""
    if isinstance(config, TransformerXLConfig):
        from moekit.models.transformer_xl import TransformerXL

        return TransformerXL(config)
    from moekit.models.language_model import LanguageModel

    return LanguageModel(config)
