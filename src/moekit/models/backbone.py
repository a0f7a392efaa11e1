"""The backbone between stems and heads: pre-norm transformer layers, each dense or sparse."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from moekit.config.backbone import BackboneConfig
from moekit.config.errors import ConfigError
from moekit.layers.attention import Attention, AttentionMask, KeyValueCache
from moekit.layers.cross_attention import CrossAttention, Memory
from moekit.layers.elastic import Elastic
from moekit.layers.experts import MLP
from moekit.layers.latent_attention import LatentAttention
from moekit.layers.moe import MoE
from moekit.layers.norm import RMSNorm
from moekit.layers.plan import RoutingPlan
from moekit.layers.quantized import quantize_linear_maps
from moekit.layers.rotary import RotaryEmbedding


@dataclass
class BackboneOutput:
    """What a pass through all layers gives.

    Attributes: hidden_states `[B, S, D]` after the last norm; aux_losses: auxiliary losses by name, each the mean over
        the sparse layers that have it; routing and layer_losses: plan and losses of each sparse layer.
    """

    hidden_states: Tensor
    aux_losses: dict[str, Tensor] = field(default_factory=dict)
    routing: tuple[RoutingPlan, ...] = ()
    layer_losses: tuple[dict[str, Tensor], ...] = ()


def mean_losses(layers: Iterable[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Each loss by name, the mean over the layers that have it: a router without probabilities has no balance loss."""
    found: dict[str, list[Tensor]] = {}
    for losses in layers:
        for name, loss in losses.items():
            found.setdefault(name, []).append(loss)
    return {name: torch.stack(losses).mean() for name, losses in found.items()}


@dataclass(frozen=True)
class LayerInputs:
    """What every layer of one forward pass shares; shapes as in `Backbone.forward`."""

    rotary: tuple[Tensor, Tensor]
    mask: AttentionMask
    token_ids: Tensor | None
    token_mask: Tensor | None
    segment_ids: Tensor | None
    cache: KeyValueCache | None
    memory: Memory | None = None
    elastic: Elastic | None = None


class BackboneLayer(nn.Module):
    """x + attention(norm(x)), then x + feed_forward(norm(x)), the latter an MLP or a MoE.

    With `cross` there is x + cross_attention(norm(x), memory) between them.
    """

    def __init__(
        self, config: BackboneConfig, index: int, may_look_ahead: bool = False, cross: bool = False
    ) -> None:
        super().__init__()
        self.index = index
        self.dropout = config.dropout
        self.attention_norm = RMSNorm(config.d_model, config.norm_eps)
        self.attention = _attention(config, index)
        self.cross_attention_norm = RMSNorm(config.d_model, config.norm_eps) if cross else None
        self.cross_attention = _cross_attention(config) if cross else None
        self.feed_forward_norm = RMSNorm(config.d_model, config.norm_eps)
        self.feed_forward: MoE | MLP
        moe = config.moe_of(index)
        if moe is not None:
            self.feed_forward = MoE(config.d_model, moe)
            if not may_look_ahead:
                _refuse_lookahead(self.feed_forward)
        else:
            self.feed_forward = MLP(
                config.d_model, config.d_ff, activation=config.activation, bias=config.mlp_bias
            )
        # shared experts are the layer's own matter, see MoE
        quantize_linear_maps(
            self, config.linear_quantization, skip=(getattr(self.feed_forward, "shared", None),)
        )

    def forward(
        self, x: Tensor, inputs: LayerInputs, earlier_counts: Tensor | None
    ) -> tuple[Tensor, dict[str, Tensor], RoutingPlan | None]:
        dense = isinstance(self.feed_forward, MLP)
        normed = self.attention_norm(x, for_products=True)
        attended = self._dropped(self.attention(normed, inputs.rotary, inputs.mask, inputs.cache, self.index))
        if self.cross_attention is not None and self.cross_attention_norm is not None:
            assert inputs.memory is not None
            x, normed = self.cross_attention_norm.add(x, attended, for_products=True)
            attended = self._dropped(self.cross_attention(normed, inputs.memory, inputs.rotary, self.index))
        # a router reads the norm in full precision
        x, normed = self.feed_forward_norm.add(x, attended, for_products=dense)
        if isinstance(self.feed_forward, MLP):
            return x + self._dropped(self.feed_forward(normed)), {}, None
        out = self.feed_forward(
            normed,
            token_ids=inputs.token_ids,
            token_mask=inputs.token_mask,
            segment_ids=inputs.segment_ids,
            earlier_counts=earlier_counts,
            elastic=inputs.elastic,
        )
        return x + self._dropped(out.hidden_states.to(x.dtype)), out.aux_losses, out.routing

    def _dropped(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout) if self.dropout and self.training else x


