"""Heads of control: which action to take, and what a state is worth.

Shape legend: B states, A actions, D width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moekit.config.task_heads import PolicyHeadConfig, ValueHeadConfig
from moekit.models.task_heads import Head, Hidden, register_head

# of the map to the logits: a policy that starts near uniform explores (Andrychowicz et al. 2020, arXiv 2006.05990)
POLICY_GAIN = 0.01


@register_head("policy")
class PolicyHead(Head):
    """Logits `[B, A]`; targets `[B, 2]`: the action's number, NaN where unknown, and its advantage.

    The loss is that of the policy gradient, minus the mean of advantage times log(probability) (Williams 1992); with
    advantages of 1 it is imitation of what was done. A library of reinforcement learning takes the logits and brings a
    loss of its own.
    """

    def __init__(self, config: PolicyHeadConfig, d_model: int) -> None:
        super().__init__()
        self.map = nn.Linear(d_model, len(config.actions))
        nn.init.orthogonal_(self.map.weight, POLICY_GAIN)
        nn.init.zeros_(self.map.bias)

    def answer(self, hidden: Hidden) -> Tensor:
        return self.map(hidden.pooled).float()

    def loss(self, answer: Tensor, targets: Tensor) -> tuple[Tensor, int]:
        known = ~targets.isnan().any(dim=1)
        actions, advantages = targets.nan_to_num().unbind(dim=1)
        surprise = F.cross_entropy(answer, actions.long(), reduction="none")
        total = torch.where(known, surprise * advantages, 0.0).sum()
        return total / known.sum().clamp(min=1), int(known.sum())


@register_head("value")
class ValueHead(Head):
    """A number `[B]` for each state, in standard deviations; targets `[B]` in their own units, NaN where unknown."""

    def __init__(self, config: ValueHeadConfig, d_model: int) -> None:
        super().__init__()
        self.mean, self.deviation = config.mean, config.deviation
        self.map = nn.Linear(d_model, 1)
        nn.init.orthogonal_(self.map.weight)
        nn.init.zeros_(self.map.bias)

    def answer(self, hidden: Hidden) -> Tensor:
        return self.map(hidden.pooled).float()[:, 0]

    def loss(self, answer: Tensor, targets: Tensor) -> tuple[Tensor, int]:
        wanted = (targets - self.mean) / self.deviation
        known = ~wanted.isnan()
        squared = torch.where(known, answer - wanted.nan_to_num(), 0.0).square().sum()
        return squared / known.sum().clamp(min=1), int(known.sum())

    def in_units(self, answer: Tensor) -> Tensor:
        """Answers `[B]` in the returns' own units."""
        return answer * self.deviation + self.mean
