"""Learned routers that take the K best experts of each token."""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from moekit.config.base import StrictConfig
from moekit.config.errors import require
from moekit.config.moe import MoEConfig
from moekit.kernels.routing import top_k
from moekit.layers.elastic import Elastic
from moekit.layers.plan import RoutingContext, RoutingPlan
from moekit.layers.routing.base import (
    LearnedRouter,
    Router,
    normalize_chosen,
    register_router,
    taken_only,
    weigh_chosen,
)

TAKES_ALL = frozenset({"top_k", "n_experts", "top_p"})  # of what `Elastic` sets


class SoftmaxOptions(StrictConfig):
    """How a choice by softmax weighs the experts it chose."""

    normalize: Literal["after", "before", "ones"] = Field(
        default="after",
        description="softmax over the chosen experts, over all with the rest cut off, or a weight of 1 for each",
    )


class ChoiceBySoftmax(Router):
    """A router that takes the K experts of the largest `logits(tokens) [T, E]`; a subclass makes the logits."""

    elastic = TAKES_ALL
    supports_bias = True
    supports_families = True

    class Options(SoftmaxOptions):
        """Only how to weigh."""

    options: Any

    def logits(self, tokens: Tensor) -> Tensor:
        """`[T, E]` float32."""
        raise NotImplementedError(f"router {type(self).__name__} does not implement logits(tokens)")

    def forward(self, tokens: Tensor, context: RoutingContext) -> RoutingPlan:
        logits = self.open_only(self.logits(tokens), context)
        if self.family is not None:
            logits = self.one_per_family(logits, self.with_bias(logits.detach().softmax(dim=-1)))
        probs = logits.softmax(dim=-1)
        index = top_k(self.closed_too(self.with_bias(probs), logits, context), self.k_of(context))
        take = self.reaching(probs, index, context)
        weight = weigh_chosen(probs, index, self.options.normalize, take)
        plan = RoutingPlan.from_choices(
            index, weight, self.n_experts, context, router_logits=logits, router_probs=probs
        )
        return plan if take is None else taken_only(plan, index, take)


@register_router("softmax")
class SoftmaxRouter(LearnedRouter, ChoiceBySoftmax):
    """Softmax and top-k: weights normalised after the choice (Mixtral) or before it (OLMoE), or 1 (a split layer).

    With `top_k` 1 choose "before": normalised after the choice, the one weight is always 1, and nothing but the
    balancing losses teaches the router.
    """

    class Options(SoftmaxOptions):
        logit_bias: bool = Field(default=False, description="a learned bias on the logits (GPT-OSS)")

    options: Options


@register_router("sigmoid")
class SigmoidRouter(LearnedRouter):
    """Sigmoid scores and top-k, weights normalised over the chosen (DeepSeek-V3, arXiv 2412.19437)."""

    elastic = TAKES_ALL
    supports_bias = True
    supports_families = True

    class Options(StrictConfig):
        normalize: bool = Field(default=True, description="scale the chosen scores to sum to 1")

    options: Options

    def forward(self, tokens: Tensor, context: RoutingContext) -> RoutingPlan:
        logits = self.open_only(self.logits(tokens), context)
        if self.family is not None:
            logits = self.one_per_family(logits, self.with_bias(logits.detach().sigmoid()))
        scores = logits.sigmoid()
        index = top_k(self.closed_too(self.with_bias(scores), logits, context), self.k_of(context))
        weight, probs = scores.gather(1, index), normalize_chosen(scores)
        take = self.reaching(probs, index, context)
        if take is not None:
            weight = weight * take
        plan = RoutingPlan.from_choices(
            index,
            normalize_chosen(weight) if self.options.normalize else weight,
            self.n_experts,
            context,
            router_logits=logits,
            router_probs=probs,
        )
        return plan if take is None else taken_only(plan, index, take)


