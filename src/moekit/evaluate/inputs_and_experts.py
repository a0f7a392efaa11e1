"""Which experts the tokens of each input go to: whether modalities share experts or have their own.

Shape legend: B examples, S tokens of all stems, E experts.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from moekit.data.encoding.whole import EncodedExamples, Encoding
from moekit.data.examples import Examples
from moekit.data.task_loader import task_batches
from moekit.layers.plan import RoutingPlan
from moekit.models.task_model import TaskModel, TaskOutput


@torch.inference_mode()
def experts_of_inputs(
    model: TaskModel, encoding: Encoding, examples: Examples | EncodedExamples, *, batch_size: int = 64
) -> dict[str, np.ndarray]:
    """For each input `[layers, E]`: the share of its tokens' weights that each expert has, by sparse layer.

    Padding counts for nothing. Layers with fewer experts than the largest have zeros behind them.

    Args:
        model: in evaluation mode.
        encoding: of its run.
        examples: columns, or what is encoded already.
        batch_size: examples at once.
    """
    encoded = examples if isinstance(examples, EncodedExamples) else encoding.encode(examples, targets=False)
    total: dict[str, np.ndarray] = {}
    for batch in task_batches(encoded, batch_size):
        out: TaskOutput = model(batch.inputs)
        for name, weights in weights_of_inputs(out).items():
            total[name] = total.get(name, 0.0) + weights
    return {
        name: weights / np.maximum(weights.sum(axis=1, keepdims=True), 1e-12)
        for name, weights in total.items()
    }


def weights_of_inputs(out: TaskOutput) -> dict[str, np.ndarray]:
    """For each input `[layers, E]`: the summed weights of its tokens in each expert, in one batch."""
    widest = max((len(plan.tokens_per_expert) for plan in out.routing), default=0)
    found = {name: np.zeros((len(out.routing), widest)) for name in out.places}
    for layer, plan in enumerate(out.routing):
        weights = _weights(plan)
        for name, tokens in out.places.items():
            own = weights[:, tokens].sum(dim=(0, 1))
            found[name][layer, : len(own)] = own.numpy()
    return found


def _weights(plan: RoutingPlan) -> Tensor:
    """`[B, S, E]`: the weight of each token in each expert."""
    n_experts = len(plan.tokens_per_expert)
    if plan.slots is not None:  # each answer is a blend of all slots, an expert's standing together
        weights = plan.slots.combine.double().unflatten(2, (n_experts, -1)).sum(dim=3)
        return weights if plan.token_mask is None else weights * plan.token_mask.view(*plan.batch_shape, 1)
    expert = torch.repeat_interleave(torch.arange(n_experts), plan.tokens_per_expert)
    weights = torch.zeros(plan.n_tokens, n_experts, dtype=torch.float64)
    weights.index_put_((plan.token_index, expert), plan.row_weight.double(), accumulate=True)
    return weights.view(*plan.batch_shape, n_experts)


def shared_weight(shares: Mapping[str, np.ndarray]) -> np.ndarray:
    """`[layers]`: how much of their weight all inputs give to the same experts; 1 where they are alike, 0 where apart.

    >>> shared_weight({"ear": np.array([[0.5, 0.5, 0.0]]), "eye": np.array([[0.0, 0.75, 0.25]])})
    array([0.5])
    """
    return np.minimum.reduce(list(shares.values())).sum(axis=1)


def in_words(shares: Mapping[str, np.ndarray], largest: int = 2) -> str:
    """The largest experts of each input in each layer, and how much of their weight the inputs share.

    >>> in_words({"ear": np.array([[0.5, 0.5, 0.0]]), "eye": np.array([[0.0, 0.75, 0.25]])})
    'layer 1: ear to experts 0 (50%), 1 (50%); eye to experts 1 (75%), 2 (25%); 50% shared'
    """
    lines = []
    for layer, shared in enumerate(shared_weight(shares)):
        parts = []
        for name, found in shares.items():
            best = np.argsort(-found[layer], kind="stable")[:largest]
            said = ", ".join(
                f"{expert} ({found[layer][expert]:.0%})" for expert in best if found[layer][expert]
            )
            parts.append(f"{name} to experts {said}")
        lines.append(f"layer {layer + 1}: {'; '.join(parts)}; {shared:.0%} shared")
    return ". ".join(lines)
