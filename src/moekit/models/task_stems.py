"""Stems of tasks: one modality's arrays to token vectors.

Shape legend: B examples, S tokens that a stem gives, D width; the arrays that a stem reads stand in its `forward`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moekit.config.base import StrictConfig
from moekit.config.errors import require
from moekit.config.task import (
    BagStemConfig,
    FieldStemConfig,
    FrameStemConfig,
    IdStemConfig,
    PatchStemConfig,
    ProfileStemConfig,
    TokenStemConfig,
)


@dataclass
class Vectors:
    """What a stem gives.

    Attributes: x `[B, S, D]`; mask `[B, S]` False at padding, or None; ids `[B, S]` for routers that read them, or None
        where a modality has none.
    """

    x: Tensor
    mask: Tensor | None = None
    ids: Tensor | None = None


STEMS: dict[str, type[nn.Module]] = {}
S = TypeVar("S", bound="type[nn.Module]")


def register_stem(kind: str) -> Callable[[S], S]:
    """Class decorator: the stem for configurations of this kind, built as `Stem(config, d_model)`."""

    def add(cls: S) -> S:
        STEMS[kind] = cls
        return cls

    return add


def build_stem(config: StrictConfig, d_model: int) -> nn.Module:
    """The stem that a configuration's `kind` names."""
    return STEMS[config.kind](config, d_model)  # type: ignore[attr-defined]


def _table(size: int, d_model: int) -> nn.Parameter:
    """Vectors of length about 1, so that a stem's tokens weigh as much as what layers add to them."""
    return nn.Parameter(torch.randn(size, d_model) * d_model**-0.5)


@register_stem("tokens")
class TextStem(nn.Module):
    """Token ids to vectors, by a table; 0 is padding."""

    def __init__(self, config: TokenStemConfig, d_model: int) -> None:
        super().__init__()
        self.weight = _table(config.vocab_size, d_model)

    def forward(self, ids: Tensor) -> Vectors:
        """`ids` `[B, S]`."""
        return Vectors(F.embedding(ids, self.weight), ids != 0, ids)


@register_stem("bag")
class BagStem(nn.Module):
    """A weighted set of ids to one vector: the weighted sum of a table's rows; 0 is padding."""

    def __init__(self, config: BagStemConfig, d_model: int) -> None:
        super().__init__()
        self.weight = _table(config.vocab_size, d_model)

    def forward(self, ids: Tensor, weights: Tensor) -> Vectors:
        """`ids` `[B, N]` and `weights` `[B, N]` float, 0 at padding."""
        return Vectors(weighted_rows(self.weight, ids, weights)[:, None])


