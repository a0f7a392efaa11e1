"""The routing plan: the one type that every router returns and every later step reads.

Shapes: T tokens (all positions of the batch, flattened), E experts a router chooses from (null experts behind
the real ones), K choices per token, R routed rows, D model width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from moekit.kernels.routing import count_per_expert, sort_by_expert
from moekit.layers.elastic import Elastic


@dataclass(frozen=True)
class RoutingContext:
    """What a router may know beside the tokens' vectors.

    Attributes:
        batch_shape: (B, S) with B * S = T; (1, T) for input without a sequence dimension.
        token_mask: `[T]` bool, False at padding; None where every token counts.
        token_ids: `[T]` vocabulary ids, for hash and rule routers; None where unknown.
        segment_ids: `[T]` number of the document of each token; None for one document per row.
        earlier_counts: `[E]` choices per expert in the earlier micro-batches of this optimizer step, so that
            the global-batch load-balance loss sees the whole batch; None without accumulation.
        elastic: how many experts this call takes, and of which; None for what the configuration says.
    """

    batch_shape: tuple[int, int]
    token_mask: Tensor | None = None
    token_ids: Tensor | None = None
    segment_ids: Tensor | None = None
    earlier_counts: Tensor | None = None
    elastic: Elastic | None = None


@dataclass(frozen=True)
class SoftSlots:
    """Dense weights of Soft MoE: each of E*P slots is a blend of the tokens of its sequence.

    Attributes:
        dispatch: `[B, S, E*P]`, each column sums to 1 over the tokens of the sequence.
        combine: `[B, S, E*P]`, each row sums to 1 over the slots.
    """

    dispatch: Tensor
    combine: Tensor


@dataclass(frozen=True)
class RoutingPlan:
    """Which token goes to which expert, and how much each answer counts.

    Attributes:
        token_index: `[R]` token of each row; rows are sorted by expert, inside an expert by token.
        row_weight: `[R]` combine weight of each row, float32, differentiable.
        tokens_per_expert: `[E]` rows of each expert that computes.
        n_tokens: T, with padding.
        router_logits: `[T, E]` float32, or None where the router has none (hash, random).
        router_probs: `[T, E]` float32 summing to 1 over E, or None.
        requested_per_expert: `[E]` choices before any was dropped for capacity; padding does not count.
        token_mask: `[T]` False at padding, or None.
        batch_shape: (B, S) with B * S = T.
        load_probs: `[T, E]` probability that an expert is chosen under the routing noise (noisy top-k), or
            None.
        losses: losses that the router brings by itself, by name, times its own (adaptive) coefficient.
        slots: the dense weights of Soft MoE, else None; the rows are then the slots.
    """

    token_index: Tensor
    row_weight: Tensor
    tokens_per_expert: Tensor
    n_tokens: int
    batch_shape: tuple[int, int]
    router_logits: Tensor | None = None
    router_probs: Tensor | None = None
    requested_per_expert: Tensor | None = None
    token_mask: Tensor | None = None
    load_probs: Tensor | None = None
    losses: dict[str, Tensor] = field(default_factory=dict)
    slots: SoftSlots | None = None

    @property
    def n_experts(self) -> int:
        """E, with null experts."""
        return self.tokens_per_expert.shape[0]

    @property
    def requested(self) -> Tensor:
        """`[E]` choices per expert before capacity: what the load is measured by."""
        return self.tokens_per_expert if self.requested_per_expert is None else self.requested_per_expert

    @property
    def n_dropped(self) -> Tensor:
        """Choices that found their expert full, as a 0-d tensor."""
        return self.requested.sum() - self.tokens_per_expert.sum()

    def expert_of_row(self) -> Tensor:
        """`[R]` expert of each row."""
        experts = torch.arange(self.n_experts, device=self.token_index.device)
        return experts.repeat_interleave(self.tokens_per_expert, output_size=self.token_index.shape[0])

    @classmethod
    def from_choices(
        cls,
        expert_indices: Tensor,
        expert_weights: Tensor,
        n_experts: int,
        context: RoutingContext,
        *,
        router_logits: Tensor | None = None,
        router_probs: Tensor | None = None,
        load_probs: Tensor | None = None,
        losses: dict[str, Tensor] | None = None,
    ) -> RoutingPlan:
        """Plan from K choices per token: `expert_indices` and `expert_weights` `[T, K]`.

        >>> import torch
        >>> plan = RoutingPlan.from_choices(
        ...     torch.tensor([[1], [0], [1]]), torch.ones(3, 1), 2, RoutingContext(batch_shape=(1, 3))
        ... )
        >>> plan.token_index.tolist(), plan.tokens_per_expert.tolist()
        ([1, 0, 2], [1, 2])
        """
        n_tokens, k = expert_indices.shape
        flat = expert_indices.reshape(-1)
        if context.token_mask is not None:
            # padding goes behind the last expert and is cut off
            flat = flat.masked_fill(~context.token_mask.repeat_interleave(k), n_experts)
        order, counts = sort_by_expert(flat, n_experts + 1)
        counts = counts[:n_experts]
        if context.token_mask is not None:
            order = order[: int(counts.sum())]
        return cls(
            token_index=torch.div(order, k, rounding_mode="floor"),
            row_weight=expert_weights.reshape(-1).index_select(0, order),
            tokens_per_expert=counts,
            n_tokens=n_tokens,
            batch_shape=context.batch_shape,
            router_logits=router_logits,
            router_probs=router_probs,
            token_mask=context.token_mask,
            load_probs=load_probs,
            losses=losses or {},
        )

    @classmethod
    def from_mask(
        cls,
        chosen: Tensor,
        expert_weights: Tensor,
        context: RoutingContext,
        *,
        router_logits: Tensor | None = None,
        router_probs: Tensor | None = None,
        losses: dict[str, Tensor] | None = None,
    ) -> RoutingPlan:
        """Plan from any number of experts per token: `chosen` bool and `expert_weights`, both `[T, E]`."""
        if context.token_mask is not None:
            chosen = chosen & context.token_mask[:, None]
        expert_of_row, token_index = chosen.t().nonzero(as_tuple=True)
        return cls(
            token_index=token_index,
            row_weight=expert_weights[token_index, expert_of_row],
            tokens_per_expert=chosen.sum(dim=0),
            n_tokens=chosen.shape[0],
            batch_shape=context.batch_shape,
            router_logits=router_logits,
            router_probs=router_probs,
            token_mask=context.token_mask,
            losses=losses or {},
        )

    def keep_rows(self, keep: Tensor) -> RoutingPlan:
        """The plan with only the rows where `keep` `[R]` is True; what was requested stays on record."""
        counts = count_per_expert(self.expert_of_row()[keep], self.n_experts)
        return replace(
            self,
            token_index=self.token_index[keep],
            row_weight=self.row_weight[keep],
            tokens_per_expert=counts,
            requested_per_expert=self.requested,
        )

    def computed_by(self, expert_of_choice: Tensor, n_experts: int) -> RoutingPlan:
        """The plan in which expert `expert_of_choice[e]` answers for each expert `e` that was chosen.

        Args:
            expert_of_choice: `[E]`, each below `n_experts`.
            n_experts: experts that compute.

        Every choice keeps its row and its weight, so that a token which chose two members of a merged expert gets its
        answer by the sum of both weights. What was requested stays on record by the router's own experts.

        >>> import torch
        >>> plan = RoutingPlan.from_choices(
        ...     torch.tensor([[0, 2], [1, 2]]), torch.tensor([[0.9, 0.1], [0.6, 0.4]]), 3, RoutingContext((1, 2))
        ... )
        >>> merged = plan.computed_by(torch.tensor([0, 1, 0]), 2)
        >>> merged.tokens_per_expert.tolist(), merged.token_index.tolist(), merged.requested.tolist()
        ([3, 1], [0, 0, 1, 1], [1, 1, 2])
        """
        expert = expert_of_choice.to(self.token_index.device)[self.expert_of_row()]
        # inside an expert by token, as everywhere: a limit by position counts on it
        order = torch.argsort(expert * self.n_tokens + self.token_index, stable=True)
        return replace(
            self,
            token_index=self.token_index[order],
            row_weight=self.row_weight[order],
            tokens_per_expert=count_per_expert(expert, n_experts),
            requested_per_expert=self.requested,
        )

    def limited_to(self, capacity: int, drop_policy: str = "position") -> RoutingPlan:
        """The plan with at most `capacity` rows per expert.

        "position" keeps the earliest tokens (which never looks ahead); "probability" keeps the largest
        weights.
        """
        rows = self.token_index.shape[0]
        starts = self.tokens_per_expert.cumsum(0) - self.tokens_per_expert
        position = torch.arange(rows, device=self.token_index.device)
        if drop_policy == "probability":
            by_weight = torch.argsort(self.row_weight.detach(), descending=True, stable=True)
            sorted_rows = by_weight[torch.argsort(self.expert_of_row()[by_weight], stable=True)]
            rank = torch.empty_like(position)
            rank[sorted_rows] = position
        else:
            rank = position
        return self.keep_rows(rank - starts[self.expert_of_row()] < capacity)

    def winners(self) -> RoutingPlan:
        """The plan with only each token's row of the largest weight (the lower expert at a tie)."""
        rows = self.token_index.shape[0]
        weight = self.row_weight.detach()
        largest = torch.full((self.n_tokens,), -torch.inf, dtype=weight.dtype, device=weight.device)
        largest = largest.scatter_reduce(0, self.token_index, weight, "amax")
        position = torch.arange(rows, device=weight.device)
        candidate = torch.where(weight == largest[self.token_index], position, rows)
        first = torch.full((self.n_tokens,), rows, dtype=position.dtype, device=weight.device)
        first = first.scatter_reduce(0, self.token_index, candidate, "amin")
        kept = self.keep_rows(first[self.token_index] == position)
        return replace(kept, requested_per_expert=self.requested_per_expert)

    def map_weights(self, function: Callable[[Tensor], Tensor]) -> RoutingPlan:
        """The plan with `function` applied to the combine weights."""
        slots = None if self.slots is None else replace(self.slots, combine=function(self.slots.combine))
        return replace(self, row_weight=function(self.row_weight), slots=slots)


def mean_over_tokens(values: Tensor, token_mask: Tensor | None) -> Tensor:
    """Mean of `[T, ...]` over the tokens that count, `[...]`; 0 where none does.

    >>> mean_over_tokens(torch.tensor([1.0, 3.0, 100.0]), torch.tensor([True, True, False])).item()
    2.0
    """
    if token_mask is None:
        return values.sum(dim=0) / max(values.shape[0], 1)
    mask = token_mask.view(-1, *[1] * (values.dim() - 1))
    return (values * mask).sum(dim=0) / token_mask.sum().clamp(min=1)
