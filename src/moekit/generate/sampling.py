"""From logits to the next token: greedy, temperature, top-k, top-p, min-p and repetition penalty.

The order is that of Hugging Face: penalty, temperature, top-k, top-p, min-p, draw. Everything runs in float32
on the CPU, so that a seed gives the same draws wherever the model runs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moekit.config.errors import NonFiniteError, require


@dataclass(frozen=True)
class Sampler:
    """A rule that chooses one token from logits.

    Attributes:
        temperature: logits are divided by it; 0 always takes the largest (greedy, the first among equals).
        top_k: exactly k of the most probable tokens; None for all.
        top_p: only the smallest set of most probable tokens that reaches this probability (Holtzman et al.
            2020, arXiv 1904.09751); None for all.
        min_p: only tokens at least this share as probable as the most probable one (Nguyen et al. 2024,
            arXiv 2407.01082); None for all.
        repetition_penalty: logits of tokens already in the text are divided by it where positive and
            multiplied by it where negative (Keskar et al. 2019, arXiv 1909.05858); 1 changes nothing.

    Errors: `ConfigError` for a value outside its range.

    >>> import torch
    >>> Sampler(temperature=0)(torch.tensor([[0.1, 2.0, 1.0]])).tolist()
    [1]
    >>> Sampler(top_k=2).probs(torch.tensor([[0.0, 0.0, -1.0]])).tolist()
    [[0.5, 0.5, 0.0]]
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        require(_is_number(self.temperature) and self.temperature >= 0, "temperature", self.temperature,
                "must be a number of at least 0", "0 always takes the most probable token")  # fmt: skip
        require(self.top_k is None or (isinstance(self.top_k, int) and self.top_k >= 1), "top_k", self.top_k,
                "must be an integer of at least 1, or None for all tokens")  # fmt: skip
        for name, value in (("top_p", self.top_p), ("min_p", self.min_p)):
            require(value is None or (_is_number(value) and 0 < value <= 1), name, value,
                    "must be above 0 and at most 1, or None for all tokens")  # fmt: skip
        require(_is_number(self.repetition_penalty) and self.repetition_penalty > 0, "repetition_penalty",
                self.repetition_penalty, "must be a number above 0", "1 changes nothing")  # fmt: skip

    def __call__(
        self,
        logits: Tensor,
        history: Sequence[Sequence[int]] | None = None,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
    ) -> Tensor:
        """Choose one token per row.

        Args:
            logits: `[B, V]`; -inf forbids a token.
            history: token ids so far of each row, for the repetition penalty.
            generator: a CPU generator for all rows, or one per row, so that a row's draws do not depend on
                its neighbours; None for torch's global one.

        Returns the ids `[B]`, long, on the CPU. Errors: `NonFiniteError` where a row has NaN, +inf or only
        -inf.
        """
        if self.temperature == 0:
            return self._penalised(logits, history).argmax(dim=-1)
        probs = self.probs(logits, history)
        if generator is None or isinstance(generator, torch.Generator):
            return torch.multinomial(probs, 1, generator=generator)[:, 0]
        require(len(generator) == len(probs), "generator", f"{len(generator)} generators",
                f"must be one, or one for each of the {len(probs)} rows")  # fmt: skip
        draws = [
            torch.multinomial(row, 1, generator=each) for row, each in zip(probs, generator, strict=True)
        ]
        return torch.cat(draws)

    def probs(self, logits: Tensor, history: Sequence[Sequence[int]] | None = None) -> Tensor:
        """Probabilities `[B, V]` float32 that a draw uses: 0 for tokens that a rule removed, summing to 1."""
        logits = self._penalised(logits, history)
        if self.temperature == 0:
            return torch.nn.functional.one_hot(logits.argmax(dim=-1), logits.shape[-1]).float()
        # subtracting the largest first keeps a tiny temperature from overflowing
        logits = (logits - logits.amax(dim=-1, keepdim=True)) / self.temperature
        if self.top_k is not None and self.top_k < logits.shape[-1]:
            best, where = logits.topk(self.top_k, dim=-1)
            logits = torch.full_like(logits, -math.inf).scatter(-1, where, best)
        probs = torch.softmax(logits, dim=-1)
        if self.top_p is not None:
            ordered, where = probs.sort(dim=-1, descending=True, stable=True)
            # a token stays while those before it have not yet reached p, so the first always stays
            before = ordered.cumsum(dim=-1) - ordered
            probs = torch.zeros_like(probs).scatter(-1, where, ordered.masked_fill(before >= self.top_p, 0.0))
        if self.min_p is not None:
            probs = probs.masked_fill(probs < self.min_p * probs.amax(dim=-1, keepdim=True), 0.0)
        return probs / probs.sum(dim=-1, keepdim=True)

    def _penalised(self, logits: Tensor, history: Sequence[Sequence[int]] | None) -> Tensor:
        require(logits.dim() == 2, "logits", tuple(logits.shape), "must have shape [batch, vocabulary]")
        logits = logits.detach().to("cpu", torch.float32)
        largest = logits.amax(dim=-1)
        if not largest.isfinite().all():
            raise NonFiniteError(
                f"logits of the next token must be finite; their largest is {largest.tolist()}. "
                "The model's weights or its precision are broken: evaluate it, or take an earlier checkpoint"
            )
        if self.repetition_penalty == 1 or history is None:
            return logits
        require(len(history) == len(logits), "history", f"{len(history)} rows",
                f"must have as many rows as the logits ({len(logits)})")  # fmt: skip
        logits = logits.clone()
        for row, ids in enumerate(history):
            seen = torch.tensor(sorted(set(ids)), dtype=torch.long)
            values = logits[row, seen]
            penalty = self.repetition_penalty
            logits[row, seen] = torch.where(values > 0, values / penalty, values * penalty)
        return logits


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
