"""The loss over batches without training: what validation and evaluation share."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from moekit.data.loader import Batch
from moekit.data.task_loader import TaskBatch
from moekit.layers.statistics import RoutingStats, add_stats, routing_stats
from moekit.train.device import autocast


@dataclass
class LossSum:
    """Sum of nats over predicted tokens, and the routing of every sparse layer over the same tokens."""

    nats: float
    n_targets: int
    stats: list[RoutingStats]

    @property
    def mean(self) -> float:
        """Nats per token; nan where nothing was predicted."""
        return self.nats / self.n_targets if self.n_targets else float("nan")


def loss_over(
    model: nn.Module, batches: Iterable[Batch | TaskBatch], device: torch.device, dtype: torch.dtype,
    on_output: Callable[[Any, Any], None] | None = None,
) -> LossSum:  # fmt: skip
    """Evaluate on batches whose rows continue each other, so that a recurrent model carries its memory.

    The model is put back into the mode it was in; torch's generators are left as they were. A router that draws in
    evaluation too draws the same every time, so that the result depends on model and batches alone. `on_output` is
    called with each batch and what the model gave for it.
    """
    was_training = model.training
    model.eval()
    total, n_targets, memory = 0.0, 0, None
    stats: list[RoutingStats] | None = None
    try:
        with (
            _own_random_numbers(device),
            torch.inference_mode(),
            autocast(device, dtype),
        ):
            for batch in batches:
                batch = batch.to(device)
                more: dict[str, Any] = {}
                if isinstance(batch, Batch):
                    # padding stands only at the end of a split's rows; a mask costs attention and routing time
                    mask = batch.token_mask
                    more = {
                        "token_mask": None if bool(mask.all()) else mask,
                        "memory": memory,
                        "return_logits": False,
                    }
                out = model(**batch.arguments(), **more)
                memory = getattr(out, "memory", None)
                if out.n_targets:
                    total += float(out.loss) * out.n_targets
                    n_targets += out.n_targets
                if on_output is not None:
                    on_output(batch, out)
                if out.routing:
                    stats = add_stats(stats, routing_stats(out.routing))
    finally:
        model.train(was_training)
    return LossSum(total, n_targets, stats or [])


@contextmanager
def _own_random_numbers(device: torch.device) -> Iterator[None]:
    cuda = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=cuda):
        torch.default_generator.manual_seed(0)
        if cuda:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(0)
        yield
