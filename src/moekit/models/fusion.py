"""Tokens of columns joined into one vector before the backbone.

Shape legend: B examples, S tokens of all stems, D width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Fusion(nn.Module):
    """`[B, S, D]` to `[B, 1, D]`: each place's vector, normalised, through a matrix of its own; their sum.

    Tokens of a text mean the same wherever they stand, and one matrix serves all of them. Columns do not: a user, a
    film and a mean have nothing in common, and a matrix for each is what a network on concatenated features has. The
    layers behind then are a network of experts on one vector, at the price of one token.

    >>> Fusion(3, 8)(torch.randn(5, 3, 8)).shape
    torch.Size([5, 1, 8])
    """

    def __init__(self, n_tokens: int, d_model: int) -> None:
        super().__init__()
        self.map = nn.Parameter(torch.randn(n_tokens, d_model, d_model) * (n_tokens * d_model) ** -0.5)
        self.bias = nn.Parameter(torch.zeros(d_model))

    def forward(self, x: Tensor) -> Tensor:
        normed = F.layer_norm(x, x.shape[-1:])
        return (torch.einsum("bsd,sde->be", normed, self.map) + self.bias)[:, None]
