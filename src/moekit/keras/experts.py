"""What the experts of the Keras layer compute, twice: by slices, and by blocks of equal size.

Shape legend: T tokens, K choices per token, R = T*K rows, E experts, D width in, F width of an expert, G 2 with a
gate and else 1, O width out, N blocks of b rows.

A compiled graph (JAX, TensorFlow) must know every shape before it knows the routing. Computing every expert on every
token has such shapes and costs E/K times the work. `by_blocks` cuts the sorted rows of each expert into blocks of b
rows, the last one padded: there are never more than (R + E*(b-1)) / b of them, whatever the routing, so that nothing
is dropped and, with b half of the mean load, at most half as much again is computed. The price is memory: each block
brings a copy of its expert's weights, 3*E copies at most. `by_slices` needs neither padding nor copies, but the sizes
as numbers: it fits a backend that runs eagerly.

Time of a step on one CPU core, forward and backward, for T 4096, D and F 128, E 16, K 2: on torch 45 ms by slices, 73
by blocks, 313 with every expert on every token; on JAX 69 ms by blocks, 258 with every expert on every token.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from keras import ops

GATED = ("swiglu", "geglu", "geglu_tanh", "clamped_swiglu")
# GPT-OSS's numbers for clamped_swiglu, as in moekit.kernels.expert_weights
ALPHA, LIMIT, OFFSET = 1.702, 7.0, 1.0
# where a graph does not know its number of tokens: rows of a block
DYNAMIC_BLOCK = 32


def activate(hidden: Any, kind: str) -> Any:
    """`[..., G*F] -> [..., F]`; with a gate, gates come first, then linear parts.

    >>> float(activate(ops.convert_to_tensor([-3.0]), "relu")[0])
    0.0
    """
    if kind not in GATED:
        return PLAIN[kind](hidden)
    gate, up = ops.split(hidden, 2, axis=-1)
    if kind == "clamped_swiglu":
        gate, up = ops.minimum(gate, LIMIT), ops.clip(up, -LIMIT, LIMIT)
        return gate * ops.sigmoid(gate * ALPHA) * (up + OFFSET)
    if kind == "swiglu":
        return ops.silu(gate) * up
    return ops.gelu(gate, approximate=kind == "geglu_tanh") * up


PLAIN: dict[str, Callable[[Any], Any]] = {
    "gelu": lambda hidden: ops.gelu(hidden, approximate=False),
    "gelu_tanh": lambda hidden: ops.gelu(hidden, approximate=True),
    "relu": ops.relu,
    "relu_squared": lambda hidden: ops.square(ops.relu(hidden)),
    "silu": ops.silu,
    "sigmoid": ops.sigmoid,
}


@dataclass(frozen=True)
class Experts:
    """E equal two-layer experts: `w_in [E, G*F, D]`, `w_out [E, O, F]`, biases `[E, G*F]` and `[E, O]` or None."""

    w_in: Any
    w_out: Any
    b_in: Any
    b_out: Any
    activation: str

    @property
    def n_experts(self) -> int:
        return int(self.w_in.shape[0])

    def __call__(self, rows: Any) -> Any:
        """`[E, b, D] -> [E, b, O]`: rows of one expert each."""
        hidden = ops.einsum("ebd,egd->ebg", rows, self.w_in)
        if self.b_in is not None:
            hidden = hidden + self.b_in[:, None]
        answers = ops.einsum("ebf,eof->ebo", activate(hidden, self.activation), self.w_out)
        return answers if self.b_out is None else answers + self.b_out[:, None]

    def take(self, index: Any) -> Experts:
        """One expert for each entry of `index`, copied."""
        parts = (self.w_in, self.w_out, self.b_in, self.b_out)
        w_in, w_out, b_in, b_out = (None if p is None else ops.take(p, index, axis=0) for p in parts)
        return Experts(w_in, w_out, b_in, b_out, self.activation)

    def each(self) -> list[Experts]:
        """The experts one by one, each with a leading dimension of 1."""
        n = self.n_experts
        parts = [
            [None] * n if p is None else ops.split(p, n, axis=0)
            for p in (self.w_in, self.w_out, self.b_in, self.b_out)
        ]
        return [Experts(one[0], one[1], one[2], one[3], self.activation) for one in zip(*parts, strict=True)]


@dataclass(frozen=True)
class SortedRows:
    """The R = T*K choices in expert order; those of padding behind all experts.

    Attributes:
        expert: `[R]` expert of each row in token order; E at padding.
        order: `[R]` rows in expert order, inside an expert by token.
        counts: `[E]` rows of each expert.
    """

    expert: Any
    order: Any
    counts: Any

    @classmethod
    def of(cls, choices: Any, n_experts: int) -> SortedRows:
        """From `[T, K]` int32 choices, E at padding."""
        expert = ops.reshape(choices, (-1,))
        counts = ops.segment_sum(ops.ones_like(expert), expert, num_segments=n_experts + 1)[:n_experts]
        return cls(expert, ops.argsort(expert), ops.cast(counts, "int32"))


def by_slices(tokens: Any, choices: Any, rows: SortedRows, experts: Experts) -> Any:
    """`[T, K, O]` answers of the chosen experts, each computed on its own rows alone; runs eagerly only.

    What stands at padding means nothing, here and in `by_blocks`.
    """
    n_tokens, k = choices.shape
    sizes = [int(size) for size in ops.convert_to_numpy(rows.counts)]
    used = sum(sizes)
    sorted_tokens = ops.take(tokens, rows.order[:used] // k, axis=0)
    answers, start = [], 0
    for expert, size in zip(experts.each(), sizes, strict=True):
        answers.append(expert(sorted_tokens[None, start : start + size])[0])
        start += size
    width = experts.w_out.shape[1]
    answers.append(ops.zeros((n_tokens * k - used, width), dtype=tokens.dtype))  # padding
    in_token_order = ops.take(ops.concatenate(answers, axis=0), ops.argsort(rows.order), axis=0)
    return ops.reshape(in_token_order, (n_tokens, k, width))


def by_blocks(tokens: Any, choices: Any, rows: SortedRows, experts: Experts) -> Any:
    """`[T, K, O]` answers of the chosen experts, in shapes that do not depend on the routing."""
    n_experts, k, width = experts.n_experts, choices.shape[1], experts.w_out.shape[1]
    if tokens.shape[0] == 0:
        return ops.zeros((0, k, width), dtype=tokens.dtype)
    n_rows, size, n_blocks = _blocks(tokens, k, n_experts)
    first_row = ops.cumsum(rows.counts) - rows.counts  # [E], in the order of rows
    blocks = (rows.counts + size - 1) // size  # [E]
    last_block = ops.cumsum(blocks)
    first_block = last_block - blocks

    number = ops.arange(n_blocks, dtype="int32")
    owner = ops.sum(ops.cast(number[:, None] >= last_block[None], "int32"), axis=1)
    owner = ops.minimum(owner, n_experts - 1)  # blocks that nobody needs compute on zeros
    place = (number - ops.take(first_block, owner))[:, None] * size + ops.arange(size, dtype="int32")[None]
    filled = place < ops.take(rows.counts, owner)[:, None]  # [N, b]
    row = ops.take(rows.order, ops.clip(ops.take(first_row, owner)[:, None] + place, 0, n_rows - 1))
    inside = ops.where(filled[..., None], ops.take(tokens, row // k, axis=0), ops.zeros((), tokens.dtype))

    answers = ops.reshape(experts.take(owner)(inside), (-1, width))  # [N*b, O]
    expert = ops.minimum(rows.expert, n_experts - 1)
    place_of_row = ops.argsort(rows.order) - ops.take(first_row, expert)
    slot = ops.take(first_block, expert) * size + place_of_row
    slot = ops.clip(slot, 0, n_blocks * size - 1)  # padding may point anywhere inside
    return ops.reshape(ops.take(answers, slot, axis=0), (-1, k, width))


def _blocks(tokens: Any, k: int, n_experts: int) -> tuple[Any, int, Any]:
    """(R, b, N). R and N are tensors where the graph does not know its number of tokens."""
    if tokens.shape[0] is None:
        n_rows = ops.shape(tokens)[0] * k
        return n_rows, DYNAMIC_BLOCK, (n_rows + n_experts * (DYNAMIC_BLOCK - 1)) // DYNAMIC_BLOCK
    n_rows = tokens.shape[0] * k
    size = max(1, math.ceil(n_rows / (2 * n_experts)))
    return n_rows, size, (n_rows + min(n_experts, n_rows) * (size - 1)) // size
