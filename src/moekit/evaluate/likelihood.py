"""How likely a trained task finds texts that somebody else wrote: for ranking candidates.

Shape legend: N examples, C candidates of each.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from moekit.config.errors import ConfigError
from moekit.data.encoding.sequences import SequenceEncoder
from moekit.data.encoding.whole import Encoding
from moekit.data.examples import Examples
from moekit.data.task_loader import task_batches
from moekit.models.sequence_head import SequenceHead
from moekit.models.task_model import TaskModel

BATCH = 128


@torch.inference_mode()
def log_likelihoods(
    model: TaskModel, encoding: Encoding, examples: Examples, target: str, batch_size: int = BATCH
) -> tuple[np.ndarray, np.ndarray]:
    """`[N]` the natural logarithm of the probability of each example's own text, and `[N]` its tokens, its end counted.

    Args:
        model: in evaluation mode.
        encoding: of its run.
        examples: with the columns of all inputs and targets.
        target: a target of kind sequence.

    Errors: `ConfigError` for a target of another kind.
    """
    head = model.heads[target]
    if not isinstance(head, SequenceHead):
        raise ConfigError(f"target {target!r} must be of kind sequence; got {encoding.targets[target].kind}")
    encoded = encoding.encode(examples)
    total, tokens = np.zeros(len(encoded)), np.zeros(len(encoded), dtype=np.int64)
    for batch in task_batches(encoded, batch_size):
        out = model(batch.inputs, {target: batch.targets[target]})
        losses = head.token_losses(out.answers[target], batch.targets[target])
        total[batch.rows.numpy()] = -losses.double().sum(dim=1).numpy()
        tokens[batch.rows.numpy()] = (batch.targets[target] >= 0).sum(dim=1).numpy()
    return total, tokens


def candidate_likelihoods(
    model: TaskModel, encoding: Encoding, examples: Examples, target: str, candidates: Sequence[Sequence[str]]
) -> tuple[np.ndarray, np.ndarray]:
    """`log_likelihoods` `[N, C]` of several texts for each example, and their tokens; equally many for each."""
    encoder = encoding.targets[target]
    if not isinstance(encoder, SequenceEncoder):
        raise ConfigError(f"target {target!r} must be of kind sequence; got {encoder.kind}")
    n, c = len(candidates), len(candidates[0])
    repeated = examples.rows(np.repeat(np.arange(n), c))
    columns: dict[str, Any] = {
        **repeated.columns, encoder.config.column: [text for texts in candidates for text in texts]
    }  # fmt: skip
    total, tokens = log_likelihoods(model, encoding, Examples(columns), target)
    return total.reshape(n, c), tokens.reshape(n, c)
