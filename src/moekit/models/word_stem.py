"""The stem of words: each a token, the sum of its own vector and of its parts' vectors.

Parts are runs of characters, beginnings and endings, the shape and pairs with neighbours; their vectors are shared by a
hash (fastText: Bojanowski et al. 2017, arXiv:1607.04606), so that a word that training never saw has a meaning too.

Shape legend: B examples, S words, N parts of a word, D width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moekit.config.task import WordStemConfig
from moekit.models.task_stems import Vectors, register_stem


@register_stem("words")
class WordStem(nn.Module):
    """Words by id and by the ids of their parts; with `mix`, each takes in its neighbours by a convolution."""

    def __init__(self, config: WordStemConfig, d_model: int) -> None:
        super().__init__()
        self.mix = config.mix
        # vectors of length about 1, as every stem's
        self.weight = nn.Parameter(torch.randn(config.vocab_size, d_model) * d_model**-0.5)
        # most parts are rare: one that training hardly touched shall say next to nothing, not something random
        self.parts = nn.Parameter(torch.randn(config.buckets + 1, d_model) * 0.1 * d_model**-0.5)
        self.neighbours = nn.Linear((2 * config.mix + 1) * d_model, d_model) if config.mix else None

    def forward(self, ids: Tensor, parts: Tensor) -> Vectors:
        """`ids` `[B, S]`, 0 at padding; `parts` `[B, S, N]`, 0 for none."""
        mask = ids != 0
        bags = F.embedding_bag(parts.flatten(0, 1), self.parts, mode="sum", padding_idx=0)
        # vectors of many parts add up to no more length than those of few
        n = (parts != 0).sum(dim=-1, keepdim=True).clamp(min=1)
        x = F.embedding(ids, self.weight) + bags.view(*ids.shape, -1) * n.rsqrt()
        if self.neighbours is not None:
            x = x * mask[..., None]
            wide = F.pad(x, (0, 0, self.mix, self.mix))
            near = [wide[:, step : step + x.shape[1]] for step in range(2 * self.mix + 1)]
            x = x + F.gelu(self.neighbours(torch.cat(near, dim=-1)))
        return Vectors(x, mask, ids)
