"""Dispatch: tokens into expert order. The only place where tokens are gathered."""

from __future__ import annotations

import torch
from torch import Tensor

from moekit.layers.plan import RoutingPlan


def dispatch(tokens: Tensor, plan: RoutingPlan) -> Tensor:
    """Rows `[R, D]` sorted by expert from tokens `[T, D]`; for Soft MoE the rows are the slots."""
    if plan.slots is None:
        return tokens.index_select(0, plan.token_index)
    by_sequence = tokens.view(*plan.batch_shape, tokens.shape[-1])
    blended = torch.einsum("bsn,bsd->nbd", plan.slots.dispatch.to(tokens.dtype), by_sequence)
    # slots are numbered expert by expert, so slot-major order is expert order
    return blended.flatten(0, 1)
