"""Stems turn one modality into token vectors `[B, S, D]`."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class TokenStem(nn.Module):
    """Token ids `[B, S]` to vectors `[B, S, D]` by a table `weight [V, D]` times `scale`."""

    def __init__(self, vocab_size: int, d_model: int, scale: float = 1.0) -> None:
        super().__init__()
        self.scale = scale
        self.weight = nn.Parameter(torch.empty(vocab_size, d_model))

    def forward(self, token_ids: Tensor) -> Tensor:
        vectors = nn.functional.embedding(token_ids, self.weight)
        return vectors if self.scale == 1.0 else vectors * self.scale
