"""Dense twins by rule: the dense model and the Transformer-XL that a sparse model is fairly compared with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, TypeVar

from moekit.config.errors import ConfigError
from moekit.config.model import ModelConfig, TransformerXLConfig
from moekit.config.task import TaskModelConfig
from moekit.config.task_experts import TaskExpertsConfig
from moekit.models.accounting import active_parameters, total_parameters

# feed-forward widths that matrix kernels like; the twin is rounded up, so it never has fewer parameters
WIDTH_STEP = 8
AnyBackbone = TypeVar("AnyBackbone", ModelConfig, TaskModelConfig)


def dense_twin(config: AnyBackbone, equal: Literal["active", "total"] = "active") -> AnyBackbone:
    """The same model without experts, of a width that gives equal active or equal total parameters.

    The twin has at least as many parameters as asked for, by less than one step of eight columns per layer. Experts
    that tasks mix become one dense block that all tasks read (the shared bottom), wide enough for their parameters.

    >>> from moekit import MoEConfig
    >>> sparse = ModelConfig(moe=MoEConfig(n_experts=16, d_expert=344, top_k=2))
    >>> dense_twin(sparse).d_ff, dense_twin(sparse, "total").d_ff      # 2 x 344, and 16 x 344, and the router
    (696, 5512)
    """
    if isinstance(config, TaskModelConfig) and config.task_experts is not None:
        return _without_task_experts(config, config.task_experts, equal)
    if config.moe is None:
        return config
    target = active_parameters(config) if equal == "active" else total_parameters(config)
    dense = config.replace(moe=None, n_dense_layers=0, moe_every=1, dense_layers=(), moe_by_layer={})
    width = _width(lambda d_ff: total_parameters(dense.replace(d_ff=d_ff)), target)
    return dense.replace(d_ff=width)


def _without_task_experts(
    config: TaskModelConfig, experts: TaskExpertsConfig, equal: Literal["active", "total"]
) -> TaskModelConfig:
    """The backbone's twin, and a shared bottom with the parameters of the task experts and their routers."""
    counted = active_parameters if equal == "active" else total_parameters
    backbone = config.replace(task_experts=None)
    dense = dense_twin(backbone, equal)
    bottom = TaskExpertsConfig(
        kind="shared", n_experts=1, activation=experts.activation, dropout=experts.dropout
    )

    def with_width(d_expert: int) -> TaskModelConfig:
        return dense.replace(task_experts=bottom.replace(d_expert=d_expert))

    target = total_parameters(dense) + counted(config) - counted(backbone)
    return with_width(_width(lambda d_expert: total_parameters(with_width(d_expert)), target))


def transformer_xl_twin(
    config: ModelConfig, memory_length: int | None = None, **fields: Any
) -> TransformerXLConfig:
    """Transformer-XL of the same width, depth and heads with at least the active parameters of `config`.

    `fields` sets further fields of its configuration, such as `pre_norm`.
    """
    base = TransformerXLConfig(
        vocab_size=config.vocab_size,
        d_model=config.d_model,
        n_layers=config.n_layers,
        n_heads=config.n_heads,
        d_head=config.d_head,
        max_seq_len=config.max_seq_len,
        memory_length=config.max_seq_len if memory_length is None else memory_length,
        tie_embeddings=config.tie_embeddings,
    ).replace(**fields)
    target = active_parameters(config)
    return base.replace(d_ff=_width(lambda d_ff: total_parameters(base.replace(d_ff=d_ff)), target))


def _width(parameters_at: Callable[[int], int], target: int) -> int:
    """The smallest multiple of `WIDTH_STEP` with at least `target` parameters, which grow linearly."""
    at_one, at_two = parameters_at(WIDTH_STEP), parameters_at(2 * WIDTH_STEP)
    slope = at_two - at_one
    steps = 1 + max(0, -(-(target - at_one) // slope))
    if parameters_at(steps * WIDTH_STEP) < target:
        raise ConfigError(f"no feed-forward width reaches {target} parameters")
    return steps * WIDTH_STEP
