"""What a configuration will cost, before a module exists: parameters, active parameters and FLOPs per token.

A multiply-add counts as two FLOPs. Counted are the matrix products (attention's scores and values among them,
the output matrix too), not norms, activations or softmax. "Active" is what one token touches: everything but
the routed experts it does not visit; embeddings count in full. A router with a variable number of experts per
token counts with its `top_k`. `top_k` and `n_experts` of a call (`moekit.layers.elastic`) count by
`at_setting`: what the router multiplies is the same for each of them.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from moekit.config.attention import LatentAttentionConfig
from moekit.config.encoder import EncoderConfig
from moekit.config.errors import ConfigError, UntaughtRouterWarning
from moekit.config.model import AnyConfig, ModelConfig, TransformerXLConfig
from moekit.config.moe import MoEConfig
from moekit.config.task import TaskModelConfig
from moekit.kernels.expert_weights import GATED
from moekit.layers.elastic import Elastic
from moekit.layers.moe import MoE
from moekit.layers.routing import build_router


@dataclass(frozen=True)
class Cost:
    """Parameters of a part of a model: stored, touched by a token, and those that multiply a token."""

    total: int
    active: int
    matmul: int

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.total + other.total, self.active + other.active, self.matmul + other.matmul)


def at_setting(config: ModelConfig | EncoderConfig, elastic: Elastic) -> ModelConfig | EncoderConfig:
    """The configuration whose active parameters and FLOPs are those of calls with `elastic`.

    A `top_p` has no number of experts: it counts as the most that a token may take.

    >>> from moekit.config.moe import MoEConfig
    >>> config = ModelConfig(moe=MoEConfig(n_experts=8, top_k=2))
    >>> expert = (active_parameters(config) - active_parameters(at_setting(config, Elastic(top_k=1)))) // 4
    >>> expert == 3 * 256 * 512    # of each of the four layers
    True
    """
    if elastic.top_k is None or config.moe is None:
        return config
    changes = {index: {**change, "top_k": elastic.top_k} for index, change in config.moe_by_layer.items()}
    return config.replace(moe=config.moe.replace(top_k=elastic.top_k), moe_by_layer=changes)


def within_budget(
    config: ModelConfig | EncoderConfig,
    settings: Sequence[Elastic],
    *,
    flops: float | None = None,
    active: float | None = None,
) -> Elastic:
    """The dearest of `settings` whose FLOPs per token and active parameters stay within a budget.

    Errors: `ConfigError` naming the cheapest one's cost where none does.

    >>> from moekit.config.moe import MoEConfig
    >>> config = ModelConfig(moe=MoEConfig(n_experts=8, top_k=2))
    >>> budget = flops_per_token(at_setting(config, Elastic(top_k=3)))
    >>> within_budget(config, [Elastic(top_k=k) for k in (1, 2, 3, 4)], flops=budget).top_k
    3
    """
    costs = []
    for setting in settings:
        fitted = at_setting(config, setting)
        costs.append((flops_per_token(fitted), active_parameters(fitted), setting))
    fitting = [
        cost
        for cost in costs
        if (flops is None or cost[0] <= flops) and (active is None or cost[1] <= active)
    ]
    if fitting:
        return max(fitting, key=lambda cost: cost[0])[2]
    least = min(costs, key=lambda cost: cost[0])
    raise ConfigError(
        f"no setting stays within {f'{flops:.0f} FLOPs' if flops is not None else ''}"
        f"{' and ' if flops is not None and active is not None else ''}"
        f"{f'{active:.0f} active parameters' if active is not None else ''} per token: the cheapest ({least[2]}) takes "
        f"{least[0]} FLOPs and {least[1]} active parameters. Raise the budget"
    )


def total_parameters(config: AnyConfig | TaskModelConfig) -> int:
    """All stored parameters."""
    if isinstance(config, TaskModelConfig):
        return _task(config).total
    return _cost(config).total


def active_parameters(config: AnyConfig | TaskModelConfig) -> int:
    """Parameters that one token touches."""
    if isinstance(config, TaskModelConfig):
        return _task(config).active
    return _cost(config).active


def flops_per_token(config: AnyConfig, context: int | None = None, training: bool = False) -> int:
    """FLOPs of a token in a forward pass, or forward and backward (three times as many).

    Args:
        config: the model.
        context: keys a token attends to, on average; where None, that of a full causal sequence of
            `max_seq_len` (and a full memory for Transformer-XL); all of a longest text for an encoder.
        training: count the backward pass too.
    """
    if context is None:
        context = (config.max_seq_len + 1) // 2
        if isinstance(config, TransformerXLConfig):
            context = (config.max_seq_len + 1) // 2 + config.memory_length
        elif isinstance(config, EncoderConfig):
            context = config.max_seq_len
    scores_and_values = 2 * config.n_layers * context * config.n_heads * config.head_width
    if isinstance(config, ModelConfig):
        scores_and_values = sum(_attended(config, index, context) for index in range(config.n_layers))
    if isinstance(config, TransformerXLConfig):
        # scores have a second term, query times relative position
        scores_and_values += config.n_layers * context * config.n_heads * config.head_width
    forward = 2 * (_cost(config).matmul + scores_and_values)
    return 3 * forward if training else forward


def _attended(config: ModelConfig, layer: int, context: int) -> int:
    """Multiply-adds of a token's scores and values in a layer."""
    latent = config.latent_attention
    widths = config.head_width + (config.head_width if latent is None else latent.d_value)
    return min(context, config.window_of(layer) or context) * config.n_heads * widths


