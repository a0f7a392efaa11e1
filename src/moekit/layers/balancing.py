"""Auxiliary losses that keep the experts' load even. All unweighted: coefficients enter once, in training.

Shapes: T tokens, E experts, B sequences. f is an expert's share of the choices (sums to 1, no gradient), P
its mean probability (sums to 1). Padding counts nowhere.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moekit.config.moe import BalanceConfig
from moekit.layers.plan import RoutingContext, RoutingPlan, mean_over_tokens


def load_balance_loss(probs: Tensor, counts: Tensor, token_mask: Tensor | None = None) -> Tensor:
    """E * sum(f * P): 1 at perfect balance, E where one expert takes all.

    Fedus et al. 2021 (arXiv 2101.03961), eq. 4, with f summing to 1.

    Shapes: probs `[T, E]`, counts `[E]` choices per expert; these may cover more tokens than `probs` (the
    whole global
    batch: Qiu et al. 2025, arXiv 2501.11873).

    >>> import torch
    >>> float(load_balance_loss(torch.full((4, 2), 0.5), torch.tensor([2, 2])))
    1.0
    >>> loss = load_balance_loss(torch.tensor([[0.9, 0.1]] * 4), torch.tensor([4, 0]))
    >>> round(float(loss), 4)    # 2 * (1 * 0.9)
    1.8
    """
    share = counts.to(probs) / counts.sum().clamp(min=1)
    return probs.shape[-1] * (share * mean_over_tokens(probs, token_mask)).sum()


def sequence_balance_loss(
    probs: Tensor, chosen: Tensor, batch_shape: tuple[int, int], token_mask: Tensor | None = None
) -> Tensor:
    """The load-balance loss of each sequence by itself, averaged over sequences (DeepSeek-V3, eq. 17 to 20).

    Shapes: probs and chosen (0/1 per token and expert) `[T, E]`.
    """
    batch, length = batch_shape
    n_experts = probs.shape[-1]
    mask = (
        torch.ones(batch, length, 1, device=probs.device)
        if token_mask is None
        else token_mask.view(batch, length, 1)
    )
    probs, chosen = (part.view(batch, length, n_experts) * mask for part in (probs, chosen))
    share = chosen.sum(dim=1) / chosen.sum(dim=(1, 2))[:, None].clamp(min=1)
    mean_probs = probs.sum(dim=1) / mask.sum(dim=1).clamp(min=1)
    per_sequence = n_experts * (share * mean_probs).sum(dim=-1)
    weight = mask.any(dim=1)[:, 0].to(per_sequence)
    return (per_sequence * weight).sum() / weight.sum().clamp(min=1)


def router_z_loss(logits: Tensor, token_mask: Tensor | None = None) -> Tensor:
    """Mean squared log-sum-exp of the logits `[T, E]` (ST-MoE, Zoph et al. 2022, eq. 5).

    >>> import math, torch
    >>> round(float(router_z_loss(torch.zeros(3, 4))), 6) == round(math.log(4) ** 2, 6)
    True
    """
    return mean_over_tokens(logits.logsumexp(dim=-1).square(), token_mask)


def squared_variation(totals: Tensor) -> Tensor:
    """Squared coefficient of variation (population variance over squared mean) of one value per expert `[E]`.

    >>> import torch
    >>> float(squared_variation(torch.tensor([1.0, 3.0])))    # mean 2, variance 1
    0.25
    """
    mean = totals.mean()
    return (totals - mean).square().mean() / mean.square().clamp(min=1e-10)


def importance_loss(plan: RoutingPlan, is_open: Tensor | None = None) -> Tensor:
    """Squared variation of the summed combine weights of each expert (Shazeer et al. 2017, eq. 6 and 7).

    `is_open` `[E]` leaves out the experts that could not be chosen; so does that of `load_loss`.
    """
    importance = torch.zeros(plan.n_experts, dtype=plan.row_weight.dtype, device=plan.row_weight.device)
    importance = importance.index_add(0, plan.expert_of_row(), plan.row_weight)
    return squared_variation(importance if is_open is None else importance[is_open])


def load_loss(load_probs: Tensor, token_mask: Tensor | None = None, is_open: Tensor | None = None) -> Tensor:
    """Squared variation of the expected load `[T, E]` of noisy top-k (Shazeer et al. 2017, eq. 10 and 11)."""
    load = mean_over_tokens(load_probs, token_mask)
    return squared_variation(load if is_open is None else load[is_open])


def balance_losses(
    plan: RoutingPlan, context: RoutingContext, config: BalanceConfig, is_open: Tensor | None = None
) -> dict[str, Tensor]:
    """The losses of one call: those with a coefficient above 0 in `config`, and the router's own.

    `is_open` `[E]` is False for experts that the call could not choose (None: it could choose all): the losses are
    those of the others alone, 1 at perfect balance among them.
    """
    losses = dict(plan.losses)
    probs, logits, mask = plan.router_probs, plan.router_logits, plan.token_mask
    if config.load_balance > 0 and probs is not None:
        if config.scope == "sequence":
            balance = sequence_balance_loss(probs, _chosen(plan), plan.batch_shape, mask)
        else:
            counts = plan.requested
            if context.earlier_counts is not None:
                counts = counts + context.earlier_counts
            balance = load_balance_loss(probs, counts, mask)
        losses["load_balance"] = balance if is_open is None else balance * is_open.float().mean()
    if config.router_z > 0 and logits is not None:
        losses["router_z"] = router_z_loss(logits, mask)
    if config.importance > 0:
        losses["importance"] = importance_loss(plan, is_open)
    if config.load > 0 and plan.load_probs is not None:
        losses["load"] = load_loss(plan.load_probs, mask, is_open)
    return losses


def weighted_aux_loss(losses: dict[str, Tensor], config: BalanceConfig) -> Tensor | float:
    """The one place where coefficients meet losses: what training adds to the task's loss."""
    own = {name: getattr(config, name) for name in ("load_balance", "router_z", "importance", "load")}
    return sum(own.get(name, config.router_loss) * loss for name, loss in losses.items())


def _chosen(plan: RoutingPlan) -> Tensor:
    """`[T, E]` 1 where a token's choice of an expert has a row."""
    chosen = torch.zeros(plan.n_tokens, plan.n_experts, device=plan.token_index.device)
    return chosen.index_put((plan.token_index, plan.expert_of_row()), torch.ones((), device=chosen.device))
