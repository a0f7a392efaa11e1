"""What the experts' kernels are given: weights, how they lie in memory, and the activation between them.

Shape legend: E experts, D width in, F width of an expert, G 2 with a gate and else 1, O width out.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moekit.config.errors import ConfigError, nearest

if TYPE_CHECKING:
    from moekit.kernels.quantized import QuantizedMatrix

# the numbers that the C++ kernels know them by (kernels/cpu/common.h); the gated ones come first
KINDS = {
    "swiglu": 0, "geglu": 1, "geglu_tanh": 2, "clamped_swiglu": 3,
    "gelu": 4, "gelu_tanh": 5, "relu": 6, "sigmoid": 7, "silu": 8, "relu_squared": 9,
}  # fmt: skip
GATED = ("swiglu", "geglu", "geglu_tanh", "clamped_swiglu")


@dataclass(frozen=True)
class Activation:
    """What stands between an expert's two maps.

    Gated kinds take a gate g and a linear part u, and give f(g) * u, with f = silu, gelu or gelu's tanh
    approximation. `clamped_swiglu` is GPT-OSS's: g' * sigmoid(alpha * g') * (u' + offset), with g' = min(g, limit)
    and u' = clamp(u, -limit, limit); the last three numbers belong to it alone.

    Errors: `ConfigError` for an unknown kind.

    >>> Activation("swiglu").gated, Activation("relu").gated
    (True, False)
    """

    kind: str = "swiglu"
    alpha: float = 1.0
    limit: float = math.inf
    offset: float = 0.0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ConfigError(
                f"activation must be one of {', '.join(KINDS)}; got {self.kind!r}. {nearest(self.kind, KINDS)}"
            )

    @classmethod
    def named(cls, kind: str) -> Activation:
        """The activation that a configuration calls `kind`; clamped_swiglu with the numbers of GPT-OSS."""
        return cls(kind, alpha=1.702, limit=7.0, offset=1.0) if kind == "clamped_swiglu" else cls(kind)

    @property
    def gated(self) -> bool:
        """Whether it takes two hidden values for each one it gives."""
        return self.kind in GATED

    def __call__(self, hidden: Tensor, interleaved: bool = False) -> Tensor:
        """`[..., G*F] -> [..., F]`; gates first, then linear parts, or alternating where `interleaved`."""
        if not self.gated:
            return _PLAIN[self.kind](hidden)
        gate, up = (hidden[..., ::2], hidden[..., 1::2]) if interleaved else hidden.chunk(2, dim=-1)
        if self.kind == "clamped_swiglu":
            gate, up = gate.clamp(max=self.limit), up.clamp(-self.limit, self.limit)
            return gate * torch.sigmoid(gate * self.alpha) * (up + self.offset)
        if self.kind == "swiglu":
            return F.silu(gate) * up
        return F.gelu(gate, approximate="tanh" if self.kind == "geglu_tanh" else "none") * up


_PLAIN = {
    "gelu": F.gelu,
    "gelu_tanh": lambda hidden: F.gelu(hidden, approximate="tanh"),
    "relu": F.relu,
    "sigmoid": torch.sigmoid,
    "silu": F.silu,
    "relu_squared": lambda hidden: F.relu(hidden).square(),
}


@dataclass(frozen=True)
class ExpertWeights:
    """E equal two-layer experts.

    Attributes:
        w_in: `[E, G*F, D]`, or `[E, D, G*F]` where transposed.
        w_out: `[E, O, F]`, or `[E, F, O]` where transposed.
        b_in: `[E, G*F]` or None.
        b_out: `[E, O]` or None.
        activation: between the two maps.
        transposed: whether the matrices are stored `[in, out]`; else `[out, in]` as in `torch.nn.Linear`.
        interleaved: whether gates and linear parts alternate along G*F; else all gates come first.
        slots: `[E]` int64, where in the stacks each expert lies, -1 for one that lies nowhere; None: each in its own
            place. The fused kernels follow it, in inference.

    Quantised matrices (`moekit.kernels.quantized`) serve inference alone; gradients and the plain kernels want tensors.
    """

    w_in: Tensor | QuantizedMatrix
    w_out: Tensor | QuantizedMatrix
    b_in: Tensor | None = None
    b_out: Tensor | None = None
    activation: Activation = Activation()
    transposed: bool = False
    interleaved: bool = False
    slots: Tensor | None = None

    @property
    def n_experts(self) -> int:
        return self.n_stacked if self.slots is None else len(self.slots)

    @property
    def n_stacked(self) -> int:
        """Experts that the stacks have room for."""
        return self.w_in.shape[0]

    def at(self, slots: Tensor) -> ExpertWeights:
        """The same stacks with experts at other places; what a kernel noted of the stacks is kept."""
        moved: ExpertWeights = object.__new__(ExpertWeights)
        moved.__dict__.update(self.__dict__, slots=slots)
        return moved

    @property
    def sizes(self) -> tuple[int, int, int]:
        """(D, F, O)."""
        if self.transposed:
            return self.w_in.shape[1], self.w_out.shape[1], self.w_out.shape[2]
        return self.w_in.shape[2], self.w_out.shape[2], self.w_out.shape[1]

    def out_in(self) -> tuple[Tensor, Tensor]:
        """`w_in [E, G*F, D]` and `w_out [E, O, F]` (views), however they are stored."""
        w_in, w_out = self.tensors()
        return (w_in.transpose(1, 2), w_out.transpose(1, 2)) if self.transposed else (w_in, w_out)

    def tensors(self) -> tuple[Tensor, Tensor]:
        """Both matrices as they are stored.

        Errors: `ConfigError` where they are quantised.
        """
        if isinstance(self.w_in, Tensor) and isinstance(self.w_out, Tensor):
            return self.w_in, self.w_out
        raise ConfigError("quantised experts only decode; got a call that needs their weights as tensors")

    def to(self, dtype: torch.dtype) -> ExpertWeights:
        """The same with every tensor in `dtype`; what has it already is not copied."""
        parts: dict[str, Any] = {name: getattr(self, name) for name in ("w_in", "w_out", "b_in", "b_out")}
        cast: dict[str, Any] = {
            name: w.to(dtype) if isinstance(w, Tensor) else w for name, w in parts.items()
        }
        return replace(self, **cast)
