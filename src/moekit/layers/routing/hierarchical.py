"""Two-level routing: first a group of experts, then experts inside it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from moekit.config.base import StrictConfig
from moekit.config.errors import require
from moekit.config.moe import MoEConfig
from moekit.layers.plan import RoutingContext, RoutingPlan
from moekit.layers.routing.base import LearnedRouter, normalize_chosen, register_router


@register_router("hierarchical")
class HierarchicalRouter(LearnedRouter):
    """A primary router chooses groups, a secondary one experts inside each (Shazeer et al. 2017, appendix B;
    the tree of Jordan and Jacobs 1994). An expert's probability is p(group) * p(expert | group).

    A token takes top_k / top_groups experts from each of its groups.
    """

    class Options(StrictConfig):
        n_groups: int = Field(default=4, ge=1, description="groups of equal size")
        top_groups: int = Field(default=1, ge=1, description="groups a token uses")
        normalize: bool = Field(default=True, description="scale the chosen probabilities to sum to 1")

    options: Options

    def __init__(self, d_model: int, config: MoEConfig, options: StrictConfig) -> None:
        super().__init__(d_model, config, options)
        groups, top, n = self.options.n_groups, self.options.top_groups, self.n_experts
        require(n % groups == 0, "router(hierarchical).n_groups", groups, f"must divide n_experts ({n})")
        require(top <= groups and self.top_k % top == 0, "router(hierarchical).top_groups", top,
                f"must be at most n_groups ({groups}) and divide top_k ({self.top_k})")  # fmt: skip
        require(self.top_k // top <= n // groups, "top_k", self.top_k,
                f"must be at most top_groups * experts per group ({top * (n // groups)})")  # fmt: skip
        self.group_weight = nn.Parameter(torch.empty(groups, d_model))
        self.reset_parameters()

    def forward(self, tokens: Tensor, context: RoutingContext) -> RoutingPlan:
        opts = self.options
        within = self.n_experts // opts.n_groups
        with torch.autocast(tokens.device.type, enabled=False):
            group_logp = F.linear(tokens.float(), self.group_weight.float()).log_softmax(dim=-1)
        expert_logp = self.logits(tokens).view(-1, opts.n_groups, within).log_softmax(dim=-1)
        log_probs = (group_logp[..., None] + expert_logp).flatten(1)
        probs = log_probs.exp()
        groups = group_logp.topk(opts.top_groups, dim=-1).indices
        inside = expert_logp.gather(1, groups[..., None].expand(-1, -1, within))
        index = inside.topk(self.top_k // opts.top_groups, dim=-1).indices + groups[..., None] * within
        index = index.flatten(1)
        weight = probs.gather(1, index)
        return RoutingPlan.from_choices(
            index,
            normalize_chosen(weight) if opts.normalize else weight,
            self.n_experts,
            context,
            router_logits=log_probs,
            router_probs=probs,
        )
