"""The router interface and its registry: one class and one line add a router.

Example, a router of your own:

>>> import torch
>>> from moekit.layers.routing import Router, register_router
>>> from moekit.layers.plan import RoutingPlan
>>> @register_router("first_expert")
... class FirstExpertRouter(Router):
...     def forward(self, tokens, context):
...         index = torch.zeros(tokens.shape[0], 1, dtype=torch.long)
...         return RoutingPlan.from_choices(index, torch.ones(index.shape), self.n_experts, context)
>>> from moekit import MoE
>>> layer = MoE(d_model=8, d_expert=8, n_experts=4, top_k=1, router="first_expert")
>>> layer(torch.zeros(3, 8)).routing.tokens_per_expert
tensor([3, 0, 0, 0])
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import ClassVar, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moekit.config.base import StrictConfig
from moekit.config.errors import ConfigError, UntaughtRouterWarning, nearest, require
from moekit.config.moe import MoEConfig
from moekit.layers.combine import straight_through_one
from moekit.layers.elastic import Elastic, require_fits
from moekit.layers.plan import RoutingContext, RoutingPlan
from moekit.layers.statistics import RoutingStats

ROUTERS: dict[str, type[Router]] = {}
R = TypeVar("R", bound="type[Router]")


def register_router(name: str) -> Callable[[R], R]:
    """Class decorator that makes a router known as `name` in `MoE(router=name)` and in YAML.

    Raises:
        ConfigError: the name is taken by another class.
    """

    def add(cls: R) -> R:
        taken = ROUTERS.get(name)
        # the same class again (a notebook cell run twice) replaces itself
        if taken is not None and (taken.__module__, taken.__qualname__) != (cls.__module__, cls.__qualname__):
            owner = f"{taken.__module__}.{taken.__qualname__}"
            raise ConfigError(f"router name {name!r} is taken by {owner}; choose another")
        cls.name = name
        ROUTERS[name] = cls
        return cls

    return add


def build_router(d_model: int, config: MoEConfig) -> Router:
    """The router that a layer's configuration names, its options validated.

    Raises:
        ConfigError: unknown name (with the nearest one) or an option that breaks a rule.
    """
    name = config.router.name
    if name not in ROUTERS:
        raise ConfigError(f"router {name!r} is unknown: {nearest(name, ROUTERS)}")
    cls = ROUTERS[name]
    options = cls.Options.from_dict(config.router.options, where=f"router({name})")
    return cls(d_model, config, options)


class Router(nn.Module):
    """Decides which experts each token visits; computes nothing else.

    A subclass implements `forward(tokens [T, D], context) -> RoutingPlan` and may declare:

    Attributes:
        name: registered name.
        causal: False where a choice can depend on later tokens; a decoder refuses such a router.
        reads_history: True where a choice can depend on earlier tokens as well, which a key/value cache does
            not hold; a decoder refuses to continue from a cache.
        elastic: what a call may change of its choice, by name (`moekit.layers.elastic.Elastic`); nothing by default.
        supports_bias: whether auxiliary-loss-free balancing can steer its choice through `expert_bias`.
        supports_families: whether it can hold a token to one expert of each family (`MoEConfig.families`).
        Options: its own options, a `StrictConfig`.
        n_experts: experts to choose from, null experts included.
        expert_names: their names, where a rule gives them any.
        top_k: experts per token.
    """

    name: ClassVar[str] = ""
    causal: bool = True
    reads_history: bool = False
    elastic: ClassVar[frozenset[str]] = frozenset()
    supports_bias: ClassVar[bool] = False
    supports_families: ClassVar[bool] = False
    expert_names: tuple[str, ...] = ()
    expert_bias: Tensor | None
    family: Tensor | None

    class Options(StrictConfig):
        """No options."""

    def __init__(self, d_model: int, config: MoEConfig, options: StrictConfig) -> None:
        super().__init__()
        self.d_model, self.n_experts, self.top_k = d_model, config.n_choices, config.top_k
        self.n_null = config.null_experts.total
        self.bias_update_rate = config.balance.bias_update_rate
        self.bias_update = config.balance.bias_update
        self.bias_update_decay = config.balance.bias_update_decay
        self.options = options
        require(
            self.bias_update_rate == 0 or self.supports_bias, "balance.bias_update_rate",
            self.bias_update_rate, f"must be 0 with router {self.name!r}, whose choice takes no bias",
            f"Routers that do: {', '.join(sorted(n for n, c in ROUTERS.items() if c.supports_bias))}",
        )  # fmt: skip
        # selection only: the bias moves the choice, never the combine weight (DeepSeek-V3, arXiv 2412.19437)
        bias = torch.zeros(self.n_experts) if self.bias_update_rate > 0 else None
        self.register_buffer("expert_bias", bias)
        require(not config.families or self.supports_families, "families", config.families,
                f"must be false with router {self.name!r}", "Use router 'softmax' or 'sigmoid'")  # fmt: skip
        # each expert its own until training splits one: numbers below n_experts
        self.register_buffer("family", torch.arange(self.n_experts) if config.families else None)

    def forward(self, tokens: Tensor, context: RoutingContext) -> RoutingPlan:
        raise NotImplementedError(f"router {type(self).__name__} does not implement forward(tokens, context)")

    def with_bias(self, selection: Tensor) -> Tensor:
        """Selection values `[T, E]` with the balancing bias added."""
        return selection if self.expert_bias is None else selection + self.expert_bias

    def require_elastic(self, elastic: Elastic | None) -> None:
        """Raise `ConfigError` where this router cannot follow the setting of a call."""
        if elastic:

            def known() -> list[str]:
                return [name for name, router in ROUTERS.items() if set(elastic.given) <= router.elastic]

            require_fits(elastic, self.name, self.elastic, self.n_experts, self.n_null, self.top_k, known)
            k = self.top_k if elastic.top_k is None else elastic.top_k
            # as many families as top_k there are always, and counting them costs as much as routing a token
            if self.family is not None and (k > self.top_k or elastic.n_experts is not None):
                n_families = self.family[: elastic.n_experts].unique().numel()
                require(k <= n_families, "elastic.top_k", k,
                        f"must be at most the families to choose from ({n_families})")  # fmt: skip

    def k_of(self, context: RoutingContext) -> int:
        """Experts per token in this call."""
        elastic = context.elastic
        return self.top_k if elastic is None or elastic.top_k is None else elastic.top_k

    def open_only(self, logits: Tensor, context: RoutingContext) -> Tensor:
        """Logits or selection values `[T, E]`, -inf where an expert may not be chosen in this call."""
        is_open = self.open_choices(context, logits.device)
        return logits if is_open is None else logits.masked_fill(~is_open, -torch.inf)

    def open_choices(self, context: RoutingContext, device: torch.device) -> Tensor | None:
        """`[E]` True for what may be chosen in this call; None where that is everything."""
        elastic = context.elastic
        if elastic is None or elastic.n_experts is None:
            return None
        number = torch.arange(self.n_experts, device=device)
        return (number < elastic.n_experts) | (number >= self.n_experts - self.n_null)

    def closed_too(self, selection: Tensor, logits: Tensor, context: RoutingContext) -> Tensor:
        """Selection values `[T, E]`, -inf where the logits are: no bias brings back what may not be chosen."""
        elastic = context.elastic
        if self.family is None and (elastic is None or elastic.n_experts is None):
            return selection
        return selection.masked_fill(logits == -torch.inf, -torch.inf)

    def one_per_family(self, logits: Tensor, selection: Tensor) -> Tensor:
        """Logits `[T, E]` with -inf at all but that expert of each family whose `selection` `[T, E]` is the largest.

        So an expert that was split in two is still one choice of a token, and counts with the probability it had. One
        whose logit is -inf already, because this call may not choose it, stands back behind the others of its family.
        """
        if self.family is None:
            return logits
        selection = selection.masked_fill(logits == -torch.inf, -torch.inf)  # a bias may have raised it
        family = self.family.expand_as(selection)
        best = torch.full_like(selection, -torch.inf).scatter_reduce(1, family, selection, "amax")
        number = torch.arange(self.n_experts, device=selection.device).expand_as(selection)
        candidate = number.masked_fill(selection < best.gather(1, family), self.n_experts)
        first = torch.full_like(number, self.n_experts).scatter_reduce(1, family, candidate, "amin")
        return logits.masked_fill(first.gather(1, family) != number, -torch.inf)

    def reaching(self, probs: Tensor, index: Tensor, context: RoutingContext) -> Tensor | None:
        """`[T, K]` True for the choices `index`, best first, that a call's `top_p` needs; None without."""
        elastic = context.elastic
        if elastic is None or elastic.top_p is None:
            return None
        top = probs.gather(1, index)
        # an expert is taken while those before it have not reached p, so the first is always taken
        return top.cumsum(dim=-1) - top < elastic.top_p

    @torch.no_grad()
    def after_step(self, stats: RoutingStats, scale: float = 1.0) -> None:
        """Called once after each optimizer step with the routing of the whole step.

        Auxiliary-loss-free balancing (Wang et al. 2024, arXiv 2408.15664): b += rate * sign(mean load -
        load), or with `balance.bias_update: proportional` the relative error itself, (mean load - load) /
        mean load, cut off at -1 and 1. Where batches are small and experts specialise, an expert's load is
        skewed from step to step: the sign then evens the median of its loads, the relative error their mean.

        `scale` is the learning-rate schedule of training; it multiplies the rate, so that the bias
        settles with the weights, unless `balance.bias_update_decay` is false (the paper's constant rate).
        """
        if self.expert_bias is not None:
            load = stats.requested_per_expert.double()  # exact, whatever type the model was cast to
            error = (load.mean() - load) / load.mean().clamp(min=1)
            direction = error.sign() if self.bias_update == "sign" else error.clamp(-1, 1)
            decay = scale if self.bias_update_decay else 1.0
            self.expert_bias += (decay * self.bias_update_rate * direction).to(self.expert_bias)

    def extra_repr(self) -> str:
        return f"d_model={self.d_model}, n_experts={self.n_experts}, top_k={self.top_k}, {self.options}"


