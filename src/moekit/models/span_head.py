"""Where an answer stands in a text that was read (Devlin et al. 2018, arXiv 1810.04805, section 4.2).

Shape legend: B examples, T tokens of the stem, D width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moekit.config.task import SpanHeadConfig
from moekit.models.task_heads import IGNORED, Head, Hidden, register_head


@register_head("span")
class SpanHead(Head):
    """Logits `[B, 1 + T, 2]` of the first and the last token; place 0 stands for no answer.

    Targets `[B, 2]`: places of the first and the last token, counted from 1, 0 for none, -100 where unknown.
    """

    def __init__(self, config: SpanHeadConfig, d_model: int) -> None:
        super().__init__()
        self.config, self.reads_pooled = config, config.may_be_empty
        self.map = nn.Linear(d_model, 2)
        # a text says as a whole that it has no answer: there is no token that always stands there to say it
        self.nothing = nn.Linear(d_model, 2) if config.may_be_empty else None

    def answer(self, hidden: Hidden) -> Tensor:
        place = hidden.places[self.config.stem]
        logits = self.map(hidden.x[:, place]).float()
        lowest = torch.finfo(logits.dtype).min
        if hidden.mask is not None:
            logits = logits.masked_fill(~hidden.mask[:, place, None], lowest)
        if self.nothing is None:
            empty = logits.new_full((len(logits), 2), lowest)
        else:
            empty = self.nothing(hidden.pooled).float()
        return torch.cat([empty[:, None], logits], dim=1)

    def loss(self, answer: Tensor, targets: Tensor) -> tuple[Tensor, int]:
        known = int((targets != IGNORED).sum())
        total = F.cross_entropy(answer, targets, ignore_index=IGNORED, reduction="sum")
        return total / max(known, 1), known
