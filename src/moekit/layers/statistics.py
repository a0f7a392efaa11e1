"""Routing statistics that add up: over micro-batches, batches and layers' calls, without rounding.

Counts are integers, so a sum over micro-batches equals the single pass exactly. They come from the plan that
the layer returned, so recomputing activations counts nothing twice.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from moekit.layers.plan import RoutingPlan


@dataclass
class RoutingStats:
    """Sums over tokens that count (padding does not); `a + b` joins two.

    Attributes:
        requested_per_expert: `[E]` int64, choices before capacity.
        dropped: 0-d int64, choices that found their expert full.
        n_tokens: 0-d int64.
        prob_sum: `[E]` float64, sum of router probabilities; zeros where the router has none.
        entropy_sum: 0-d float64, sum of the entropy of router probabilities in nats.
    """

    requested_per_expert: Tensor
    dropped: Tensor
    n_tokens: Tensor
    prob_sum: Tensor
    entropy_sum: Tensor

    @classmethod
    @torch.no_grad()
    def from_plan(cls, plan: RoutingPlan) -> RoutingStats:
        """Statistics of one call of one layer."""
        device = plan.tokens_per_expert.device
        mask = plan.token_mask
        if mask is None:
            n_tokens = torch.tensor(plan.n_tokens, device=device)
        else:
            n_tokens = mask.sum()
        if plan.router_probs is None:
            prob_sum = torch.zeros(plan.n_experts, dtype=torch.float64, device=device)
            entropy_sum = torch.zeros((), dtype=torch.float64, device=device)
        else:
            probs = plan.router_probs if mask is None else plan.router_probs * mask[:, None]
            prob_sum = probs.sum(dim=0, dtype=torch.float64)
            entropy_sum = torch.special.entr(probs).sum(dtype=torch.float64)
        return cls(plan.requested.clone(), plan.n_dropped, n_tokens, prob_sum, entropy_sum)

    def __add__(self, other: RoutingStats) -> RoutingStats:
        return RoutingStats(
            self.requested_per_expert + other.requested_per_expert,
            self.dropped + other.dropped,
            self.n_tokens + other.n_tokens,
            self.prob_sum + other.prob_sum,
            self.entropy_sum + other.entropy_sum,
        )

    def load(self) -> Tensor:
        """`[E]` share of the choices of each expert, float64; sums to 1 (zeros without any choice)."""
        counts = self.requested_per_expert.double()
        return counts / counts.sum().clamp(min=1)

    def max_violation(self) -> float:
        """(largest load - mean load) / mean load; 0 at perfect balance (Wang et al. 2024)."""
        load = self.load()
        return float(load.max() / load.mean().clamp(min=1e-300) - 1) if load.sum() > 0 else 0.0

    def load_entropy(self) -> float:
        """Entropy of the load over log E: 1 at perfect balance (or one expert), 0 where one takes all."""
        load = self.load()
        return float(torch.special.entr(load).sum()) / math.log(len(load)) if len(load) > 1 else 1.0

    def route_entropy(self) -> float:
        """Mean entropy of a token's router probabilities, in nats."""
        return float(self.entropy_sum / self.n_tokens.clamp(min=1))

    def dead_experts(self, share: float = 0.01) -> int:
        """Experts with less than `share` of the mean load."""
        load = self.load()
        return int((load < share * load.mean()).sum())

    def dropped_share(self) -> float:
        """Dropped choices over all choices."""
        return float(self.dropped / self.requested_per_expert.sum().clamp(min=1))

    def mean_active_experts(self) -> float:
        """Experts that answered per token, after drops; null experts count, and with Soft MoE the slots."""
        return float((self.requested_per_expert.sum() - self.dropped) / self.n_tokens.clamp(min=1))

    def load_balance_loss(self) -> float:
        """E * sum(f * P) over all that was added up: 1 at perfect balance, nan without probabilities."""
        if self.prob_sum.sum() == 0:
            return float("nan")
        mean_probs = self.prob_sum / self.n_tokens
        return float(len(mean_probs) * (self.load() * mean_probs).sum())


def routing_stats(plans: tuple[RoutingPlan, ...]) -> list[RoutingStats]:
    """Statistics of every sparse layer of one forward pass, first layer first."""
    return [RoutingStats.from_plan(plan) for plan in plans]


def add_stats(total: list[RoutingStats] | None, more: list[RoutingStats]) -> list[RoutingStats]:
    """Layer-wise sum; None starts it."""
    return more if total is None else [a + b for a, b in zip(total, more, strict=True)]
