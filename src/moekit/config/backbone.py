"""Configuration of the backbone: transformer layers, dense or sparse, between stems and heads."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from moekit.config.attention import LatentAttentionConfig, RopeScalingConfig
from moekit.config.base import StrictConfig
from moekit.config.errors import require
from moekit.config.moe import Activation, MoEConfig, QuantizationConfig
from moekit.config.sparse import MOST_LAYERS, SparseLayers


class BackboneConfig(SparseLayers, StrictConfig):
    """Layers of attention and feed-forward blocks, each dense or sparse, and the norm behind them.

    A layer is sparse where `moe` is given and the layer is not among the dense ones
    (`n_dense_layers` first, then one sparse layer in every `moe_every`, and `dense_layers` by number).
    """

    d_model: int = Field(default=256, ge=2, description="width of the hidden states")
    n_layers: int = Field(default=4, ge=1, le=MOST_LAYERS, description="transformer layers")
    n_heads: int = Field(default=4, ge=1, description="query heads")
    n_kv_heads: int | None = Field(default=None, ge=1, description="key/value heads; n_heads where null")
    d_head: int | None = Field(
        default=None, ge=2, description="width of a head; d_model / n_heads where null"
    )
    d_ff: int = Field(default=688, ge=1, description="inner width of the dense feed-forward layers")
    activation: Activation = Field(
        default="swiglu", description="activation of the dense feed-forward layers"
    )
    mlp_bias: bool = Field(default=False, description="biases in the dense feed-forward layers")
    max_seq_len: int = Field(default=256, ge=1, description="longest sequence, in tokens")
    rope_theta: float = Field(default=10000.0, gt=0, description="base of the rotary embedding")
    rope_scaling: RopeScalingConfig | None = Field(
        default=None, description="stretched rotary frequencies; null for none"
    )
    rotary_share: float = Field(
        default=1.0, gt=0, le=1, description="share of a head's width that is rotated, from its start (GLM-4)"
    )
    norm_eps: float = Field(default=1e-6, gt=0, description="epsilon of RMSNorm")
    qk_norm: Literal["none", "head", "full"] = Field(
        default="none",
        description="RMSNorm of queries and keys: none, per head (Qwen3) or over all heads (OLMoE)",
    )
    attention_bias: bool = Field(default=False, description="biases on the query, key and value maps (Qwen2)")
    attention_out_bias: bool = Field(
        default=False, description="a bias on attention's output map too (GPT-OSS)"
    )
    attention_sinks: bool = Field(
        default=False, description="a learned score in each head for attending to nothing (GPT-OSS)"
    )
    sliding_window: int | None = Field(
        default=None, ge=1, description="tokens that attention looks back, itself counted; null for all"
    )
    sliding_layers: tuple[int, ...] | None = Field(
        default=None, description="layers whose attention has the window, from 0; null for all"
    )
    latent_attention: LatentAttentionConfig | None = Field(
        default=None, description="multi-head latent attention (DeepSeek) in place of grouped heads"
    )
    dropout: float = Field(
        default=0.0, ge=0, lt=1, description="dropout of attention and feed-forward outputs"
    )
    moe: MoEConfig | None = Field(default=None, description="the sparse layers; null for a dense model")
    n_dense_layers: int = Field(default=0, ge=0, description="layers at the start that stay dense (DeepSeek)")
    moe_every: int = Field(default=1, ge=1, description="one layer in this many is sparse")
    dense_layers: tuple[int, ...] = Field(
        default=(), description="further layers that stay dense, from 0 (Qwen2-MoE)"
    )
    moe_by_layer: dict[int, dict[str, Any]] = Field(
        default_factory=dict,
        description="what differs from `moe` in single layers, from 0: {0: {router: hash}}",
    )
    linear_quantization: QuantizationConfig | None = Field(
        default=None,
        description="8 or 4 bits for the maps of attention and of dense layers whose widths fit; for inference alone",
    )
    init_std: float = Field(default=0.02, gt=0, description="standard deviation of the initial weights")

    @model_validator(mode="after")
    def _backbone_rules(self) -> BackboneConfig:
        if self.d_head is None and self.latent_attention is None:
            require(self.d_model % self.n_heads == 0, "d_model", self.d_model,
                    f"must be a multiple of n_heads ({self.n_heads})", "Or set d_head")  # fmt: skip
        require(self.n_heads % self.kv_heads == 0, "n_heads", self.n_heads,
                f"must be a multiple of n_kv_heads ({self.kv_heads})")  # fmt: skip
        require(self.latent_attention is not None or self.head_width % 2 == 0, "d_head", self.head_width,
                "must be even for the rotary embedding")  # fmt: skip
        require(self.rotary_width % 2 == 0 and self.rotary_width > 0, "rotary_share", self.rotary_share,
                f"must give an even number of the {self.head_width} of d_head")  # fmt: skip
        require(self.sliding_layers is None or self.sliding_window is not None, "sliding_layers",
                self.sliding_layers, "needs sliding_window")  # fmt: skip
        require(all(0 <= index < self.n_layers for index in self.sliding_layers or ()), "sliding_layers",
                self.sliding_layers, f"must hold numbers of layers in 0..{self.n_layers - 1}")  # fmt: skip
        # the ramp of yarn divides by the logarithm
        require(self.rope_scaling is None or self.rope_scaling.kind != "yarn" or self.rope_theta > 1, "rope_theta",
                self.rope_theta, "must be above 1 with rope_scaling.kind yarn")  # fmt: skip
        self._latent_rules()
        self._sparse_rules()
        return self

    def _latent_rules(self) -> None:
        if self.latent_attention is None:
            return
        others = {
            "n_kv_heads": self.kv_heads == self.n_heads,
            "d_head": self.d_head is None,
            "qk_norm": self.qk_norm == "none",
            "rotary_share": self.rotary_share == 1.0,
            "attention_sinks": not self.attention_sinks,
            "sliding_window": self.sliding_window is None,
        }
        for field, plain in others.items():
            require(plain, field, getattr(self, field), "must be left out with latent_attention")

    @property
    def is_quantized(self) -> bool:
        """Whether any weight is stored in 8 or 4 bits, so that the model cannot be trained."""
        layers = (self.moe_of(index) for index in self.moe_layers)
        return self.linear_quantization is not None or any(moe and moe.quantization for moe in layers)

    @property
    def kv_heads(self) -> int:
        return self.n_kv_heads if self.n_kv_heads is not None else self.n_heads

    @property
    def head_width(self) -> int:
        """Width of a head's queries and keys."""
        if self.latent_attention is not None:
            return self.latent_attention.d_nope + self.latent_attention.d_rope
        return self.d_head if self.d_head is not None else self.d_model // self.n_heads

    @property
    def rotary_width(self) -> int:
        """Rotated dimensions of a head."""
        if self.latent_attention is not None:
            return self.latent_attention.d_rope
        return int(self.head_width * self.rotary_share)

    def window_of(self, index: int) -> int | None:
        """Tokens that attention in layer `index` (from 0) looks back, itself counted; None for all."""
        listed = self.sliding_layers is None or index in self.sliding_layers
        return self.sliding_window if listed else None