def weighted_rows(table: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """`[B, D]`: rows `ids` `[B, N]` of a table `[V, D]`, summed by `weights` `[B, N]`."""
    return F.embedding_bag(ids, table, per_sample_weights=weights.to(table.dtype), mode="sum")


@register_stem("patches")
class PatchStem(nn.Module):
    """An image to a vector for each patch, places learnt; convolutions before that where asked for.

    Convolutions are 3 x 3, each with BatchNorm and ReLU. One of `pools` keeps the largest of each 2 x 2 pixels, before
    the norm: a quarter of the work for it and what follows.
    """

    def __init__(self, config: PatchStemConfig, d_model: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = config.channels
        for number, width in enumerate(config.convolutions, start=1):
            layers.append(nn.Conv2d(channels, width, 3, padding=1, bias=False))
            if number in config.pools:
                layers.append(nn.MaxPool2d(2))
            layers += [nn.BatchNorm2d(width), nn.ReLU()]
            channels = width
        self.convolutions = nn.ModuleList(layers)
        side = config.patch // 2 ** len(config.pools)
        self.cut = nn.Conv2d(channels, d_model, side, stride=side)
        self.places = _table(config.n_patches, d_model)

    def forward(self, pixels: Tensor) -> Vectors:
        """`pixels` `[B, C, H, W]` float."""
        x = pixels
        for layer in self.convolutions:
            x = layer(x)
            if isinstance(layer, nn.Conv2d):
                # channels beside each other in memory: the layers take half of the time on a CPU
                x = x.contiguous(memory_format=torch.channels_last)
        x = self.cut(x)
        return Vectors(x.flatten(2).transpose(1, 2) + self.places)


@register_stem("frames")
class FrameStem(nn.Module):
    """Frames of features to a vector for each group of `stride` of them."""

    def __init__(self, config: FrameStemConfig, d_model: int) -> None:
        super().__init__()
        self.stride = config.stride
        # no norm here: it would take away how loud a frame is; the features come standardised
        self.map = nn.Linear(config.n_features * config.stride, d_model)

    def forward(self, frames: Tensor, lengths: Tensor) -> Vectors:
        """`frames` `[B, T, N]` float, of which the first `lengths` `[B]` are real."""
        missing = -frames.shape[1] % self.stride
        joined = F.pad(frames, (0, 0, 0, missing)).unflatten(1, (-1, self.stride)).flatten(2)
        places = torch.arange(joined.shape[1], device=frames.device) * self.stride
        return Vectors(self.map(joined), places[None] < lengths[:, None].clamp(min=1))


@register_stem("fields")
class FieldStem(nn.Module):
    """A vector for each numeric and each categorical column.

    With bins, a number's vector is also the sum of its ranges' vectors, each by the share of the range that lies below
    the number (piecewise linear encoding, Gorishniy et al. 2022, arXiv 2203.05556).
    """

    def __init__(self, config: FieldStemConfig, d_model: int) -> None:
        super().__init__()
        n = config.n_numbers
        self.slopes, self.starts, self.gaps = _table(n, d_model), _table(n, d_model), _table(n, d_model)
        self.sizes = config.sizes
        offsets = torch.tensor([0, *config.sizes]).cumsum(0)[:-1]
        self.register_buffer("offsets", offsets, persistent=False)
        self.weight = _table(sum(config.sizes), d_model)
        self.list_sizes = config.list_sizes
        self.lists = _table(sum(config.list_sizes), d_model) if config.list_sizes else None
        bins = config.n_bins
        self.ranges = nn.Parameter(torch.randn(n, bins, d_model) * d_model**-0.5) if n * bins else None

    def forward(
        self,
        numbers: Tensor,
        categories: Tensor,
        lists: Tensor | None = None,
        filled: Tensor | None = None,
    ) -> Vectors:
        """Vectors of columns: numbers, categories, lists.

        Args:
            numbers: `[B, N]` float, NaN where missing.
            categories: `[B, M]`, each below its size.
            lists: `[B, L]` float, the weight of each category of all columns of lists.
            filled: `[B, N, bins]`, the share of each range that lies below the number.
        """
        missing = numbers.isnan()[..., None]
        values = numbers.nan_to_num()[..., None]
        known = values * self.slopes + self.starts
        if self.ranges is not None and filled is not None:
            known = known + torch.einsum("bnk,nkd->bnd", filled.to(known.dtype), self.ranges)
        offsets: Any = self.offsets
        named = F.embedding(categories + offsets, self.weight)
        tokens = [torch.where(missing, self.gaps, known), named]
        if self.lists is not None and lists is not None:
            parts = zip(lists.split(self.list_sizes, dim=1), self.lists.split(self.list_sizes), strict=True)
            tokens += [(weights.to(table.dtype) @ table)[:, None] for weights, table in parts]
        return Vectors(torch.cat(tokens, dim=1))


@register_stem("ids")
class IdStem(nn.Module):
    """A vector for each entity of each column, and for each pair of columns whose vectors are multiplied."""

    def __init__(self, config: IdStemConfig, d_model: int) -> None:
        super().__init__()
        if config.complex:
            require(d_model % 2 == 0, "d_model", d_model, "must be even for inputs with complex: true")
        self.products, self.complex = config.products, config.complex
        self.register_buffer("offsets", torch.tensor([0, *config.sizes]).cumsum(0)[:-1], persistent=False)
        self.weight = _table(sum(config.sizes), d_model)

    def forward(self, ids: Tensor) -> Vectors:
        """`ids` `[B, M]`, each below its column's size."""
        offsets: Any = self.offsets
        where = ids + offsets
        x = F.embedding(where, self.weight)
        if not self.products:
            return Vectors(x, None, where)
        first, second = ([pair[side] for pair in self.products] for side in (0, 1))
        multiplied = (complex_product if self.complex else torch.mul)(x[:, first], x[:, second])
        # two vectors of length 1 have a product of about the root of their width less
        x = torch.cat([multiplied * x.shape[-1] ** 0.5, x], dim=1)
        return Vectors(x, None, torch.cat([where[:, second], where], dim=1))


def complex_product(a: Tensor, b: Tensor) -> Tensor:
    """The product of complex numbers whose real parts are the first half of the last axis.

    >>> complex_product(torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0])).tolist()      # (1 + 2i)(3 + 4i)
    [-5.0, 10.0]
    """
    (a_real, a_imaginary), (b_real, b_imaginary) = a.chunk(2, dim=-1), b.chunk(2, dim=-1)
    real = a_real * b_real - a_imaginary * b_imaginary
    return torch.cat([real, a_real * b_imaginary + a_imaginary * b_real], dim=-1)


@register_stem("profile")
class ProfileStem(nn.Module):
    """A weighted set of entities to one vector, and numbers about it to another.

    Each entity of the set counts by a vector of its own and by one times its weight, as in SVD++ and asymmetric factor
    models (Koren 2008).
    """

    def __init__(self, config: ProfileStemConfig, d_model: int) -> None:
        super().__init__()
        self.presence, self.weight = _table(config.size, d_model), _table(config.size, d_model)
        self.map = nn.Linear(2, d_model)

    def forward(self, ids: Tensor, weights: Tensor, numbers: Tensor, sizes: Tensor) -> Vectors:
        """`ids` `[B, N]`, 0 where there is none, with `weights` `[B, N]`; `numbers` `[B, 2]` float; `sizes` `[B]`
        float, how large the whole set is of which these are a sample."""
        there = (ids != 0).to(self.weight.dtype)
        # a sum over the root of the size, as in SVD++; of a sample, what the whole set gives on average
        scale = sizes[:, None].sqrt() / there.sum(dim=1, keepdim=True).clamp(min=1)
        scale = there * scale
        x = weighted_rows(self.presence, ids, scale) + weighted_rows(self.weight, ids, weights * scale)
        return Vectors(torch.stack([x, self.map(numbers)], dim=1))
