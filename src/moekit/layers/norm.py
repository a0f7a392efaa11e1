"""Root-mean-square normalisation (Zhang and Sennrich 2019, arXiv 1910.07467)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moekit.kernels.rms_norm import add_rms_norm


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension; the result has the type of the input."""

    def __init__(self, width: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor, for_products: bool = False) -> Tensor:
        """The norm; with `for_products` under autocast in the type that matrix products run in."""
        return add_rms_norm(x, None, self.weight, self.eps, for_products)[1]

    def add(self, x: Tensor, delta: Tensor, for_products: bool = False) -> tuple[Tensor, Tensor]:
        """The residual sum x + delta in the type of `x`, and its norm."""
        return add_rms_norm(x, delta, self.weight, self.eps, for_products)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps}"
