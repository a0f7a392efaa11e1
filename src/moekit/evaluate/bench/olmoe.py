"""The model of `bench model`: OLMoE of transformers with random weights, and its logits in float32."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moekit.config.errors import require
from moekit.evaluate.bench.sizes import check_sizes


@dataclass(frozen=True)
class ModelShape:
    """Sizes of the model and of what it is asked.

    Attributes:
        prompt: tokens of the prefill.
        new_tokens: tokens decoded behind them, one at a time.

    Errors: `ConfigError` for a size below 1, more choices than experts, or heads that do not divide the width.
    """

    vocab_size: int = 50_304
    d_model: int = 2048
    d_expert: int = 1024
    experts: int = 64
    top_k: int = 8
    layers: int = 4
    heads: int = 16
    prompt: int = 512
    new_tokens: int = 32

    def __post_init__(self) -> None:
        check_sizes(self)
        require(self.d_model % (2 * self.heads) == 0, "--d-model", self.d_model,
                f"must be a multiple of twice --heads ({self.heads})")  # fmt: skip

    @property
    def context(self) -> int:
        return self.prompt + self.new_tokens

    @property
    def layer_matrix(self) -> int:
        """Elements of a layer's matrices that multiply one token: attention, router, chosen experts."""
        return (
            4 * self.d_model**2 + self.experts * self.d_model + self.top_k * 3 * self.d_model * self.d_expert
        )

    @property
    def prefill_flops(self) -> float:
        """What the logits of the prompt's last token need: of the last layer, keys and values of all tokens and the
        rest of one. llama.cpp leaves out what is not needed there; transformers computes it."""
        scores = 2 * self.d_model * self.prompt * (self.prompt + 1) / 2  # and values; causal
        whole = self.prompt * self.layer_matrix + scores
        last = (self.prompt - 1) * 2 * self.d_model**2 + self.layer_matrix + 2 * self.d_model * self.prompt
        return 2.0 * ((self.layers - 1) * whole + last + self.head_matrix)

    @property
    def head_matrix(self) -> int:
        return self.vocab_size * self.d_model


def random_olmoe(shape: ModelShape, seed: int) -> Any:
    """`OlmoeForCausalLM` in bfloat16: matrices with a standard deviation of 0.02, norms of 1."""
    from transformers import OlmoeConfig, OlmoeForCausalLM
    from transformers.models.olmoe.modeling_olmoe import OlmoeRotaryEmbedding

    config: Any = OlmoeConfig(
        vocab_size=shape.vocab_size, hidden_size=shape.d_model, intermediate_size=shape.d_expert,
        num_hidden_layers=shape.layers, num_attention_heads=shape.heads, num_key_value_heads=shape.heads,
        num_experts=shape.experts, num_experts_per_tok=shape.top_k, max_position_embeddings=shape.context,
        rms_norm_eps=1e-5, pad_token_id=None, bos_token_id=None, eos_token_id=None, tie_word_embeddings=False,
    )  # fmt: skip
    with torch.device("meta"):
        model: Any = OlmoeForCausalLM(config)
    model = model.to(torch.bfloat16).to_empty(device="cpu").eval()
    model.model.rotary_emb = OlmoeRotaryEmbedding(config)  # its frequencies are no parameters
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.fill_(1.0)
                continue
            # a matrix at a time: in float32 a stack of experts would take twice its memory
            for part in parameter if parameter.dim() == 3 else (parameter,):
                part.copy_(torch.randn(part.shape, generator=random) * 0.02)
    return model  # without requires_grad, torch copies the output matrix for the last position alone


# (name of a parameter, its value in bfloat16) -> the value to compute with, float32
Weights = Callable[[str, Tensor], Tensor]


def float32_logits(model: Any, ids: Tensor, weights: Weights | None = None) -> Tensor:
    """`[S, V]` logits of `ids [S]` in float32, holding one layer at a time in it; the model is unchanged afterwards."""
    exchange = weights or (lambda name, value: value.float())
    implementation = model.config._experts_implementation
    model.set_experts_implementation("eager")
    parts = {**{f"model.layers.{i}": layer for i, layer in enumerate(model.model.layers)},
             "model.embed_tokens": model.model.embed_tokens, "model.norm": model.model.norm,
             "lm_head": model.lm_head}  # fmt: skip
    with torch.no_grad(), _each_in_float32(parts, exchange):
        logits: Tensor = model(input_ids=ids[None], use_cache=False).logits[0]
    model.set_experts_implementation(implementation)
    return logits


@contextmanager
def _each_in_float32(parts: dict[str, nn.Module], exchange: Weights) -> Iterator[None]:
    """Every part computes in float32, and is in bfloat16 again when the next one begins."""
    handles = []
    kept: dict[str, dict[str, Tensor]] = {}

    def enter(prefix: str, module: nn.Module) -> None:
        kept[prefix] = {}
        for name, parameter in module.named_parameters():
            kept[prefix][name] = parameter.data
            parameter.data = exchange(f"{prefix}.{name}", parameter.data)

    def leave(prefix: str, module: nn.Module) -> None:
        for name, parameter in module.named_parameters():
            parameter.data = kept[prefix].pop(name)

    for prefix, module in parts.items():
        handles.append(module.register_forward_pre_hook(lambda each, _, prefix=prefix: enter(prefix, each)))
        handles.append(module.register_forward_hook(lambda each, _, __, prefix=prefix: leave(prefix, each)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for prefix, module in parts.items():  # a part that failed half way
            for name, value in kept.get(prefix, {}).items():
                module.get_parameter(name).data = value
