"""Ask a router directly: what tests of single routers share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moekit import MoEConfig, RoutingContext, RoutingPlan
from moekit.layers.routing import Router, build_router


def router_of(name: str, options: dict[str, Any] | None = None, *, d_model: int = 1, **fields: Any) -> Router:
    """A router for evaluation; `fields` are those of the layer's configuration."""
    config = MoEConfig.from_dict({"router": {"name": name, "options": options or {}}} | fields)
    return build_router(d_model, config).eval()


def with_logits(router: Router, logits: list[float]) -> Router:
    """Set the weights of a router of `d_model` 1, so that the token [1.0] gets these logits."""
    with torch.no_grad():
        router.weight.copy_(torch.tensor(logits)[:, None])
    return router


def ask(router: Router, tokens: Tensor, **context: Any) -> RoutingPlan:
    """The plan for tokens `[T, D]`, one sequence unless `batch_shape` says otherwise."""
    return router(tokens, RoutingContext(**{"batch_shape": (1, tokens.shape[0])} | context))


def choices(plan: RoutingPlan) -> list[dict[int, float]]:
    """For each token, the experts it visits and their weights."""
    found: list[dict[int, float]] = [{} for _ in range(plan.n_tokens)]
    expert_of_row = [e for e, n in enumerate(plan.tokens_per_expert.tolist()) for _ in range(n)]
    for token, expert, weight in zip(
        plan.token_index.tolist(), expert_of_row, plan.row_weight.tolist(), strict=True
    ):
        assert expert not in found[token], "a token visits an expert twice"
        found[token][expert] = weight
    return found


def random_logits(
    name: str, n_tokens: int, n_experts: int, options: dict[str, Any] | None = None, **fields: Any
):
    """A router, tokens `[T, D]` and the router's own logits `[T, E]` for them in float64."""
    router = router_of(name, options, d_model=6, n_experts=n_experts, **fields)
    with torch.no_grad():
        router.weight.normal_()
    tokens = torch.randn(n_tokens, 6)
    return router, tokens, (tokens.double() @ router.weight.double().t()).detach()
