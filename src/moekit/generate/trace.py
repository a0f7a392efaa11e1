"""What routers decided while a text was read and written.

Shape legend: B texts, n tokens that came in.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from moekit.config.errors import require
from moekit.layers.plan import RoutingPlan
from moekit.observe.choices import last_tokens
from moekit.observe.record import RoutingRecord
from moekit.observe.recorder import Recorder, layers_of

READ, WRITTEN = "read", "written"


class RoutingTrace:
    """Collects the routing of `generate`: every token of the prompts and of the answers, once.

    In the record a token's group is "read" or "written", its position the place in its text, its step the number of the
    generation step that read it: 0 for the prompt, then 1, 2, ... Tokens that a model reads again, because its window
    was full, do not count again.

    Args:
        model: with sparse layers.

    Errors: `ConfigError` for a dense model.
    """

    def __init__(self, model: nn.Module) -> None:
        layers = layers_of(model)
        require(
            len(layers) > 0, "record", type(model).__name__, "needs a model with experts; this one is dense"
        )
        self._recorder = Recorder(layers, (READ, WRITTEN), tokens=1.0, source="generation")

    def add(
        self, passes: Sequence[Sequence[RoutingPlan]], token_ids: Tensor, texts: Sequence[int], start: int, step: int
    ) -> None:  # fmt: skip
        """One reading.

        Args:
            passes: plans of each forward pass over parts of the tokens, the last one possibly behind earlier tokens.
            token_ids: `[B, n]` that came in.
            texts: numbers of the B texts.
            start: place of the first of the n tokens in its text.
            step: of generation.
        """
        batch, n = token_ids.shape
        lengths = [plans[0].batch_shape[1] for plans in passes]
        lengths[0] -= max(sum(lengths) - n, 0)  # earlier tokens again
        # where a prompt is longer than the window, its beginning was not read
        skipped = n - sum(lengths)
        for plans, ids in zip(passes, token_ids[:, skipped:].split(lengths, dim=1), strict=True):
            length = ids.shape[1]
            positions = torch.arange(length).expand(batch, length) + start + skipped
            self._recorder.add(
                [last_tokens(plan, length) for plan in plans], token_ids=ids, texts=torch.tensor(texts),
                groups=torch.full((batch,), int(step > 0)), positions=positions, step=step,
            )  # fmt: skip
            skipped += length

    def record(self, **info: Any) -> RoutingRecord:
        """What was collected; `info` goes into the record."""
        return self._recorder.record(**info)
