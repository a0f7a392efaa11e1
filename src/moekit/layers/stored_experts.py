"""Experts that are not all in memory: computed from slots that a store fills, with the bits of `StackedMLP`.

    tokens_per_expert ─► parts of the chosen experts that fit the slots ─► each part held, computed, let go

Where all chosen experts fit, as in decoding, there is one part. A part's sums go on from those of the part before (or
its rows wait for the others'), so that the answer does not depend on the parts.

Shape legend: T tokens, D d_model, R rows, E experts, O output width.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Protocol

import torch
from torch import Tensor, nn

from moekit.config.errors import ConfigError
from moekit.kernels.chosen_experts import FEW_ROWS, choices_of_rows, decoded_experts
from moekit.kernels.cpu.expert_layer import expert_rows, sum_rows
from moekit.kernels.expert_weights import ExpertWeights
from moekit.kernels.quantized import QuantizedMatrix
from moekit.kernels.registry import find, pick


class ExpertPlaces(Protocol):
    """What a layer asks of the store that holds its experts.

    Attributes:
        weights: the stacks of slots, without places of experts.
        n_experts: of the layer.
    """

    @property
    def weights(self) -> ExpertWeights: ...

    @property
    def n_experts(self) -> int: ...

    def parts(self, experts: Sequence[int]) -> list[list[int]]:
        """The experts, ascending, in groups that can be held together."""
        ...

    def held(self, experts: Sequence[int], then: Sequence[int] = ()) -> AbstractContextManager[Tensor]:
        """Hold experts while they compute: slots `[E]`, -1 for the others. `then` are needed next."""
        ...


class StoredMLP(nn.Module):
    """E equal MLPs whose weights a store brings when they are needed; inference only.

    In the place of a `StackedMLP`: same calls, same answers, no parameters of its own.

    Errors: `ConfigError` where a gradient is wanted, or another type is computed in than the store holds.
    """

    def __init__(self, places: ExpertPlaces, kernel: str = "auto") -> None:
        super().__init__()
        self.places, self.kernel = places, kernel
        self._decodes: dict[torch.dtype, bool] = {}

    def forward(self, rows: Tensor, tokens_per_expert: Tensor) -> Tensor:
        """`[R, D]` sorted by expert to `[R, O]`, one expert after the other."""
        dtype = self._dtype(rows)
        kernel = pick("expert_mlp", rows.device.type, dtype, self.kernel)
        counts = tokens_per_expert.tolist()
        pieces = rows.to(dtype).split(counts)
        answers = [rows.new_zeros(0, self.places.weights.sizes[2], dtype=dtype)]
        parts = self.places.parts([expert for expert, count in enumerate(counts) if count])
        for part, following in _with_next(parts):
            with self.places.held(part, following) as slots:
                for expert in part:
                    alone = self._alone(int(slots[expert]), dtype)
                    answers.append(kernel.function(pieces[expert], tokens_per_expert[[expert]], alone))
        return torch.cat(answers)

    def fused(
        self, tokens: Tensor, token_index: Tensor, row_weight: Tensor, tokens_per_expert: Tensor
    ) -> Tensor | None:
        """Dispatch, experts and weighted sum, by the kernel that `StackedMLP.fused` would take; None without one."""
        dtype = self._dtype(tokens)
        weights = self.places.weights
        quantised = isinstance(weights.w_in, QuantizedMatrix)
        given = tokens, token_index, row_weight, tokens_per_expert
        if quantised and self.kernel == "auto":
            decoded = self._decoded(*given, dtype)
            if decoded is not None:
                return decoded
        kernel = find("expert_layer", tokens.device.type, dtype, self.kernel)
        if kernel is None:
            return None
        misfit = kernel.fits(_shapes_of(weights))
        if misfit and self.kernel != "auto":
            raise ConfigError(
                f"kernel {self.kernel!r} cannot compute these experts: {misfit}. Use kernel: auto"
            )
        if misfit:
            return None
        if not quantised and len(token_index) <= FEW_ROWS * self.places.n_experts:
            decoded = self._decoded(*given, dtype)
            if decoded is not None:
                return decoded
        return self._by_rows(*given, dtype)

    def _decoded(
        self, tokens: Tensor, token_index: Tensor, row_weight: Tensor, counts: Tensor, dtype: torch.dtype
    ) -> Tensor | None:
        if not self._can_decode(tokens):
            return None
        chosen = choices_of_rows(token_index, row_weight, counts, len(tokens))
        if chosen is None:
            return None
        parts = _with_next(self.places.parts(counts.nonzero().flatten().tolist()))
        if len(parts) == 1:
            with self.places.held(*parts[0]) as slots:
                return decoded_experts(tokens, *chosen, self.places.weights.at(slots), dtype)
        total: Tensor | None = torch.zeros(len(tokens), self.places.weights.sizes[2])
        for part, following in parts:  # a token's experts ascend, so the sums go on in the order of K
            with self.places.held(part, following) as slots:
                weights = self.places.weights.at(slots)
                total = decoded_experts(tokens, *chosen, weights, torch.float32, total)
            if total is None:
                return None
        assert total is not None
        return total.to(tokens.dtype).to(dtype)

    def _by_rows(
        self, tokens: Tensor, token_index: Tensor, row_weight: Tensor, counts: Tensor, dtype: torch.dtype
    ) -> Tensor:
        ends = counts.cumsum(0).tolist()
        rows = torch.empty(len(token_index), self.places.weights.sizes[2], dtype=dtype)
        for part, following in _with_next(self.places.parts(counts.nonzero().flatten().tolist())):
            with self.places.held(part, following) as slots:
                weights = self.places.weights
                # quantised ones are made one at a time: all at once would take the memory that was saved
                groups = (
                    [[expert] for expert in part] if isinstance(weights.w_in, QuantizedMatrix) else [part]
                )
                for group in groups:
                    index = torch.tensor(group)
                    last, first = ends[group[-1]], ends[group[0]] - int(counts[group[0]])
                    whole = len(group) == 1
                    these = self._alone(int(slots[group[0]]), dtype) if whole else weights.at(slots[index])
                    expert_rows(
                        tokens, token_index[first:last], row_weight[first:last], counts[index], these,
                        rows[first:last],
                    )  # fmt: skip
        return sum_rows(rows, token_index, len(tokens))

    def _can_decode(self, tokens: Tensor) -> bool:
        if tokens.dtype not in self._decodes:
            kernel = find("expert_decode", tokens.device.type, tokens.dtype)
            self._decodes[tokens.dtype] = kernel is not None and not kernel.fits(self.places.weights)
        return self._decodes[tokens.dtype]

    def _alone(self, slot: int, dtype: torch.dtype) -> ExpertWeights:
        """The one expert of a slot, as tensors."""
        weights = self.places.weights
        w_in, w_out = (_matrix(matrix, slot, dtype) for matrix in (weights.w_in, weights.w_out))
        b_in, b_out = (None if b is None else b[slot : slot + 1] for b in (weights.b_in, weights.b_out))
        return ExpertWeights(w_in, w_out, b_in, b_out, weights.activation).to(dtype)

    def _dtype(self, tokens: Tensor) -> torch.dtype:
        if torch.is_grad_enabled():
            raise ConfigError(
                "experts on disk cannot be trained, and give no gradient. Call the model under torch.no_grad(), or "
                "open it without a limit of memory"
            )
        kind = tokens.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else tokens.dtype
        stored = self.places.weights.w_in
        if isinstance(stored, Tensor) and stored.dtype != dtype:
            raise ConfigError(
                f"precision must be {dtype}, which is computed in, for experts on disk; got {stored.dtype}. "
                "Open the model in that precision"
            )
        return dtype

    def extra_repr(self) -> str:
        w_in = self.places.weights.w_in
        return f"n_experts={self.places.n_experts}, slots={w_in.shape[0]}, w_in={list(w_in.shape[1:])}"


def _matrix(matrix: Tensor | QuantizedMatrix, slot: int, dtype: torch.dtype) -> Tensor:
    if isinstance(matrix, Tensor):
        return matrix[slot : slot + 1]
    one = slice(slot, slot + 1)
    shape = torch.Size((1, *matrix.shape[1:]))
    alone = QuantizedMatrix(matrix.codes[one], matrix.scales[one], matrix.bits, matrix.group_size, shape)
    return alone.dequantize(dtype)


def _shapes_of(weights: ExpertWeights) -> ExpertWeights:
    """Tensors without values of the sizes of these."""
    w_in, w_out = (torch.empty(matrix.shape, device="meta") for matrix in (weights.w_in, weights.w_out))
    return ExpertWeights(w_in, w_out, weights.b_in, weights.b_out, weights.activation)


def _with_next(parts: list[list[int]]) -> list[tuple[list[int], list[int]]]:
    return list(zip(parts, [*parts[1:], []], strict=True))
