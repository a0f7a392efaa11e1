"""Which routing each micro-batch is trained at: drawn from what `train.elastic` names.

A draw depends on the run's seed, the step and the micro-batch alone. So a resumed run draws what it would have drawn,
and the random numbers of everything else stay as they are without `train.elastic`.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import product

import numpy as np

from moekit.config.elastic import ElasticConfig
from moekit.config.errors import ConfigError, require
from moekit.layers.elastic import Elastic
from moekit.layers.moe import MoE
from moekit.models.task_experts import Mixture

_STREAM = 0xE1A57  # keeps these draws apart from others of the same seed


def settings_of(config: ElasticConfig) -> list[Elastic]:
    """Every setting that may be drawn.

    >>> [str(setting) for setting in settings_of(ElasticConfig(k=(1, 2), n_experts=(4, 8)))]
    ['k=1 n=4', 'k=1 n=8', 'k=2 n=4', 'k=2 n=8']
    """
    return [Elastic(k, n) for k, n in product(config.k or (None,), config.n_experts or (None,))]


def drawn(config: ElasticConfig, seed: int, step: int, micro: int) -> Elastic:
    """The setting of micro-batch `micro` of the step after `step` steps.

    >>> config = ElasticConfig(k=(1, 2), weights=(0, 1))
    >>> drawn(config, seed=0, step=5, micro=0)
    Elastic(top_k=2, n_experts=None, top_p=None)
    """
    part = micro if config.per == "micro_batch" else 0
    chance = np.random.default_rng([_STREAM, seed, step, part])
    top_k = n_experts = None
    if config.k:
        weights = np.array(config.weights if config.weights is not None else [1.0] * len(config.k))
        top_k = int(chance.choice(config.k, p=weights / weights.sum()))
    if config.n_experts:
        n_experts = int(chance.choice(config.n_experts))
    return Elastic(top_k, n_experts)


def require_elastic(config: ElasticConfig, layers: Iterable[MoE | Mixture]) -> None:
    """Raise `ConfigError` where some layer cannot follow a setting, before anything is trained."""
    sparse = [layer for layer in layers if isinstance(layer, MoE)]
    require(sparse, "train.elastic", "set", "must be null without sparse layers in the backbone",
            "Set model.moe to have some")  # fmt: skip
    for number, layer in enumerate(sparse):
        for setting in settings_of(config):
            try:
                layer.router.require_elastic(setting)
            except ConfigError as error:
                raise ConfigError(
                    f"train.elastic ({setting}) does not fit sparse layer {number}: {error}"
                ) from None
        require(not config.n_experts or layer.router.bias_update_rate == 0, "train.elastic.n_experts",
                list(config.n_experts), "must be empty with moe.balance.bias_update_rate above 0, which would pull "
                "tokens to experts because they were closed", "Balance by moe.balance.load_balance")  # fmt: skip
