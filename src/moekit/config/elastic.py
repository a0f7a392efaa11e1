"""Configuration of training for several numbers of experts at once, and of experts that come and go."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from moekit.config.base import StrictConfig
from moekit.config.errors import require


class ElasticConfig(StrictConfig):
    """Training with a number of experts drawn anew again and again, so that one model serves at each of them."""

    k: tuple[int, ...] = Field(
        default=(1, 2, 4), description="experts per token to draw from; empty leaves moe.top_k"
    )
    weights: tuple[float, ...] | None = Field(
        default=None, description="how often each k is drawn, against the others; equally often where null"
    )
    n_experts: tuple[int, ...] = Field(
        default=(),
        description="lengths of the prefix of experts that may be chosen, drawn equally often; empty for all experts",
    )
    per: Literal["micro_batch", "step"] = Field(
        default="micro_batch", description="what shares one draw: a micro-batch, or a whole optimizer step"
    )

    @model_validator(mode="after")
    def _rules(self) -> ElasticConfig:
        for name in ("k", "n_experts"):
            values = getattr(self, name)
            require(all(value >= 1 for value in values) and len(set(values)) == len(values), name, list(values),
                    "must hold different numbers of at least 1")  # fmt: skip
        require(self.k or self.n_experts, "k", [], "must hold a number where n_experts holds none",
                "Set train.elastic: null to train at moe.top_k alone")  # fmt: skip
        weights = self.weights
        require(weights is None or len(weights) == len(self.k), "weights", weights,
                f"must hold one weight for each k ({len(self.k)})")  # fmt: skip
        require(weights is None or (min(weights) >= 0 and sum(weights) > 0), "weights", weights,
                "must be 0 or more, and one of them above 0")  # fmt: skip
        require(not self.k or not self.n_experts or max(self.k) <= min(self.n_experts), "n_experts",
                list(self.n_experts), f"must be at least the largest k ({max(self.k, default=1)})")  # fmt: skip
        return self


class DynamicExpertsConfig(StrictConfig):
    """Experts that are split, revived, dropped or added while a model trains."""

    every: int = Field(
        default=20, ge=1, description="steps between looks at the load; load is summed over them"
    )
    grow_to: int | None = Field(
        default=None,
        ge=2,
        description="experts of each layer after growth, or the most that split_above may reach",
    )
    at: float | None = Field(
        default=None,
        gt=0,
        lt=1,
        description="share of the run's steps after which the experts grow to grow_to",
    )
    stall_below: float | None = Field(
        default=None,
        ge=0,
        description="grow to grow_to when the mean loss of as many steps as stall_steps fell by less than this",
    )
    stall_steps: int = Field(
        default=100, ge=1, description="steps whose mean loss is compared with as many before"
    )
    split_above: float | None = Field(
        default=None,
        gt=1,
        description="split an expert whose load is above so many times the mean, up to grow_to",
    )
    revive_after: int | None = Field(
        default=None,
        ge=1,
        description="steps after which a dead expert becomes a copy of the most loaded one",
    )
    drop_after: int | None = Field(
        default=None, ge=1, description="steps after which a dead expert is dropped; top_k families stay"
    )
    dead_share: float = Field(
        default=0.01,
        ge=0,
        lt=1,
        description="an expert with at most this share of the mean load counts as dead",
    )
    memory_bytes: float | None = Field(
        default=None,
        gt=0,
        description="drop the least loaded experts until weights, gradients and moments fit (16 bytes a parameter)",
    )
    perturbation: float = Field(
        default=0.01,
        gt=0,
        le=1,
        description="how far the router rows of copies part, over the length of the row",
    )

    @model_validator(mode="after")
    def _rules(self) -> DynamicExpertsConfig:
        triggers = (self.at, self.stall_below, self.split_above)
        require(self.grow_to is None or any(part is not None for part in triggers), "grow_to", self.grow_to,
                "needs at, stall_below or split_above, which say when")  # fmt: skip
        require(self.grow_to is not None or all(part is None for part in triggers), "grow_to", None,
                "must be given with at, stall_below or split_above")  # fmt: skip
        require(self.revive_after is None or self.drop_after is None, "drop_after", self.drop_after,
                "must be null with revive_after: a dead expert is one or the other")  # fmt: skip
        return self
