"""The Mixture-of-Experts layer: router, dispatch, experts, combine.

Shape legend: B batch, S sequence, T = B*S tokens, D d_model, E experts, K top_k, R rows, O output width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moekit.config.errors import ConfigError, require
from moekit.config.moe import MoEConfig
from moekit.layers.balancing import balance_losses
from moekit.layers.combine import combine
from moekit.layers.dispatch import dispatch
from moekit.layers.elastic import Elastic
from moekit.layers.experts import ExpertGroups, NullExperts, SharedExpert, StackedMLP, module_experts
from moekit.layers.plan import RoutingContext, RoutingPlan
from moekit.layers.quantized import quantize_linear_maps
from moekit.layers.routing import Router, build_router
from moekit.layers.stored_experts import StoredMLP


@dataclass
class MoEOutput:
    """What a layer returns; nothing hides on the module.

    Attributes:
        hidden_states: `[..., O]`, the shape of the input with the output width.
        aux_losses: unweighted auxiliary losses by name (see `moekit.layers.balancing.weighted_aux_loss`).
        routing: the plan that was followed.
    """

    hidden_states: Tensor
    aux_losses: dict[str, Tensor]
    routing: RoutingPlan


class MoE(nn.Module):
    """A sparse feed-forward block on `[..., D]`: each token visits the experts that its router chooses.

    Give a `MoEConfig`, or its fields as keyword arguments; `experts` takes modules of any structure instead
    of the stacked MLPs.

    Errors: `ConfigError` for a value that breaks a rule, naming field, value and remedy.

    >>> import torch
    >>> layer = MoE(d_model=16, d_expert=32, n_experts=8, top_k=2, router="softmax")
    >>> out = layer(torch.randn(2, 5, 16))
    >>> out.hidden_states.shape, sorted(out.aux_losses), int(out.routing.tokens_per_expert.sum())
    (torch.Size([2, 5, 16]), ['load_balance', 'router_z'], 20)
    """

    def __init__(
        self,
        d_model: int,
        config: MoEConfig | None = None,
        *,
        experts: Sequence[nn.Module] | None = None,
        **fields: Any,
    ) -> None:
        super().__init__()
        if config is not None and fields:
            raise ConfigError(
                f"give a config or keyword arguments, not both; got config and {', '.join(fields)}"
            )
        if config is None:
            if experts is not None:
                fields.setdefault("n_experts", len(experts))
            if "router_options" in fields:
                fields["router"] = {
                    "name": fields.get("router", "softmax"),
                    "options": fields.pop("router_options"),
                }
            config = MoEConfig.from_dict(fields, where="moe")
        require(d_model >= 1, "d_model", d_model, "must be at least 1")
        self.d_model, self.config = d_model, config
        self.router = build_router(d_model, config)
        self._expert_of_choice = _expert_of_choice(config, self.router)
        self.experts = _build_experts(d_model, config, experts)
        self.shared = None
        if config.n_shared_experts:
            require(
                config.d_out in (None, d_model), "d_out", config.d_out,
                f"must be d_model ({d_model}) with shared experts", "Remove d_out or n_shared_experts",
            )  # fmt: skip
            self.shared = SharedExpert(
                d_model,
                config.shared_width,
                activation=config.activation,
                bias=config.bias,
                gated=config.shared_gate,
            )
            quantize_linear_maps(self.shared.mlp, config.quantization)
        out = config.d_out if config.d_out is not None else d_model
        self.linear = nn.Linear(d_model, out, bias=False) if config.linear_path else None
        self.output_bias = nn.Parameter(torch.zeros(out)) if config.output_bias else None

    @property
    def causal(self) -> bool:
        """False where an answer can depend on later tokens, by the router or by dropping the improbable."""
        drops_by_rank = self.config.capacity_factor is not None and self.config.drop_policy == "probability"
        return self.router.causal and not drops_by_rank

    def forward(
        self,
        hidden_states: Tensor,
        *,
        token_ids: Tensor | None = None,
        token_mask: Tensor | None = None,
        segment_ids: Tensor | None = None,
        earlier_counts: Tensor | None = None,
        elastic: Elastic | None = None,
    ) -> MoEOutput:
        """Route, compute, combine.

        Args:
            hidden_states: `[..., D]`.
            token_ids: `[...]` vocabulary ids, which hash and rule routers read.
            token_mask: `[...]` bool, False at padding, which visits no expert and counts nowhere.
            segment_ids: `[...]` document of each token.
            earlier_counts: `[E]`, see `RoutingContext`.
            elastic: experts per token, and which may be chosen, in this call alone.
        """
        context = self._context(
            hidden_states, token_ids, token_mask, segment_ids, earlier_counts, elastic=elastic
        )
        tokens = hidden_states.reshape(-1, self.d_model)  # [T, D]

        plan = self._adjusted(self.router(tokens, context))
        is_open = self.router.open_choices(context, tokens.device)
        # of what was asked for, before any drop
        losses = balance_losses(plan, context, self.config.balance, is_open)
        plan = self._limited(self._computed(plan), self.router.k_of(context), is_open)
        mixed = self._fused(tokens, plan)  # [T, O], the next three steps in one where a kernel can
        if mixed is None:
            rows = dispatch(tokens, plan)  # [R, D]
            answers = self.experts(rows, plan.tokens_per_expert)  # [R, O]
            mixed = combine(answers, plan, self.config.combine)  # [T, O]

        if self.shared is not None:
            mixed = mixed + self.shared(tokens)
        if self.linear is not None:
            mixed = mixed + self.linear(tokens)
        if self.output_bias is not None:
            mixed = mixed + self.output_bias.to(mixed.dtype)
        mixed = mixed.reshape(*hidden_states.shape[:-1], mixed.shape[-1])
        return MoEOutput(mixed, losses, plan)

    def computing(
        self,
        hidden_states: Tensor,
        *,
        token_ids: Tensor | None = None,
        token_mask: Tensor | None = None,
        segment_ids: Tensor | None = None,
        earlier_counts: Tensor | None = None,
        elastic: Elastic | None = None,
    ) -> Tensor:
        """`[E]` rows that each expert would compute, null experts behind, before any drop; arguments of `forward`."""
        context = self._context(
            hidden_states, token_ids, token_mask, segment_ids, earlier_counts, elastic=elastic
        )
        plan = self._adjusted(self.router(hidden_states.reshape(-1, self.d_model), context))
        return self._computed(plan).tokens_per_expert

    def _computed(self, plan: RoutingPlan) -> RoutingPlan:
        """The plan by the experts that compute, where several choices share one."""
        if self._expert_of_choice is None:
            return plan
        n_experts = self.config.n_experts + self.config.null_experts.total
        return plan.computed_by(self._expert_of_choice, n_experts)

    def _fused(self, tokens: Tensor, plan: RoutingPlan) -> Tensor | None:
        """What one kernel makes of tokens and plan, or None where dispatch, experts and combine must run apart."""
        experts = self.experts
        if (
            not isinstance(experts, StackedMLP | StoredMLP)
            or plan.slots is not None
            or self.config.combine != "weighted_sum"
        ):
            return None
        if experts._forward_hooks or experts._forward_pre_hooks or torch.compiler.is_compiling():
            return None  # somebody watches the experts' rows, or compiles them
        return experts.fused(tokens, plan.token_index, plan.row_weight, plan.tokens_per_expert)

    def _adjusted(self, plan: RoutingPlan) -> RoutingPlan:
        """The router's plan with the layer's weight scale; with the winners alone where only they answer."""
        if self.config.weight_scale != 1.0:
            plan = plan.map_weights(lambda weight: weight * self.config.weight_scale)
        return plan.winners() if self.config.combine == "winner" else plan

    def _limited(self, plan: RoutingPlan, top_k: int, is_open: Tensor | None) -> RoutingPlan:
        """The plan without the rows beyond an expert's capacity_factor * T * K / E (real tokens, open experts)."""
        if self.config.capacity_factor is None:
            return plan
        n_tokens = plan.n_tokens if plan.token_mask is None else int(plan.token_mask.sum())
        k = 1 if self.config.combine == "winner" else top_k
        n_experts = plan.n_experts if is_open is None else self._n_computing(is_open)
        capacity = math.ceil(self.config.capacity_factor * n_tokens * k / n_experts)
        return plan.limited_to(capacity, self.config.drop_policy)

    def _n_computing(self, is_open: Tensor) -> int:
        """Experts that answer for the choices which are open `[n_choices]`."""
        if self._expert_of_choice is None:
            return int(is_open.sum())
        return len(set(self._expert_of_choice[is_open.cpu()].tolist()))

    def _context(
        self, hidden_states: Tensor, *parts: Tensor | None, elastic: Elastic | None
    ) -> RoutingContext:
        self.router.require_elastic(elastic)
        require(hidden_states.shape[-1] == self.d_model, "hidden_states", tuple(hidden_states.shape),
                f"must end in d_model ({self.d_model})")  # fmt: skip
        token_ids, token_mask, segment_ids, earlier_counts = parts
        token_mask = None if token_mask is None else token_mask.bool()  # tokenizers give 0 and 1
        leading = hidden_states.shape[:-1]
        given = {"token_ids": token_ids, "token_mask": token_mask, "segment_ids": segment_ids}
        for name, value in given.items():
            require(
                value is None or value.shape == leading, name, None if value is None else tuple(value.shape),
                f"must have the leading shape of hidden_states {tuple(leading)}",
            )  # fmt: skip
        n_tokens = leading.numel()
        length = leading[-1] if len(leading) > 1 else n_tokens
        shape = (n_tokens // max(length, 1), length)
        flat = [None if part is None else part.reshape(-1) for part in (token_mask, token_ids, segment_ids)]
        return RoutingContext(shape, flat[0], flat[1], flat[2], earlier_counts, elastic)


def _expert_of_choice(config: MoEConfig, router: Router) -> Tensor | None:
    """`[n_choices]` the expert that computes for each choice, null experts behind; None where each has its own."""
    if config.merged_into is None:
        return None
    require(
        router.name != "soft",
        "merged_into",
        config.merged_into,
        "must be null with router 'soft', which chooses none",
    )
    nulls = range(config.n_experts, config.n_experts + config.null_experts.total)
    return torch.tensor(
        [*config.merged_into, *nulls], device="cpu"
    )  # a model may be built on the meta device


def _build_experts(d_model: int, config: MoEConfig, modules: Sequence[nn.Module] | None) -> nn.Module:
    real: nn.Module
    if modules is not None:
        require(
            config.quantization is None,
            "quantization",
            config.quantization,
            "must be null with experts of your own",
        )
        # a sum with another path would broadcast answers of width 1 without a word
        one_of_several = (
            config.n_shared_experts > 0
            or config.linear_path
            or config.output_bias
            or config.null_experts.total > 0
        )
        d_out = d_model if config.d_out is None and one_of_several else config.d_out
        real = module_experts(modules, config.n_experts, d_out)
    else:
        real = StackedMLP(
            config.n_experts, d_model, config.d_expert,
            d_out=config.d_out, activation=config.activation, bias=config.bias, kernel=config.kernel,
            quantization=config.quantization,
        )  # fmt: skip
    if config.null_experts.total == 0:
        return real
    require(config.d_out in (None, d_model), "d_out", config.d_out, "must be d_model with null experts")
    nulls = NullExperts(config.null_experts, d_model)
    return ExpertGroups([(real, config.n_experts), (nulls, config.null_experts.total)])