def _cost(config: AnyConfig) -> Cost:
    if isinstance(config, EncoderConfig):
        return _encoder(config)
    table = config.vocab_size * config.d_model
    # the output matrix multiplies each token; an untied embedding is only looked up
    vocabulary = Cost(table, table, table) if config.tie_embeddings else Cost(2 * table, 2 * table, table)
    if isinstance(config, TransformerXLConfig):
        return vocabulary + _transformer_xl(config)
    layers = Cost(config.d_model, config.d_model, 0)  # the last norm
    for index in range(config.n_layers):
        layers = layers + _attention(config)
        moe = config.moe_of(index)
        if moe is not None:
            layers = layers + moe_cost(config.d_model, moe)
        else:
            layers = layers + _mlp(config.d_model, config.d_ff, config.activation, config.mlp_bias)
    return vocabulary + layers


def _attention(config: ModelConfig) -> Cost:
    if config.latent_attention is not None:
        return _latent_attention(config, config.latent_attention)
    d, width = config.d_model, config.head_width
    queries, keys = config.n_heads * width, config.kv_heads * width
    matrices = d * (queries + 2 * keys) + queries * d
    rest = 2 * d  # the two norms of the layer
    if config.attention_bias:
        rest += queries + 2 * keys
    if config.qk_norm == "head":
        rest += 2 * width
    elif config.qk_norm == "full":
        rest += queries + keys
    rest += d * config.attention_out_bias + config.n_heads * config.attention_sinks
    return Cost(matrices + rest, matrices + rest, matrices)


def _latent_attention(config: ModelConfig, latent: LatentAttentionConfig) -> Cost:
    d, heads = config.d_model, config.n_heads
    queries = heads * config.head_width
    matrices = d * (latent.kv_rank + latent.d_rope) + latent.kv_rank * heads * (
        latent.d_nope + latent.d_value
    )
    matrices += heads * latent.d_value * d
    rest, biases = 2 * d + latent.kv_rank, latent.kv_rank + latent.d_rope
    if latent.q_rank is None:
        matrices += d * queries
    else:
        matrices += d * latent.q_rank + latent.q_rank * queries
        rest, biases = rest + latent.q_rank, biases + latent.q_rank
    rest += biases * config.attention_bias + d * config.attention_out_bias
    return Cost(matrices + rest, matrices + rest, matrices)


def _mlp(d_model: int, width: int, activation: str, bias: bool, d_out: int | None = None) -> Cost:
    inner = width * (2 if activation in GATED else 1)
    out = d_out if d_out is not None else d_model
    matrices = inner * d_model + width * out
    total = matrices + (inner + out if bias else 0)
    return Cost(total, total, matrices)


def moe_cost(d_model: int, config: MoEConfig) -> Cost:
    """Parameters of one `MoE` layer with stacked experts."""
    expert = _mlp(d_model, config.d_expert, config.activation, config.bias, config.d_out)
    visited = min(config.top_k, config.n_experts)
    cost = Cost(expert.total * config.n_experts, expert.active * visited, expert.matmul * visited)
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore", UntaughtRouterWarning)  # nothing is trained here
        parameters = list(build_router(d_model, config).parameters())
    router = sum(p.numel() for p in parameters)
    cost = cost + Cost(router, router, sum(p.numel() for p in parameters if p.dim() > 1))  # not its bias
    if config.shared_width:
        cost = cost + _mlp(d_model, config.shared_width, config.activation, config.bias)
        if config.shared_gate:
            cost = cost + Cost(d_model, d_model, d_model)
    if config.linear_path:
        size = d_model * (config.d_out or d_model)
        cost = cost + Cost(size, size, size)
    if config.output_bias:
        cost = cost + Cost(config.d_out or d_model, config.d_out or d_model, 0)
    constants = config.null_experts.constant * 3 * d_model
    return cost + Cost(constants, constants, 0)


def _task(config: TaskModelConfig) -> Cost:
    """Counted on the model itself, whose stems and heads are of many kinds; tables count in full."""
    from moekit.models.task_model import TaskModel

    with torch.device("meta"):
        model = TaskModel(config)
    total = sum(p.numel() for p in model.parameters())
    costs = [moe_cost(config.d_model, layer.config) for layer in model.moe_layers if isinstance(layer, MoE)]
    untouched = sum(cost.total - cost.active for cost in costs)
    if model.task_experts is not None:
        untouched += model.task_experts.untouched
    return Cost(total, total - untouched, 0)


def _encoder(config: EncoderConfig) -> Cost:
    d, n_labels = config.d_model, len(config.labels)
    tables = (config.vocab_size + config.max_seq_len + config.n_token_types) * d
    # pooler and classes work once per text, not once per token
    head = (d * d + d) * config.pooler + (d * n_labels + n_labels)
    cost = Cost(tables + 2 * d + head, tables + 2 * d + head, 0)
    attention = 4 * d * d
    rest = 4 * d + 4 * d  # biases, and two norms
    for index in range(config.n_layers):
        moe = config.moe_of(index)
        block = moe_cost(d, moe) if moe is not None else _mlp(d, config.d_ff, config.activation, True)
        cost = cost + Cost(attention + rest, attention + rest, attention) + block
    return cost


def _transformer_xl(config: TransformerXLConfig) -> Cost:
    d, width = config.d_model, config.n_heads * config.head_width
    per_token = 3 * d * width + width * d + 2 * d * config.d_ff
    # relative positions pass their matrix once per segment, not once per token
    layer = per_token + d * width + config.d_ff + d + 4 * d
    total = config.n_layers * layer + 2 * width + (2 * d if config.pre_norm else 0)
    return Cost(total, total, config.n_layers * per_token)
