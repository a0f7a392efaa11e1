"""Heads turn hidden states `[B, S, D]` into the answer of a task."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moekit.kernels.cross_entropy import IGNORED, linear_cross_entropy


class LanguageModelHead(nn.Module):
    """Next-token prediction over V ids; its matrix is its own or the stem's (tied)."""

    def __init__(self, vocab_size: int, d_model: int, tied_to: nn.Parameter | None = None) -> None:
        super().__init__()
        self.weight = tied_to if tied_to is not None else nn.Parameter(torch.empty(vocab_size, d_model))

    def logits(self, hidden_states: Tensor) -> Tensor:
        """`[..., V]` in the type of the hidden states or of autocast."""
        return F.linear(hidden_states, self.weight)

    def loss(self, hidden_states: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, int]:
        """Mean cross-entropy in nats, losses `[B, S]` float32 (0 where ignored), and how many counted."""
        flat = targets.reshape(-1)
        mean, each = linear_cross_entropy(
            hidden_states.reshape(-1, hidden_states.shape[-1]), self.weight, flat
        )
        return mean, each.view(targets.shape), int((flat != IGNORED).sum())
