"""The head that orders entities: link prediction and recommendation.

Shape legend: B examples, S tokens of all stems, L of one stem, D width, N entities, P places whose answer is learnt.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moekit.config.errors import require
from moekit.config.task import RankHeadConfig, TaskModelConfig
from moekit.models.task_heads import IGNORED, Head, HeadOutput, Hidden, register_head


@register_head("rank")
class RankHead(Head):
    """A logit for each entity: the product of what was read with the entity's own vector, and a bias.

    The vectors are those of the stem that reads such entities. Targets `[B]` number the entities from 0; -100 counts
    nowhere. With `sequence` they are `[B, L]`, what comes behind each token of the stem, and all of them are learnt at
    once (SASRec, Kang and McAuley 2018, https://arxiv.org/abs/1808.09781); the answer to a sequence is what comes
    behind its last token. With `wide` so many products of the stem's vectors score by themselves as well, beside what
    the backbone makes of them: DistMult, or ComplEx, of the same vectors.
    """

    def __init__(self, config: RankHeadConfig, d_model: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.config, self.reads_pooled = config, not config.sequence
        self.bias = nn.Parameter(torch.zeros(config.n_entities))
        self.dropout = nn.Dropout(dropout)

    @classmethod
    def build(cls, config: RankHeadConfig, model: TaskModelConfig) -> RankHead:
        return cls(config, model.d_model, model.embedding_dropout)

    def answer(self, hidden: Hidden) -> Tensor:
        """`[B, N]`."""
        if not self.config.sequence:
            return self._logits(hidden.pooled + self._product(hidden), hidden)
        x, mask = self._tokens(hidden)
        last = x.shape[1] - 1 if mask is None else mask.sum(dim=1).clamp(min=1) - 1
        return self._logits(x[torch.arange(len(x), device=x.device), last], hidden)

    def run(self, hidden: Hidden, targets: Tensor | None = None) -> HeadOutput:
        """`[B, N]`; `[P, N]` for the targets `[B, L]` of sequences, those that count, row by row."""
        if targets is None or not self.config.sequence:
            return HeadOutput(self.answer(hidden))
        x, _ = self._tokens(hidden)
        require(targets.shape == x.shape[:2], "targets", tuple(targets.shape),
                f"must be what comes behind each of the stem's tokens, {tuple(x.shape[:2])}")  # fmt: skip
        return HeadOutput(self._logits(x[targets != IGNORED], hidden))

    def loss(self, answer: Tensor, targets: Tensor) -> tuple[Tensor, int]:
        wanted = targets[targets != IGNORED] if self.config.sequence else targets
        known = int((wanted != IGNORED).sum())
        total = F.cross_entropy(
            answer, wanted, ignore_index=IGNORED, reduction="sum", label_smoothing=self.config.smoothing
        )
        return total / max(known, 1), known

    def _logits(self, x: Tensor, hidden: Hidden) -> Tensor:
        table: Any = hidden.stems[self.config.stem].weight
        of_entities = table[self.config.start : self.config.start + self.config.n_entities]
        return F.linear(x, of_entities.to(x.dtype)).float() + self.bias

    def _product(self, hidden: Hidden) -> Tensor | float:
        """What the stem multiplied, as long as a vector that the backbone gives; the factorisation of the field."""
        if self.config.wide == 0:
            return 0.0
        products = hidden.stems[self.config.stem](**hidden.inputs[self.config.stem]).x[:, : self.config.wide]
        return self.dropout(products.sum(dim=1)) * products.shape[-1] ** 0.5

    def _tokens(self, hidden: Hidden) -> tuple[Tensor, Tensor | None]:
        place = hidden.places[self.config.stem]
        return hidden.x[:, place], None if hidden.mask is None else hidden.mask[:, place]