@register_router("noisy_topk")
class NoisyTopKRouter(LearnedRouter):
    """Top-k of logits with learned Gaussian noise in training (Shazeer et al. 2017, arXiv 1701.06538).

    The plan's `load_probs` holds P(x, i), the probability that expert i is chosen if its noise is drawn anew
    (eq. 8 and 9), so that the load loss has a gradient.
    """

    elastic = frozenset({"top_k", "n_experts"})
    supports_bias = True

    def __init__(self, d_model: int, config: MoEConfig, options: StrictConfig) -> None:
        super().__init__(d_model, config, options)
        # zeros, as in the paper: all experts start with equal noise softplus(0)
        self.noise_weight = nn.Parameter(torch.zeros(self.n_experts, d_model))

    def always_normalizes(self, options: StrictConfig) -> bool:
        return True  # softmax over the chosen logits

    def reset_parameters(self, std: float = 0.02) -> None:
        nn.init.normal_(self.weight, std=std)
        if hasattr(self, "noise_weight"):
            nn.init.zeros_(self.noise_weight)

    def forward(self, tokens: Tensor, context: RoutingContext) -> RoutingPlan:
        clean = self.open_only(self.logits(tokens), context)
        load_probs, k = None, self.k_of(context)
        if self.training:
            with torch.autocast(tokens.device.type, enabled=False):
                deviation = F.softplus(F.linear(tokens.float(), self.noise_weight.float())) + 1e-2
            noisy = clean + torch.randn_like(clean) * deviation
            load_probs = self._load_probs(self.with_bias(clean), self.with_bias(noisy), deviation, k)
        else:
            noisy = clean
        index = self.with_bias(noisy).topk(k, dim=-1).indices
        weight = noisy.gather(1, index).softmax(dim=-1)
        return RoutingPlan.from_choices(
            index,
            weight,
            self.n_experts,
            context,
            router_logits=noisy,
            router_probs=noisy.softmax(dim=-1),
            load_probs=load_probs,
        )

    def _load_probs(self, clean: Tensor, noisy: Tensor, deviation: Tensor, k: int) -> Tensor:
        is_open = clean > -torch.inf
        if k >= int(is_open[:1].sum()):
            return is_open.to(clean)
        top = noisy.topk(k + 1, dim=-1).values
        inside = noisy > top[:, -1:]
        # an expert inside must stay above the (k+1)-th value, one outside must rise above the k-th
        threshold = torch.where(inside, top[:, -1:], top[:, -2:-1])
        # -inf has a probability of 0 and no gradient worth the name
        distance = (clean.masked_fill(~is_open, 0.0) - threshold) / deviation
        return torch.special.ndtr(distance).masked_fill(~is_open, 0.0)


@register_router("switch")
class SwitchRouter(LearnedRouter):
    """The one best expert, weighted by its probability, with input jitter in training (Fedus et al. 2021)."""

    supports_bias = True

    class Options(StrictConfig):
        jitter: float = Field(
            default=0.01, ge=0, lt=1, description="inputs times uniform(1 - jitter, 1 + jitter)"
        )

    options: Options

    def __init__(self, d_model: int, config: MoEConfig, options: StrictConfig) -> None:
        super().__init__(d_model, config, options)
        require(
            self.top_k == 1, "top_k", self.top_k, "must be 1 with router 'switch'", "Use router 'softmax'"
        )

    def forward(self, tokens: Tensor, context: RoutingContext) -> RoutingPlan:
        if self.training and self.options.jitter > 0:
            noise = torch.empty_like(tokens, dtype=torch.float32)
            tokens = tokens.float() * noise.uniform_(1 - self.options.jitter, 1 + self.options.jitter)
        logits = self.logits(tokens)
        probs = logits.softmax(dim=-1)
        index = self.with_bias(probs).argmax(dim=-1, keepdim=True)
        return RoutingPlan.from_choices(
            index, probs.gather(1, index), self.n_experts, context, router_logits=logits, router_probs=probs
        )