class LearnedRouter(Router):
    """A router with one linear map `weight [E, D]`; its arithmetic is float32 whatever the autocast.

    Options of its class with `logit_bias: true` add a learned `logit_bias [E]` to the map (GPT-OSS).
    """

    def __init__(self, d_model: int, config: MoEConfig, options: StrictConfig) -> None:
        super().__init__(d_model, config, options)
        self.weight = nn.Parameter(torch.empty(self.n_experts, d_model))
        biased = getattr(options, "logit_bias", False)
        self.logit_bias = nn.Parameter(torch.zeros(self.n_experts)) if biased else None
        self.reset_parameters()
        if self.top_k == 1 < self.n_experts and self.always_normalizes(options):
            warnings.warn(
                f"router {self.name!r} with top_k 1 scales its one weight to 1, so that only the balancing losses "
                f"teach it and the task does not. Use top_k 2 or more, router 'switch', or options that leave "
                f"the weight as it is (router 'softmax' with normalize: before, the others with normalize: false)",
                UntaughtRouterWarning,
                stacklevel=2,
            )

    def always_normalizes(self, options: StrictConfig) -> bool:
        """Whether the weights of a token's chosen experts sum to 1 whatever the logits are."""
        return getattr(options, "normalize", False) in (True, "after")

    def reset_parameters(self, std: float = 0.02) -> None:
        """Normal initial weights, no bias."""
        for name, parameter in self.named_parameters(recurse=False):
            if name == "logit_bias":
                nn.init.zeros_(parameter)
            else:
                nn.init.normal_(parameter, std=std)

    def logits(self, tokens: Tensor) -> Tensor:
        """`[T, E]` float32."""
        with torch.autocast(tokens.device.type, enabled=False):
            bias = None if self.logit_bias is None else self.logit_bias.float()
            return F.linear(tokens.float(), self.weight.float(), bias)


