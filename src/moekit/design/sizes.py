"""Experts as wide as a budget allows: the arithmetic behind designs of equal active parameters.

A model is its fixed part (stems, attention, norms, heads) and one feed-forward block in each layer. Each layer has the
same share of what the budget leaves for these blocks, whether it is dense or sparse.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from moekit.config.model import ModelConfig
from moekit.config.moe import MoEConfig
from moekit.config.task import TaskModelConfig
from moekit.models.accounting import active_parameters, moe_cost, total_parameters

SearchedModel = ModelConfig | TaskModelConfig
# the narrowest expert: less is hardly an expert, and the router costs more than it
NARROWEST = 4


@dataclass(frozen=True)
class Frame:
    """A model without its feed-forward blocks.

    Attributes: d_model, n_layers; fixed: active parameters of the rest; stored: all parameters of the rest; row:
        parameters of one unit of width in a dense block; plain: those of a dense block without any width.
    """

    d_model: int
    n_layers: int
    fixed: int
    stored: int
    row: int
    plain: int

    @classmethod
    def of(cls, model: SearchedModel) -> Frame:
        """Measured on the model with dense layers of three widths.

        >>> frame = Frame.of(ModelConfig(d_model=64, n_layers=2, n_heads=2))
        >>> frame.row    # the three matrices of SwiGLU
        192
        """
        a, b = (dense(model, width) for width in (8, 16))
        row = (active_parameters(b) - active_parameters(a)) // (8 * model.n_layers)
        plain = model.d_model if model.mlp_bias else 0
        widths = model.n_layers * (8 * row + plain)
        return cls(
            model.d_model, model.n_layers, active_parameters(a) - widths, total_parameters(a) - widths, row, plain
        )  # fmt: skip

    def block(self, active: int, share: float = 1.0) -> float:
        """Active parameters that one layer's block may have where the model may have `active`."""
        return (active - self.fixed) * share / self.n_layers

    def dense_width(self, block: float) -> int:
        """Width of a dense block with this many parameters; 0 where there is no room."""
        return max(0, int((block - self.plain) // self.row))


def dense(model: SearchedModel, d_ff: int) -> SearchedModel:
    """The model with dense layers alone."""
    plain: dict[str, Any] = {
        "moe": None,
        "moe_by_layer": {},
        "n_dense_layers": 0,
        "moe_every": 1,
        "dense_layers": (),
    }
    return model.replace(**plain, d_ff=d_ff)


def with_width(moe: MoEConfig, d_expert: int, shared: float) -> MoEConfig:
    """Experts of this width; the shared one has the share `shared` of a token's whole inner width.

    >>> with_width(MoEConfig(top_k=2), 16, 0.5).d_shared
    32
    """
    if shared <= 0:
        return moe.replace(d_expert=d_expert, n_shared_experts=0, d_shared=None, shared_gate=False)
    width = max(1, round(moe.top_k * d_expert * shared / (1 - shared)))
    return moe.replace(d_expert=d_expert, n_shared_experts=1, d_shared=width)


def widest(d_model: int, moe: MoEConfig, shared: float, block: float) -> MoEConfig | None:
    """The layer with the widest experts whose active parameters stay within `block`; None below `NARROWEST`."""

    def fits(width: int) -> bool:
        return layer_cost(d_model, with_width(moe, width, shared))[0] <= block

    if not fits(NARROWEST):
        return None
    low, high = NARROWEST, NARROWEST * 2
    while fits(high):
        low, high = high, high * 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    # kernels like even widths; what is lost is less than a hundredth
    width = low - low % 8 if low >= 800 else low - low % 2 if low >= 200 else low
    return with_width(moe, width, shared)


def layer_cost(d_model: int, moe: MoEConfig) -> tuple[int, int]:
    """(active, total) parameters of a sparse layer."""
    return _cost(d_model, moe.model_dump_json())


@lru_cache(maxsize=4096)
def _cost(d_model: int, moe: str) -> tuple[int, int]:
    found = moe_cost(d_model, MoEConfig.model_validate_json(moe))
    return found.active, found.total
