"""Tiny decoders of every kind of experts, written to disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from moekit.compress.reshaping import with_layers
from moekit.config.model import ModelConfig
from moekit.config.moe import QuantizationConfig
from moekit.convert.formats.folder import cast, write_model_folder
from moekit.kernels.quantized import quantize
from moekit.layers.quantized import QuantizedWeight
from moekit.models.language_model import LanguageModel

VOCABULARY, D, EXPERTS = 61, 64, 8
MOE: dict[str, Any] = {"n_experts": EXPERTS, "top_k": 2, "d_expert": 64}
# name -> keys of the sparse layers
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "fused layer alone": {"d_expert": 48},  # no multiple of 32: the decoding kernel cannot
    "no fused kernel": {"d_expert": 24},
    "biases": {"bias": True, "activation": "gelu"},
    "shared": {"n_shared_experts": 1},
    "null experts": {"null_experts": {"zero": 1, "copy_input": 1}},
    "hash router": {"router": "hash"},
    "sigmoid router": {"router": "sigmoid", "balance": {"bias_update_rate": 0.01}},
    "as many as needed": {"router": {"name": "top_p", "options": {"p": 0.4}}},
    "capacity": {"capacity_factor": 0.7},
    "winner": {"combine": "winner"},
    "one": {"router": "switch", "top_k": 1},
    "merged": {"merged_into": [0, 1, 2, 2, 3, 3, 1, 0], "n_experts": 4},
}


def build(keys: dict[str, Any] | None = None, *, layers: int = 3, **model: Any) -> LanguageModel:
    """A random decoder whose norms are not ones."""
    moe = {**MOE, **(keys or {})}
    if isinstance(moe.get("router"), str):
        moe["router"] = {"name": moe["router"]}
    config = ModelConfig.from_dict({
        "vocab_size": VOCABULARY, "d_model": D, "n_layers": layers, "n_heads": 2, "max_seq_len": 64, "d_ff": 64,
        "init_std": 0.2, "moe": moe, **model,
    })  # fmt: skip
    torch.manual_seed(1)
    built = LanguageModel(config)
    with torch.no_grad():
        for name, parameter in built.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
            elif name.endswith(("b_in", "b_out")):
                parameter.normal_()
    return built.eval()


def quantised(bits: int) -> LanguageModel:
    """As `build`, its experts in 8 or 4 bits."""
    plain = build()
    how = QuantizationConfig.from_dict({"bits": bits, "group_size": 32}, "test")
    changes = {index: plain.config.moe_of(index).replace(quantization=how) for index in range(3)}  # type: ignore[union-attr]
    model = LanguageModel(with_layers(plain.config, changes)).eval()
    state = plain.state_dict()
    model.load_state_dict({name: state[name] for name in model.state_dict() if name in state}, strict=False)
    for name, module in model.named_modules():
        if isinstance(module, QuantizedWeight):
            module.put(quantize(state[name], bits, 32))
    return model


def write(model: LanguageModel, folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    """A folder of moekit with the model's weights in a type."""
    folder.mkdir(parents=True)
    write_model_folder(cast(model, dtype), folder, [{"step": "random"}], {})
    return folder


__all__ = ["KINDS", "build", "quantised", "write"]