def weigh_chosen(probs: Tensor, index: Tensor, how: str, take: Tensor | None = None) -> Tensor:
    """Combine weights `[T, K]` of the chosen experts from the probabilities `[T, E]` of all.

    "after": scaled to sum to 1 over the chosen. "before": as they are. "ones": each expert counts fully, as the parts
    of a dense layer do that was split; the value is 1 and the gradient that of log(probability), so that training
    moves the choice. `take` `[T, K]` names the choices that a call takes, where not all: the others weigh nothing.
    """
    weights = probs.gather(1, index)
    if how == "ones":
        return straight_through_one(weights)
    if take is not None:
        weights = weights * take
    return normalize_chosen(weights) if how == "after" else weights


def taken_only(plan: RoutingPlan, index: Tensor, take: Tensor) -> RoutingPlan:
    """A plan of the choices `index` `[T, K]` with only those rows that `take` `[T, K]` names."""
    chosen = torch.zeros(plan.n_tokens, plan.n_experts, dtype=torch.bool, device=index.device)
    chosen.scatter_(1, index, take)
    kept = plan.keep_rows(chosen[plan.token_index, plan.expert_of_row()])
    return replace(kept, requested_per_expert=None)


def normalize_chosen(weights: Tensor) -> Tensor:
    """Weights `[T, K]` scaled to sum to 1 per token (all zeros stay zeros)."""
    return weights / weights.sum(dim=-1, keepdim=True).clamp(min=1e-20)
