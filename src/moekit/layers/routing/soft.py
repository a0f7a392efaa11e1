"""Soft MoE: the one plan with dense weights."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from moekit.config.base import StrictConfig
from moekit.config.errors import require
from moekit.config.moe import MoEConfig
from moekit.layers.plan import RoutingContext, RoutingPlan, SoftSlots
from moekit.layers.routing.base import LearnedRouter, register_router


@register_router("soft")
class SoftMoERouter(LearnedRouter):
    """Every slot is a blend of all tokens of a sequence, every token a blend of all slots (Puigcerver et al.
    2023, arXiv 2308.00951, alg. 1 and 2). Each expert owns `slots_per_expert` slots. Looks at later tokens:
    not for decoders.

    The logits are inner products of normalised tokens and slots times one learned scale (section 2.3).
    """

    causal = False

    class Options(StrictConfig):
        slots_per_expert: int = Field(default=4, ge=1, description="slots of each expert, per sequence")

    options: Options

    def __init__(self, d_model: int, config: MoEConfig, options: StrictConfig) -> None:
        super().__init__(d_model, config, options)
        require(
            config.capacity_factor is None, "capacity_factor", config.capacity_factor,
            "must be null with router 'soft', which drops nothing", "Set router.slots_per_expert instead",
        )  # fmt: skip
        require(config.combine == "weighted_sum", "combine", config.combine,
                "must be weighted_sum with router 'soft', whose answers are blends")  # fmt: skip
        self.weight = nn.Parameter(torch.empty(self.n_experts * self.options.slots_per_expert, d_model))
        self.scale = nn.Parameter(torch.empty(()))
        self.reset_parameters()

    def reset_parameters(self, std: float = 0.02) -> None:
        nn.init.normal_(self.weight, std=std)
        if hasattr(self, "scale"):
            nn.init.constant_(self.scale, math.sqrt(self.d_model))

    def forward(self, tokens: Tensor, context: RoutingContext) -> RoutingPlan:
        batch, length = context.batch_shape
        n_slots = self.weight.shape[0]
        with torch.autocast(tokens.device.type, enabled=False):
            slots = F.normalize(self.weight.float(), dim=-1) * self.scale
            logits = F.linear(F.normalize(tokens.float(), dim=-1), slots).view(batch, length, n_slots)
        dispatch, combine = logits, logits.softmax(dim=-1)
        if context.token_mask is not None:
            mask = context.token_mask.view(batch, length, 1)
            dispatch = dispatch.masked_fill(~mask, torch.finfo(dispatch.dtype).min)
            combine = combine * mask
        per_expert = batch * self.options.slots_per_expert
        n_rows = per_expert * self.n_experts
        probs = combine.view(batch * length, self.n_experts, self.options.slots_per_expert).sum(dim=-1)
        return RoutingPlan(
            token_index=torch.arange(n_rows, device=tokens.device),
            row_weight=torch.ones(n_rows, device=tokens.device),
            tokens_per_expert=torch.full(
                (self.n_experts,), per_expert, dtype=torch.long, device=tokens.device
            ),
            n_tokens=tokens.shape[0],
            batch_shape=context.batch_shape,
            router_probs=probs,
            token_mask=context.token_mask,
            slots=SoftSlots(dispatch.softmax(dim=1), combine),
        )