@register_router("gshard")
class GShardRouter(LearnedRouter):
    """The best expert and a second one, drawn in training (Lepikhin et al. 2020, arXiv 2006.16668, alg. 1).

    With weights g1 and g2 normalised to sum to 1, the second expert is kept with probability min(1, 2 * g2).
    """

    def __init__(self, d_model: int, config: MoEConfig, options: StrictConfig) -> None:
        super().__init__(d_model, config, options)
        require(
            self.top_k == 2, "top_k", self.top_k, "must be 2 with router 'gshard'", "Use router 'softmax'"
        )

    def forward(self, tokens: Tensor, context: RoutingContext) -> RoutingPlan:
        logits = self.logits(tokens)
        probs = logits.softmax(dim=-1)
        top, index = probs.topk(2, dim=-1)
        top = normalize_chosen(top)
        keep_second = torch.ones_like(top[:, 1], dtype=torch.bool)
        if self.training:
            keep_second = 2 * top[:, 1].detach() > torch.rand_like(top[:, 1])
        chosen = torch.zeros_like(probs, dtype=torch.bool).scatter_(1, index[:, :1], True)
        chosen = chosen.scatter(1, index[:, 1:], keep_second[:, None])
        weights = torch.zeros_like(probs).scatter(1, index, top)
        return RoutingPlan.from_mask(chosen, weights, context, router_logits=logits, router_probs=probs)


@register_router("group_limited")
class GroupLimitedRouter(LearnedRouter):
    """Top-k inside the best groups of experts, so that a token visits few machines (DeepSeek-V2 and V3).

    The value of a group is its best expert's (softmax, V2) or the sum of its two best (sigmoid, V3).
    """

    elastic = frozenset({"top_k"})
    supports_bias = True

    class Options(StrictConfig):
        n_groups: int = Field(default=4, ge=1, description="groups of equal size")
        top_groups: int = Field(default=2, ge=1, description="groups a token may use")
        score: Literal["softmax", "sigmoid"] = Field(default="sigmoid", description="function on the logits")
        normalize: bool = Field(default=True, description="scale the chosen scores to sum to 1")

    options: Options

    def __init__(self, d_model: int, config: MoEConfig, options: StrictConfig) -> None:
        super().__init__(d_model, config, options)
        opts, n = self.options, self.n_experts
        require(
            n % opts.n_groups == 0,
            "router(group_limited).n_groups",
            opts.n_groups,
            f"must divide n_experts ({n})",
        )
        require(opts.top_groups <= opts.n_groups, "router(group_limited).top_groups", opts.top_groups,
                f"must be at most n_groups ({opts.n_groups})")  # fmt: skip
        room = opts.top_groups * (n // opts.n_groups)
        self.room = room
        require(
            self.top_k <= room, "top_k", self.top_k, f"must be at most the experts in the top groups ({room})"
        )

    def require_elastic(self, elastic: Elastic | None) -> None:
        super().require_elastic(elastic)
        k = None if elastic is None else elastic.top_k
        require(k is None or k <= self.room, "elastic.top_k", k,
                f"must be at most the experts in the top groups ({self.room})")  # fmt: skip

    def forward(self, tokens: Tensor, context: RoutingContext) -> RoutingPlan:
        opts = self.options
        logits = self.logits(tokens)
        sigmoid = opts.score == "sigmoid"
        scores = logits.sigmoid() if sigmoid else logits.softmax(dim=-1)
        selection = self.with_bias(scores)
        grouped = selection.view(-1, opts.n_groups, self.n_experts // opts.n_groups)
        best = grouped.topk(min(2 if sigmoid else 1, grouped.shape[-1]), dim=-1).values.sum(dim=-1)
        groups = best.topk(opts.top_groups, dim=-1).indices
        allowed = torch.zeros_like(best, dtype=torch.bool).scatter_(1, groups, True)
        selection = grouped.masked_fill(~allowed[..., None], -torch.inf).flatten(1)
        index = selection.topk(self.k_of(context), dim=-1).indices
        weight = scores.gather(1, index)
        return RoutingPlan.from_choices(
            index,
            normalize_chosen(weight) if opts.normalize else weight,
            self.n_experts,
            context,
            router_logits=logits,
            router_probs=normalize_chosen(scores) if sigmoid else scores,
        )
