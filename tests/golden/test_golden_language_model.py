"""Losses and gradient norms of tiny models, stored: a silent change of the numbers fails here.

Weights and tokens come from sines and a linear congruence, not from a random generator, so that the numbers
hold across versions of PyTorch. After a change that is meant to change them, write them anew and look at the
difference:

    python tests/golden/test_golden_language_model.py && git diff tests/golden
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from moekit import ModelConfig, MoEConfig, build_model
from moekit.layers.balancing import weighted_aux_loss

STORED = Path(__file__).with_name("golden_language_model.json")
SMALL = {"vocab_size": 61, "d_model": 24, "n_layers": 2, "n_heads": 4, "d_ff": 40, "max_seq_len": 12}
CONFIGS = {
    "dense": {"n_kv_heads": 2, "qk_norm": "head", "attention_bias": True, "tie_embeddings": False},
    "softmax, shared": {"moe": {"n_shared_experts": 1, "shared_gate": True}},
    "sigmoid, groups, bias": {
        "qk_norm": "full",
        "n_dense_layers": 1,
        "moe": {
            "router": {"name": "group_limited", "n_groups": 4, "top_groups": 2},
            "weight_scale": 2.0,
            "balance": {"bias_update_rate": 0.1, "scope": "sequence"},
        },
    },
    "capacity, gelu, biases": {"moe": {"capacity_factor": 0.8, "activation": "gelu", "bias": True}},
    "top_p, null, linear path": {
        "moe": {
            "router": {"name": "top_p", "p": 0.5},
            "null_experts": {"zero": 1, "constant": 1},
            "linear_path": True,
        }
    },
    "hierarchical, winner": {"moe": {"router": {"name": "hierarchical", "n_groups": 2}, "combine": "winner"}},
    "threshold": {"moe": {"router": {"name": "threshold", "initial_coefficient": 0.1}}},
}


def measure(fields: dict[str, Any]) -> dict[str, float]:
    """Losses, the norm of every gradient's kind, and the counts of one forward and backward pass."""
    torch.set_num_threads(1)
    moe = None
    if "moe" in fields:
        moe = MoEConfig.from_dict({"n_experts": 8, "d_expert": 12, "top_k": 2} | fields["moe"])
    config = ModelConfig.from_dict({**SMALL, **fields, "moe": moe})
    model = build_model(config)
    with torch.no_grad():
        for number, tensor in enumerate(dict.fromkeys([*model.parameters(), *model.buffers()])):
            if tensor.dim() == 0:
                continue
            wave = torch.arange(tensor.numel(), dtype=torch.float64) * (0.37 + 0.11 * number) + number
            around = 1.0 if tensor.dim() == 1 and bool((tensor == 1).all()) else 0.0
            tensor.copy_((around + 0.3 * torch.sin(wave * wave)).view(tensor.shape))
    ids = (torch.arange(30) ** 2 * 17 + 5).view(3, 10) % 61
    targets = (ids * 7 + 3) % 61
    targets[0, :4] = -100
    mask = torch.ones(3, 10, dtype=torch.bool)
    mask[2, 7:] = False
    segments = (torch.arange(10) >= 6).long().expand(3, 10)
    out = model(ids, targets=targets.masked_fill(~mask, -100), token_mask=mask, segment_ids=segments)
    loss = out.loss + (weighted_aux_loss(out.aux_losses, moe.balance) if moe else 0.0)
    loss.backward()
    found = {"loss": out.loss.item(), "total": loss.item()}
    found |= {f"aux/{name}": value.item() for name, value in out.aux_losses.items()}
    squares: dict[str, float] = {}
    for name, parameter in model.named_parameters():
        kind = ".".join(part for part in name.split(".") if not part.isdigit())
        square = 0.0 if parameter.grad is None else parameter.grad.double().square().sum().item()
        squares[kind] = squares.get(kind, 0.0) + square
    found |= {f"gradient/{kind}": math.sqrt(square) for kind, square in squares.items()}
    for layer, plan in enumerate(out.routing):
        found |= {f"rows/{layer}/{e}": float(n) for e, n in enumerate(plan.tokens_per_expert.tolist())}
    return found


@pytest.mark.parametrize("name", CONFIGS)
def test_numbers_are_those_on_record(name: str) -> None:
    stored = json.loads(STORED.read_text(encoding="utf-8"))[name]
    found = measure(CONFIGS[name])
    assert found.keys() == stored.keys()
    assert found == pytest.approx(stored, rel=1e-5, abs=1e-7)


def test_every_record_is_of_a_model() -> None:
    assert json.loads(STORED.read_text(encoding="utf-8")).keys() == CONFIGS.keys()


if __name__ == "__main__":
    records = {name: measure(fields) for name, fields in CONFIGS.items()}
    STORED.write_text(json.dumps(records, indent=1) + "\n", encoding="utf-8")
