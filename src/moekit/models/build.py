"""From a configuration to a model."""

from __future__ import annotations

from torch import nn

from moekit.config.encoder import EncoderConfig
from moekit.config.model import AnyConfig, TransformerXLConfig
from moekit.config.task import TaskModelConfig


def build_model(config: AnyConfig | TaskModelConfig) -> nn.Module:
    """The model that `config.kind` names, with initial weights from torch's global generator."""
    if isinstance(config, TransformerXLConfig):
        from moekit.models.transformer_xl import TransformerXL

        return TransformerXL(config)
    if isinstance(config, TaskModelConfig):
        from moekit.models.task_model import TaskModel

        return TaskModel(config)
    if isinstance(config, EncoderConfig):
        from moekit.models.encoder import Encoder

        return Encoder(config)
    from moekit.models.language_model import LanguageModel

    return LanguageModel(config)
