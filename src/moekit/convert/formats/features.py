"""What is special about a decoder, as words that a format accepts or not.

Each feature has one value in each layer it concerns. A family lists the values it can express; the plain value always
fits. So the choice of a family and the error where none fits come from one table.
"""

from __future__ import annotations

from collections.abc import Mapping

from moekit.config.model import ModelConfig
from moekit.config.moe import MoEConfig, QuantizationConfig
from moekit.layers.routing import ROUTERS

PLAIN = {
    "attention_biases": "none", "attention_sinks": "no", "sliding_window": "none",
    "latent_attention": "no", "qk_norm": "none", "rotary_share": "1.0", "mlp_bias": "no", "activation": "swiglu",
    "feed_forward": "dense", "dense_layers": "none", "router": "none", "logit_bias": "no", "selection_bias": "no",
    "shared_experts": "none", "weight_scale": "1.0", "experts": "swiglu", "combine": "weighted_sum",
    "null_experts": "0", "linear_path": "no", "output_bias": "no", "capacity_factor": "none", "rope_scaling": "none",
    "layer_sizes": "equal", "layer_routers": "equal", "shared_width": "whole experts",
    "head_width": "d_model / n_heads",
    "merged_experts": "no", "expert_families": "no", "quantization": "none", "linear_quantization": "none",
}  # fmt: skip

Found = dict[str, dict[str, list[int]]]  # feature -> value -> layers


def features(config: ModelConfig) -> Found:
    """The features of a decoder: `{feature: {value: layers}}`, from 0."""
    layers = list(range(config.n_layers))
    found: Found = {
        "attention_biases": {_biases(config): layers},
        "attention_sinks": {_yes(config.attention_sinks): layers},
        "sliding_window": {_window(config): layers},
        "latent_attention": {_yes(config.latent_attention is not None): layers},
        "qk_norm": {config.qk_norm: layers},
        "head_width": {_head_width(config): layers},
        "rotary_share": {str(float(config.rotary_share)): layers},
        "rope_scaling": {config.rope_scaling.kind if config.rope_scaling else "none": layers},
        "feed_forward": {"sparse" if config.moe_layers else "dense": layers},
        "dense_layers": {_dense_layers(config): layers},
        "linear_quantization": {_bits(config.linear_quantization): layers},
    }
    dense = [layer for layer in layers if not config.is_moe_layer(layer)]
    if dense:
        found["activation"] = {config.activation: dense}
        found["mlp_bias"] = {_yes(config.mlp_bias): dense}
    sizes, routers = set(), set()
    for layer in config.moe_layers:
        moe = config.moe_of(layer)
        assert moe is not None
        sizes.add((moe.n_experts, moe.top_k, moe.d_expert, moe.shared_width, moe.weight_scale))
        routers.add(_whole_router(moe))
        for name, value in _of_layer(moe).items():
            found.setdefault(name, {}).setdefault(value, []).append(layer)
    if config.moe_layers:
        for name, values in (("layer_sizes", sizes), ("layer_routers", routers)):
            found[name] = {"equal" if len(values) == 1 else "different": list(config.moe_layers)}
    return found


def misfits(found: Found, accepted: Mapping[str, tuple[str, ...]]) -> list[str]:
    """What a format that accepts these values beside the plain ones cannot express, in words."""
    wrong = []
    for name, values in found.items():
        allowed = accepted.get(name, (PLAIN[name],))
        for value, layers in values.items():
            if value not in allowed:
                where = (
                    ""
                    if len(values) == 1
                    else f" in layer{'s' * (len(layers) > 1)} {', '.join(map(str, layers))}"
                )
                wrong.append(f"{name} {value!r}{where}")
    return wrong


def _of_layer(moe: MoEConfig) -> dict[str, str]:
    return {
        "router": _router(moe),
        "logit_bias": _yes(bool(moe.router.options.get("logit_bias"))),
        "selection_bias": _yes(moe.balance.bias_update_rate > 0),
        "shared_experts": "none" if not moe.n_shared_experts else "gated" if moe.shared_gate else "plain",
        "shared_width": "other" if moe.shared_width % moe.d_expert else "whole experts",
        "weight_scale": str(float(moe.weight_scale)) if moe.weight_scale == 1.0 else "other",
        "experts": moe.activation + (" with biases" if moe.bias else ""),
        "combine": moe.combine,
        "null_experts": str(moe.null_experts.total),
        "linear_path": _yes(moe.linear_path),
        "output_bias": _yes(moe.output_bias),
        "capacity_factor": "none" if moe.capacity_factor is None else str(moe.capacity_factor),
        "merged_experts": _yes(moe.merged_into is not None),
        "expert_families": _yes(moe.families),
        "quantization": _bits(moe.quantization),
    }


def _router(moe: MoEConfig) -> str:
    """The rule in words that tell apart what formats tell apart."""
    name, options = moe.router.name, moe.router.options
    if name == "softmax":
        return f"softmax {options.get('normalize', 'after')}"
    if name == "sigmoid":
        return "sigmoid normalized" if options.get("normalize", True) else "sigmoid"
    if name == "group_limited":
        score = options.get("score", "sigmoid")
        return f"groups by {score}{' normalized' if options.get('normalize', True) else ''}"
    return name


def _whole_router(moe: MoEConfig) -> str:
    """Name and all options, defaults filled in."""
    options = ROUTERS[moe.router.name].Options.from_dict(moe.router.options)
    return f"{moe.router.name}: {options!r}"


def _bits(quantization: QuantizationConfig | None) -> str:
    return "none" if quantization is None else f"{quantization.bits} bits"


def _yes(value: bool) -> str:
    return "yes" if value else "no"


def _biases(config: ModelConfig) -> str:
    """Of attention's maps: none, those into it, the one out of it, or all."""
    return {(False, False): "none", (True, False): "in", (False, True): "out", (True, True): "all"}[
        config.attention_bias, config.attention_out_bias
    ]


def _window(config: ModelConfig) -> str:
    if config.sliding_window is None:
        return "none"
    windows = {config.window_of(layer) for layer in range(config.n_layers)}
    return "some layers" if len(windows) > 1 else "none" if windows == {None} else "all layers"


def _head_width(config: ModelConfig) -> str:
    plain = config.latent_attention is not None or config.head_width * config.n_heads == config.d_model
    return "d_model / n_heads" if plain else "other"


def _dense_layers(config: ModelConfig) -> str:
    """Which layers of a sparse model are dense: none, the first ones, or a pattern."""
    sparse = config.moe_layers
    if not sparse or len(sparse) == config.n_layers:
        return "none"
    return "first" if sparse == tuple(range(sparse[0], config.n_layers)) else "some"