class Backbone(nn.Module):
    """Layers and the last norm on vectors `[B, S, D]`; `recompute` trades time for activation memory.

    Args:
        config: of the layers.
        causal: whether a token sees the earlier ones alone.
        may_look_ahead: accept routers and drop policies that see later tokens; without `causal` they always may.
        cross: every layer also attends to a memory, as a decoder behind an encoder does.
    """

    def __init__(
        self,
        config: BackboneConfig,
        *,
        causal: bool = True,
        may_look_ahead: bool = False,
        cross: bool = False,
    ) -> None:
        super().__init__()
        self.config, self.causal, self.cross = config, causal, cross
        free = may_look_ahead or not causal
        self.layers = nn.ModuleList(
            BackboneLayer(config, index, free, cross) for index in range(config.n_layers)
        )
        self.norm = RMSNorm(config.d_model, config.norm_eps)
        self.rotary = RotaryEmbedding(
            config.rotary_width, config.max_seq_len, config.rope_theta, config.rope_scaling
        )
        self.recompute = False

    @property
    def moe_layers(self) -> list[MoE]:
        """The sparse feed-forward blocks, first layer first."""
        return [layer.feed_forward for layer in self.layers if isinstance(layer.feed_forward, MoE)]

    def forward(
        self,
        x: Tensor,
        *,
        token_ids: Tensor | None = None,
        segment_ids: Tensor | None = None,
        token_mask: Tensor | None = None,
        cache: KeyValueCache | None = None,
        earlier_counts: list[Tensor] | None = None,
        memory: Memory | None = None,
        elastic: Elastic | None = None,
    ) -> BackboneOutput:
        """Run all layers.

        Args:
            x: `[B, S, D]`.
            token_ids: `[B, S]`, for routers that read them.
            segment_ids: `[B, S]` document of each token; attention stays inside a document. Not with a cache.
            token_mask: `[B, S]` False at padding. Not with a cache.
            cache: keys and values of earlier tokens; the new ones are appended.
            earlier_counts: per sparse layer, see `RoutingContext`.
            memory: what the layers also look at; needed with `cross`, and only there.
            elastic: experts per token, and which may be chosen, in this call alone; every sparse layer follows it.
        """
        if self.cross != (memory is not None):
            raise ConfigError(
                f"memory must be {'given' if self.cross else 'left out'}: cross is {self.cross} in this backbone"
            )
        batch, length, _ = x.shape
        held = cache.length if cache is not None else 0
        if cache is not None and (segment_ids is not None or token_mask is not None):
            raise ConfigError(
                "a cache cannot be used with segment_ids or token_mask; generate one document per row"
            )
        if held > 0 and any(layer.router.reads_history for layer in self.moe_layers):
            raise ConfigError(
                "a cache cannot be continued with a router that reads earlier tokens (router 'rule' with a "
                "function, or with keywords that hold beyond themselves), because it holds none; "
                "call the model on the whole text without a cache"
            )
        if cache is not None and not self.causal:
            raise ConfigError("a cache needs a causal backbone: in this one later tokens change earlier ones")
        mask = AttentionMask(batch, length, held, x.device, segment_ids, token_mask, self.causal)
        rotary = self.rotary(held, length, x)
        if memory is not None and memory.rotary is None:
            memory = replace(memory, rotary=self.rotary(0, memory.x.shape[1], x))
        inputs = LayerInputs(rotary, mask, token_ids, token_mask, segment_ids, cache, memory, elastic)
        counts = iter(earlier_counts or [])
        found: list[dict[str, Tensor]] = []
        plans: list[RoutingPlan] = []
        for layer in self.layers:
            earlier = next(counts, None) if isinstance(layer.feed_forward, MoE) else None
            if self.recompute and self.training:
                x, losses, plan = checkpoint(layer, x, inputs, earlier, use_reentrant=False)
            else:
                x, losses, plan = layer(x, inputs, earlier)
            if losses:
                found.append(losses)
            if plan is not None:
                plans.append(plan)
        if cache is not None:
            cache.advance(length)
        return BackboneOutput(self.norm(x), mean_losses(found), tuple(plans), tuple(found))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Normal weights; the maps back into the residual stream scaled by 1 / sqrt(2 * n_layers) (GPT-2)."""
        std = self.config.init_std
        back = std / math.sqrt(2 * self.config.n_layers)
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                is_back = name.endswith(("attention.out", "w_out", "linear"))
                nn.init.normal_(module.weight, std=back if is_back else std)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        from moekit.layers.experts import StackedMLP
        from moekit.layers.routing import LearnedRouter

        for module in self.modules():
            if isinstance(module, StackedMLP):
                module.reset_parameters(std, back)
            elif isinstance(module, LearnedRouter):
                module.reset_parameters(std)


def _refuse_lookahead(layer: MoE) -> None:
    if layer.causal:
        return
    cause = f"router {layer.router.name!r} looks at later tokens"
    if layer.router.causal:
        cause = "moe.drop_policy 'probability' drops a token because of later ones"
    raise ConfigError(
        f"a decoder predicts later tokens, but {cause}, so its training loss would be too good to be true. "
        "Choose another, or set model.allow_noncausal_router: true if you know why."
    )


def _cross_attention(config: BackboneConfig) -> CrossAttention:
    return CrossAttention(
        config.d_model,
        config.n_heads,
        config.kv_heads,
        config.head_width,
        bias=config.attention_bias,
        out_bias=config.attention_out_bias,
    )


def _attention(config: BackboneConfig, index: int) -> Attention | LatentAttention:
    biases = {"bias": config.attention_bias, "out_bias": config.attention_out_bias}
    if config.latent_attention is not None:
        scale = config.rope_scaling.score_scale if config.rope_scaling is not None else 1.0
        return LatentAttention(
            config.d_model, config.n_heads, config.latent_attention, **biases, score_scale=scale
        )
    return Attention(
        config.d_model,
        config.n_heads,
        config.kv_heads,
        config.head_width,
        qk_norm=config.qk_norm,
        sinks=config.attention_sinks,
        window=config.window_of(index),
        eps=config.norm_eps,
        **biases,
    )
