"""What one model costs and gives at several routing settings: the table behind `moekit evaluate --k`."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from typing import Any

from torch import nn

from moekit.config.errors import ConfigError
from moekit.config.model import AnyConfig, ModelConfig
from moekit.data.loader import evaluation_batches
from moekit.data.prepare import PreparedData
from moekit.evaluate.metrics import Setting, evaluate_split, inference_speeds, mean_bits_per_byte
from moekit.layers.elastic import Elastic
from moekit.models.accounting import active_parameters, at_setting, flops_per_token
from moekit.models.elastic import AtSetting

SPEED_BATCHES = 8


def evaluate_settings(
    model: nn.Module, config: AnyConfig, data: PreparedData, setting: Setting, choices: Sequence[Elastic]
) -> list[dict[str, Any]]:
    """A row for each of `choices`: quality, cost and speed of the same weights, JSON-ready.

    Quality is the mean bits per byte over the domains of the validation split, `change` its share over the lowest of
    all rows; active parameters and FLOPs are of a token, forward; for the speed the settings take turns on every batch.

    Errors: `ConfigError` where the model's routers cannot follow a setting, before anything is measured.
    """
    if not isinstance(config, ModelConfig):
        raise ConfigError(
            "settings of routing can be compared in a sparse decoder; this model is none. Leave out --k"
        )
    models = {str(choice): AtSetting(model, choice) for choice in choices}
    rows: list[dict[str, Any]] = []
    for choice in choices:
        found = evaluate_split(models[str(choice)], data.validation, data.tokenizer, setting)
        fitted = at_setting(config, choice)
        rows.append(
            {
                "setting": str(choice),
                "top_k": choice.top_k,
                "bits_per_byte": mean_bits_per_byte(found),
                "active_parameters": active_parameters(fitted),
                "flops_per_token": flops_per_token(fitted),
            }
        )
    best = min(row["bits_per_byte"] for row in rows)
    batches = islice(evaluation_batches(data.validation, setting.batch_size, setting.seq_len), SPEED_BATCHES)
    speeds = inference_speeds(dict(models), batches, setting.device, setting.dtype)
    return [
        {**row, "change": row["bits_per_byte"] / best - 1, "tokens_per_second": speeds[row["setting"]]}
        for row in rows
    ]
