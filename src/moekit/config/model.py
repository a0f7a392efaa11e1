"""Configuration of the models: the decoder (dense or MoE in each layer), the Transformer-XL baseline, the encoder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from moekit.config.backbone import BackboneConfig
from moekit.config.base import StrictConfig
from moekit.config.encoder import EncoderConfig
from moekit.config.errors import ConfigError, require
from moekit.config.sparse import MOST_LAYERS


class ModelConfig(BackboneConfig):
    """A decoder whose shapes cover Llama, Qwen3, Mixtral, OLMoE, Qwen2/3-MoE and DeepSeek-style experts.

    A layer is sparse where `moe` is given and the layer is not among the dense ones
    (`n_dense_layers` first, then one sparse layer in every `moe_every`, and `dense_layers` by number).
    """

    kind: Literal["decoder"] = Field(default="decoder", description="a decoder, dense or sparse")
    vocab_size: int = Field(default=4096, ge=2, description="number of token ids")
    tie_embeddings: bool = Field(default=True, description="one matrix for the embedding and the output")
    allow_noncausal_router: bool = Field(
        default=False,
        description="accept a router that looks at later tokens although the model predicts them",
    )
    embedding_scale: float = Field(
        default=1.0, gt=0, description="factor on the embeddings where they enter (sqrt(d_model) in Gemma)"
    )
    embedding_std: float | None = Field(
        default=None, gt=0, description="standard deviation of the initial embeddings; init_std where null"
    )


class TransformerXLConfig(StrictConfig):
    """The Transformer-XL baseline (Dai et al. 2019): segment recurrence with relative positions."""

    kind: Literal["transformer_xl"] = Field(
        default="transformer_xl", description="the Transformer-XL baseline"
    )
    vocab_size: int = Field(default=4096, ge=2, description="number of token ids")
    d_model: int = Field(default=256, ge=2, description="width of the hidden states")
    n_layers: int = Field(default=4, ge=1, le=MOST_LAYERS, description="transformer layers")
    n_heads: int = Field(default=4, ge=1, description="attention heads")
    d_head: int | None = Field(
        default=None, ge=1, description="width of a head; d_model / n_heads where null"
    )
    d_ff: int = Field(default=1024, ge=1, description="inner width of the ReLU feed-forward layers")
    max_seq_len: int = Field(default=256, ge=1, description="length of a segment, in tokens")
    memory_length: int = Field(
        default=256, ge=0, description="hidden states of earlier segments kept, in training"
    )
    eval_memory_length: int | None = Field(
        default=None, ge=0, description="hidden states kept at evaluation; memory_length where null"
    )
    dropout: float = Field(
        default=0.0, ge=0, lt=1, description="dropout of attention and feed-forward outputs"
    )
    pre_norm: bool = Field(
        default=False, description="layer norm before each block instead of after (the paper's)"
    )
    tie_embeddings: bool = Field(default=True, description="one matrix for the embedding and the output")
    init_std: float = Field(default=0.02, gt=0, description="standard deviation of the initial weights")

    @model_validator(mode="after")
    def _rules(self) -> TransformerXLConfig:
        if self.d_head is None:
            require(self.d_model % self.n_heads == 0, "d_model", self.d_model,
                    f"must be a multiple of n_heads ({self.n_heads})", "Or set d_head")  # fmt: skip
        return self

    @property
    def head_width(self) -> int:
        return self.d_head if self.d_head is not None else self.d_model // self.n_heads


def _default_kind(value: Any) -> Any:
    return {"kind": "decoder", **value} if isinstance(value, Mapping) else value


AnyConfig = ModelConfig | TransformerXLConfig | EncoderConfig
AnyModelConfig = Annotated[Annotated[AnyConfig, Field(discriminator="kind")], BeforeValidator(_default_kind)]


def model_config_from_dict(data: dict, where: str = "model") -> AnyConfig:
    """Plain data to the configuration class that its `kind` names (decoder where absent)."""
    kinds: dict[str, type[AnyConfig]] = {
        "decoder": ModelConfig,
        "transformer_xl": TransformerXLConfig,
        "encoder": EncoderConfig,
    }
    kind = data.get("kind", "decoder")
    if kind not in kinds:
        raise ConfigError(f"{where}.kind must be one of {', '.join(kinds)}; got {kind!r}")
    return kinds[kind].from_dict(data, where)
