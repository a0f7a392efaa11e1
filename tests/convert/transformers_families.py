"""Tiny random models of transformers' Mixture-of-Experts families."""

from __future__ import annotations

from typing import Any

import torch

COMMON = {
    "vocab_size": 96, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 16, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "num_experts_per_tok": 2, "tie_word_embeddings": False,
}  # fmt: skip
MLA = {
    "kv_lora_rank": 16,
    "q_lora_rank": 24,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
}
GROUPS = {"n_group": 2, "topk_group": 1, "num_key_value_heads": 4, "head_dim": 16}

# model type -> what it needs beside COMMON
FAMILIES: dict[str, dict[str, Any]] = {
    "mixtral": {"intermediate_size": 96, "num_local_experts": 4},
    "olmoe": {"intermediate_size": 32, "num_experts": 8},
    "flex_olmo": {"intermediate_size": 32, "num_experts": 8},
    "qwen2_moe": {
        "intermediate_size": 96, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 48, "num_experts": 8,
    },
    "qwen3_moe": {"intermediate_size": 96, "moe_intermediate_size": 32, "num_experts": 8},
    "deepseek_v2": {
        "intermediate_size": 96, "moe_intermediate_size": 32, "n_routed_experts": 8, "n_shared_experts": 1,
        "first_k_dense_replace": 1, "topk_method": "greedy", **MLA, **GROUPS, "head_dim": 16,
    },
    "deepseek_v3": {
        "intermediate_size": 96, "moe_intermediate_size": 32, "n_routed_experts": 8, "n_shared_experts": 1,
        "first_k_dense_replace": 1, **MLA, **GROUPS, "head_dim": 16,
    },
    "gpt_oss": {
        "intermediate_size": 32, "num_local_experts": 8, "sliding_window": 16,
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
    },
    "glm4_moe": {
        "intermediate_size": 96, "moe_intermediate_size": 32, "n_routed_experts": 8, "first_k_dense_replace": 1,
        **GROUPS,
    },
    "granitemoe": {"intermediate_size": 32, "num_local_experts": 8},
    "phimoe": {"intermediate_size": 32, "num_local_experts": 8},
    "ernie4_5_moe": {"intermediate_size": 96, "moe_intermediate_size": 32, "moe_num_experts": 8, "moe_k": 2},
    "minimax_m2": {"intermediate_size": 32, "num_local_experts": 8, "rotary_dim": 16},
    "hunyuan_v1_moe": {"intermediate_size": 32, "num_experts": 8, "moe_topk": 2},
    "lfm2_moe": {
        "intermediate_size": 96, "moe_intermediate_size": 32, "num_experts": 8, "num_dense_layers": 1,
        "layer_types": ["conv", "full_attention"],
    },
}  # fmt: skip


def tiny_model(model_type: str, implementation: str = "eager", dtype: torch.dtype = torch.float32) -> Any:
    """A causal language model of the family with random weights, in evaluation mode; the same weights every time."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(model_type, **(COMMON | FAMILIES[model_type]))
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, experts_implementation=implementation)
    for name, parameter in model.named_parameters():
        # experts that matter beside the residual stream, biases that are not zero
        if "experts" in name:
            torch.nn.init.normal_(parameter, std=0.3 if "bias" in name else 0.15)
    return model.to(dtype).eval()
