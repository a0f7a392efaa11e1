"""Routers under which each token takes as many experts as it needs."""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from moekit.config.base import StrictConfig
from moekit.config.moe import MoEConfig
from moekit.layers.plan import RoutingContext, RoutingPlan, mean_over_tokens
from moekit.layers.routing.base import LearnedRouter, normalize_chosen, register_router
from moekit.layers.statistics import RoutingStats


@register_router("top_p")
class TopPRouter(LearnedRouter):
    """The fewest experts whose probabilities reach p together (Huang et al. 2024, arXiv 2403.07652).

    `top_k` is the most a token may take. The loss "router_entropy" (their dynamic loss) keeps the
    distribution sharp; without it a router can answer everything with a flat distribution and all experts.
    """

    elastic = frozenset({"top_k", "n_experts", "top_p"})
    supports_bias = True

    class Options(StrictConfig):
        p: float = Field(
            default=0.4, gt=0, le=1, description="probability that the chosen experts must reach"
        )
        entropy_coefficient: float = Field(default=1e-3, ge=0, description="coefficient of the entropy loss")
        normalize: bool = Field(default=True, description="scale the chosen probabilities to sum to 1")

    options: Options

    def forward(self, tokens: Tensor, context: RoutingContext) -> RoutingPlan:
        logits = self.open_only(self.logits(tokens), context)
        probs = logits.softmax(dim=-1)
        index = self.open_only(self.with_bias(probs), context).topk(self.k_of(context), dim=-1).indices
        top = probs.gather(1, index)
        take = self.reaching(probs, index, context)
        if take is None:
            # an expert is taken while those before it have not reached p, so the first is always taken
            take = top.cumsum(dim=-1) - top < self.options.p
        weight = top * take
        if self.options.normalize:
            weight = normalize_chosen(weight)
        chosen = torch.zeros_like(probs, dtype=torch.bool).scatter(1, index, take)
        weights = torch.zeros_like(probs).scatter(1, index, weight)
        entropy = torch.special.entr(probs.clamp(min=1e-20)).sum(dim=-1)
        loss = self.options.entropy_coefficient * mean_over_tokens(entropy, context.token_mask)
        return RoutingPlan.from_mask(
            chosen,
            weights,
            context,
            router_logits=logits,
            router_probs=probs,
            losses={"router_entropy": loss},
        )


@register_router("threshold")
class ThresholdRouter(LearnedRouter):
    """Every expert whose ReLU output is positive: differentiable (ReMoE, Wang et al. 2024, arXiv 2412.14711).

    An L1 loss, weighted by the load of each expert so that it balances too, drives the mean number of active
    experts to `top_k`; its coefficient adapts after each step: times `growth` while too many are active,
    divided by it while too few are (eq. 10 and 12).
    """

    coefficient: Tensor

    class Options(StrictConfig):
        initial_coefficient: float = Field(
            default=1e-8, gt=0, description="coefficient of the L1 loss at the start"
        )
        growth: float = Field(default=1.2, gt=1, description="factor of the coefficient per step")
        initial_bias: float = Field(
            default=0.0, description="added to the logits, so that experts start active"
        )

    options: Options

    def __init__(self, d_model: int, config: MoEConfig, options: StrictConfig) -> None:
        super().__init__(d_model, config, options)
        self.register_buffer("coefficient", torch.tensor(self.options.initial_coefficient))

    def forward(self, tokens: Tensor, context: RoutingContext) -> RoutingPlan:
        logits = self.logits(tokens) + self.options.initial_bias
        weights = logits.relu()
        chosen = weights > 0
        counted = chosen if context.token_mask is None else chosen & context.token_mask[:, None]
        # f normalised to mean 1, so a perfectly even load gives the plain L1 norm
        load = counted.sum(dim=0).float()
        load = load / load.mean().clamp(min=1e-20)
        l1 = mean_over_tokens((weights * load).sum(dim=-1), context.token_mask)
        return RoutingPlan.from_mask(
            chosen,
            weights,
            context,
            router_logits=logits,
            router_probs=normalize_chosen(weights),
            losses={"router_l1": self.coefficient * l1},
        )

    @torch.no_grad()
    def after_step(self, stats: RoutingStats, scale: float = 1.0) -> None:
        active = stats.requested_per_expert.sum() / stats.n_tokens.clamp(min=1)
        self.coefficient *= self.options.growth ** torch.sign(active - self.top_k).to(self.coefficient)
