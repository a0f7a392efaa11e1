"""An OLMoE of transformers as a GGUF file, the format of llama.cpp, without a vocabulary."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moekit.evaluate.bench.olmoe import ModelShape

FORMATS = ("bf16", "Q8_0", "Q4_0")

# a layer's tensors: name in transformers, name in llama.cpp
_LAYER = {
    "input_layernorm.weight": "attn_norm.weight",
    "self_attn.q_proj.weight": "attn_q.weight",
    "self_attn.k_proj.weight": "attn_k.weight",
    "self_attn.v_proj.weight": "attn_v.weight",
    "self_attn.o_proj.weight": "attn_output.weight",
    "self_attn.q_norm.weight": "attn_q_norm.weight",
    "self_attn.k_norm.weight": "attn_k_norm.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "mlp.gate.weight": "ffn_gate_inp.weight",
    "mlp.experts.down_proj": "ffn_down_exps.weight",
}
_GATES, _UPS = "ffn_gate_exps.weight", "ffn_up_exps.weight"
_WHOLE = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}


def write_gguf(model: Any, shape: ModelShape, path: Path, kind: str) -> None:
    """Write the model with all matrices in `kind`, one of `FORMATS`; router and norms stay float32. Atomic."""
    import gguf

    temporary = path.with_name(f".partial-{path.name}-{secrets.token_hex(4)}")
    writer = gguf.GGUFWriter(temporary, "olmoe")
    writer.add_name("moekit bench")
    writer.add_context_length(shape.context)
    writer.add_embedding_length(shape.d_model)
    writer.add_block_count(shape.layers)
    writer.add_feed_forward_length(shape.d_expert)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.heads)
    writer.add_layer_norm_rms_eps(model.config.rms_norm_eps)
    writer.add_rope_freq_base(model.config.rope_parameters["rope_theta"])
    writer.add_expert_count(shape.experts)
    writer.add_expert_used_count(shape.top_k)
    writer.add_vocab_size(shape.vocab_size)
    writer.add_tokenizer_model("no_vocab")
    wanted = gguf.GGMLQuantizationType[kind.upper()]
    try:
        for name, tensor in _tensors(model):
            if tensor.dim() == 1 or name.endswith("ffn_gate_inp.weight"):
                writer.add_tensor(name, tensor.float().numpy())
            elif kind == "bf16":  # the same bits
                bits = tensor.contiguous().view(torch.int16).numpy().view(np.uint8)
                writer.add_tensor(name, bits, raw_dtype=wanted)
            else:
                writer.add_tensor(
                    name, _by_matrix(tensor, lambda part: gguf.quantize(part, wanted)), raw_dtype=wanted
                )
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def read_weights(path: Path) -> Callable[[str, Tensor], Tensor]:
    """(name in transformers, value) -> what the file holds for it, as float32."""
    import gguf

    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}

    def get(name: str) -> Tensor:
        tensor = tensors[name]
        data: Any = tensor.data
        if tensor.tensor_type == gguf.GGMLQuantizationType.F32:
            return torch.from_numpy(np.array(data))
        return torch.from_numpy(gguf.dequantize(np.asarray(data), tensor.tensor_type))

    def exchange(name: str, value: Tensor) -> Tensor:
        if name in _WHOLE:
            found = get(_WHOLE[name])
        else:
            _, _, layer, rest = name.split(".", 3)
            if rest == "mlp.experts.gate_up_proj":
                found = torch.cat([get(f"blk.{layer}.{_GATES}"), get(f"blk.{layer}.{_UPS}")], dim=1)
            else:
                found = get(f"blk.{layer}.{_LAYER[rest]}")
        return found.reshape(value.shape)

    return exchange


def _tensors(model: Any) -> Iterator[tuple[str, Tensor]]:
    values = {name: parameter.data for name, parameter in model.named_parameters()}
    for theirs, ours in _WHOLE.items():
        yield ours, values[theirs]
    for layer in range(len(model.model.layers)):
        of_layer = f"model.layers.{layer}."
        for theirs, ours in _LAYER.items():
            yield f"blk.{layer}.{ours}", values[of_layer + theirs]
        gates, ups = values[f"{of_layer}mlp.experts.gate_up_proj"].chunk(2, dim=1)
        yield f"blk.{layer}.{_GATES}", gates
        yield f"blk.{layer}.{_UPS}", ups


def _by_matrix(tensor: Tensor, function: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """`function` on each matrix of a stack: in float32 the whole would take twice its memory."""
    if tensor.dim() == 2:
        return function(tensor.float().numpy())
    return np.stack([function(part.float().numpy()) for part in tensor])
