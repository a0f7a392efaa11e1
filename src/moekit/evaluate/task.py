"""What a task's model says of examples: predictions in the user's words, the experts that decided, and metrics.

Shape legend: B examples, E experts, T tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from moekit.data.encoding.whole import EncodedExamples, Encoding
from moekit.data.examples import Examples
from moekit.data.task_loader import task_batches
from moekit.layers.plan import RoutingPlan
from moekit.models.task_experts import Mixture
from moekit.models.task_model import TaskModel, TaskOutput
from moekit.observe.recorder import Recorder
from moekit.observe.tasks import add_task

BATCH = 64


@dataclass
class Predictions:
    """Answers to examples, in their order.

    Attributes: answers: by target, what `TargetEncoder.answers` gives for each example. raw: by target, the heads' own
        numbers: `[N, C]` probabilities of classes, `[N, M]` numbers in their units, or a list of tags for each example.
        experts: for each example `[layers, E]`, the share of its tokens' weights that each expert has, where asked for.
    """

    answers: dict[str, list[dict[str, Any]]]
    raw: dict[str, Any]
    experts: list[np.ndarray] = field(default_factory=list)


@torch.inference_mode()
def predict(
    model: TaskModel, encoding: Encoding, examples: Examples | EncodedExamples, *, batch_size: int = BATCH,
    with_experts: bool = False, recorder: Recorder | None = None,
) -> Predictions:  # fmt: skip
    """What the model says of examples; their answers, if they have any, are not read.

    Args:
        model: in evaluation mode.
        encoding: of its run.
        examples: columns, or what is encoded already.
        batch_size: examples at once.
        with_experts: also say which experts decided.
        recorder: takes the routing of every token, all of its first group.
    """
    encoded = examples if isinstance(examples, EncodedExamples) else encoding.encode(examples, targets=False)
    n = len(encoded)
    answers: dict[str, list[Any]] = {name: [None] * n for name in encoding.targets}
    raw: dict[str, list[Any]] = {name: [None] * n for name in encoding.targets}
    experts: list[Any] = [None] * n if with_experts else []
    for batch in task_batches(encoded, batch_size):
        out: TaskOutput = model(batch.inputs)
        rows = batch.rows.tolist()
        if recorder is not None:
            add_task(recorder, batch.inputs, out, batch.rows, [0] * n)
        for name, encoder in encoding.targets.items():
            for place, row in enumerate(rows):
                said = encoder.answers(out.answers[name], place)
                said = encoder.completed(said, row, encoded.inputs, encoded.examples)
                answers[name][row], raw[name][row] = said, encoder.raw(out.answers[name], place, said)
        if with_experts:
            for row, shares in zip(rows, expert_shares(out.routing, len(rows)), strict=True):
                experts[row] = shares
    stacked = {
        name: np.stack(values) if values and isinstance(values[0], np.ndarray) else values
        for name, values in raw.items()
    }
    return Predictions(answers, stacked, experts)


def expert_shares(plans: Sequence[RoutingPlan], n: int) -> list[np.ndarray]:
    """For each of `n` examples `[layers, E]`: the share of its tokens' weights that each expert has, by layer."""
    if not plans:
        return [np.zeros((0, 0))] * n
    widest = max(len(plan.tokens_per_expert) for plan in plans)
    found = np.zeros((n, len(plans), widest))
    for layer, plan in enumerate(plans):
        expert = torch.repeat_interleave(torch.arange(len(plan.tokens_per_expert)), plan.tokens_per_expert)
        example = plan.token_index // plan.batch_shape[1]
        weight = plan.row_weight.float()
        total = torch.zeros(n, widest).index_put_((example, expert), weight, accumulate=True)
        found[:, layer] = (total / total.sum(dim=1, keepdim=True).clamp(min=1e-12)).numpy()
    return list(found)


def top_experts(
    shares: np.ndarray, n: int = 2, layers: Sequence[Mapping[str, Any]] = ()
) -> list[dict[str, Any]]:
    """The `n` experts of each layer that weigh most: layer, expert and share, and what else is known of them.

    Args:
        shares: `[layers, E]`.
        n: experts of each layer.
        layers: of each layer `names` of its experts, and the `task` that it mixes them for; empty or None where none.

    >>> top_experts(np.array([[0.1, 0.7, 0.2]]), 1)
    [{'layer': 0, 'expert': 1, 'share': 0.7}]
    >>> top_experts(np.array([[0.1, 0.7, 0.2]]), 1, [{"names": ("law", "tax", "chat"), "task": None}])
    [{'layer': 0, 'expert': 1, 'share': 0.7, 'name': 'tax'}]
    """
    found = []
    for layer, row in enumerate(shares):
        for expert in np.argsort(-row, kind="stable")[:n]:
            if row[expert] <= 0:
                continue
            said = {"layer": layer, "expert": int(expert), "share": round(float(row[expert]), 4)}
            told = layers[layer] if layers else {}
            if told.get("names"):
                said["name"] = told["names"][expert]
            if told.get("task"):
                said["task"] = told["task"]
            found.append(said)
    return found


def layers_of(model: TaskModel) -> list[dict[str, Any]]:
    """What `top_experts` can say of each sparse layer: the names of its experts, and whose mixture it is."""
    return [
        {"names": layer.expert_names, "task": layer.name} if isinstance(layer, Mixture)
        else {"names": layer.router.expert_names, "task": None}
        for layer in model.moe_layers
    ]  # fmt: skip


def truth(encoding: Encoding, examples: Examples) -> Mapping[str, Any]:
    """What the examples say themselves, by target, as metrics compare it: names, numbers `[N, M]` or lists of tags."""
    return {name: encoder.truth(examples) for name, encoder in encoding.targets.items()}
