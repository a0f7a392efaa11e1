"""Twins: equal by rule, never smaller, and by less than one step of width."""

from __future__ import annotations

import pytest

from moekit import ModelConfig, MoEConfig, build_model
from moekit.config.model import TransformerXLConfig
from moekit.models.accounting import active_parameters, total_parameters
from moekit.models.twins import WIDTH_STEP, dense_twin, transformer_xl_twin

BASE = {"vocab_size": 100, "d_model": 32, "n_layers": 3, "n_heads": 4, "max_seq_len": 16}
SPARSE = {
    "plain": ModelConfig(**BASE, moe=MoEConfig(n_experts=8, d_expert=20, top_k=2)),
    "one expert": ModelConfig(
        **BASE, moe=MoEConfig(n_experts=8, d_expert=24, top_k=1, router={"name": "switch"})
    ),
    "shared": ModelConfig(
        **BASE, moe=MoEConfig(n_experts=8, d_expert=11, top_k=3, n_shared_experts=1, shared_gate=True)
    ),
    "some dense": ModelConfig(**BASE, n_dense_layers=1, d_ff=40, moe=MoEConfig(n_experts=4, d_expert=32)),
    "every second": ModelConfig(
        **BASE, moe_every=2, d_ff=48, tie_embeddings=False, moe=MoEConfig(d_expert=9)
    ),
    "layers that differ": ModelConfig(
        **BASE, moe=MoEConfig(n_experts=8, d_expert=20), moe_by_layer={1: {"n_experts": 4, "d_expert": 60}}
    ),
    "relu": ModelConfig(
        **BASE, activation="relu", qk_norm="head", moe=MoEConfig(activation="relu", d_expert=30)
    ),
}
every = pytest.mark.parametrize("config", SPARSE.values(), ids=SPARSE.keys())


def one_step_more(config: ModelConfig | TransformerXLConfig) -> int:
    return total_parameters(config) - total_parameters(config.replace(d_ff=config.d_ff - WIDTH_STEP))


@every
@pytest.mark.parametrize("equal", ["active", "total"])
def test_dense_twin(config: ModelConfig, equal: str) -> None:
    twin = dense_twin(config, equal)
    target = active_parameters(config) if equal == "active" else total_parameters(config)
    size = sum(p.numel() for p in build_model(twin).parameters())
    assert target <= size < target + one_step_more(twin)
    assert twin.d_ff % WIDTH_STEP == 0
    assert twin.moe is None
    # the width alone was chosen
    sparse_only = {
        name: getattr(config, name) for name in ("moe", "n_dense_layers", "moe_every", "moe_by_layer")
    }
    assert twin.replace(d_ff=config.d_ff, **sparse_only) == config


@every
def test_transformer_xl_twin(config: ModelConfig) -> None:
    twin = transformer_xl_twin(config)
    target = active_parameters(config)
    size = sum(p.numel() for p in build_model(twin).parameters())
    assert target <= size < target + one_step_more(twin)
    assert (twin.d_model, twin.n_layers, twin.n_heads) == (config.d_model, config.n_layers, config.n_heads)
    assert twin.memory_length == config.max_seq_len
    assert transformer_xl_twin(config, memory_length=5).memory_length == 5
    assert transformer_xl_twin(config, pre_norm=True).pre_norm


def test_a_dense_model_is_its_own_twin() -> None:
    config = ModelConfig(**BASE)
    assert dense_twin(config) is config
