"""A stem for clips.

Shape legend: B examples, N frames, H and W pixels, D width; t frames and p pixels of a block.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moekit.config.task_vision import TubeletStemConfig
from moekit.models.task_stems import Vectors, register_stem


@register_stem("tubelets")
class TubeletStem(nn.Module):
    """A clip to a vector for each block of t frames and p x p pixels, places in space and in time learnt.

    Tubelet embedding of ViViT (Arnab et al. 2021, arXiv:2103.15691, section 3.2): a block holds what moves in it.
    Tokens stand frame by frame, and in a frame row by row.
    """

    def __init__(self, config: TubeletStemConfig, d_model: int) -> None:
        super().__init__()
        self.config = config
        self.map = nn.Linear(config.channels * config.frames * config.patch**2, d_model)
        moments = config.length // config.frames
        self.moments = nn.Parameter(torch.randn(moments, 1, d_model) * d_model**-0.5)
        self.places = nn.Parameter(torch.randn(config.n_patches // moments, d_model) * d_model**-0.5)

    def forward(self, clips: Tensor) -> Vectors:
        """`clips` `[B, N, C, H, W]` float."""
        t, p = self.config.frames, self.config.patch
        # [B, N / t, t, C, H / p, p, W / p, p] -> [B, N / t, H / p, W / p, t, C, p, p]
        blocks = clips.unflatten(4, (-1, p)).unflatten(3, (-1, p)).unflatten(1, (-1, t))
        tokens = blocks.permute(0, 1, 4, 6, 2, 3, 5, 7).flatten(4).flatten(2, 3)
        x = self.map(tokens) + self.moments + self.places
        return Vectors(x.flatten(1, 2))
