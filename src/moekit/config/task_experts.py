"""Configuration of the experts between pooling and heads, mixed by each task for itself."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from moekit.config.base import StrictConfig
from moekit.config.errors import require
from moekit.config.moe import Activation, BalanceConfig, RouterConfig

_TWO = 2  # experts of a task's own where PLE is not told how many


class TaskExpertsConfig(StrictConfig):
    """Experts that read the pooled vector, and for each task its own mixture of them.

    mmoe: a router for each task over experts that all share (Ma et al. 2018, KDD). ple: each task has experts of its
    own as well, in one or several levels (Tang et al. 2020, RecSys; one level is the paper's CGC). single: one router
    for all tasks. shared: one dense block for all tasks, the shared bottom that the others are compared with.
    """

    kind: Literal["mmoe", "ple", "single", "shared"] = Field(
        default="mmoe", description="a router for each task, experts of its own too, one router, or no router"
    )
    n_experts: int = Field(default=8, ge=1, description="experts that all tasks share, in each level")
    n_own: int | None = Field(
        default=None,
        ge=1,
        description=f"further experts of each task's own (ple alone); {_TWO} where null",
    )
    levels: int = Field(default=1, ge=1, le=16, description="levels, one upon the other (ple alone)")
    d_expert: int = Field(default=64, ge=1, description="inner width of each expert")
    top_k: int | None = Field(
        default=None, ge=1, description="experts that a task chooses for an example; all of them where null"
    )
    activation: Activation = Field(default="swiglu", description="activation of the experts")
    router: RouterConfig = Field(
        default_factory=RouterConfig, description="the rule that weighs or chooses them"
    )
    dropout: float = Field(default=0.0, ge=0, lt=1, description="dropout of what the experts add")
    balance: BalanceConfig | None = Field(
        default=None, description="load balancing where model.moe is null; else model.moe.balance holds"
    )

    @field_validator("balance", mode="before")
    @classmethod
    def _no_balance(cls, value: Any) -> Any:
        return BalanceConfig(load_balance=0.0, router_z=0.0) if value is False else value

    @model_validator(mode="after")
    def _rules(self) -> TaskExpertsConfig:
        ple = self.kind == "ple"
        require(ple or self.n_own is None, "n_own", self.n_own, f"must be null with kind {self.kind}",
                "Only kind: ple has experts of a task's own")  # fmt: skip
        require(ple or self.levels == 1, "levels", self.levels, f"must be 1 with kind {self.kind}",
                "Only kind: ple has several")  # fmt: skip
        require(self.kind != "shared" or self.n_experts == 1, "n_experts", self.n_experts,
                "must be 1 with kind shared, which is one dense block", "Widen it by d_expert")  # fmt: skip
        most = self.n_choices
        require(self.top_k is None or self.top_k <= most, "top_k", self.top_k,
                f"must be in 1..{most}, the experts that a task sees")  # fmt: skip
        require(self.router.name != "soft", "router", "soft",
                "blends the tokens of a text, and here each example has one vector")  # fmt: skip
        return self

    @property
    def own(self) -> int:
        """Experts of each task's own in a level."""
        return 0 if self.kind != "ple" else _TWO if self.n_own is None else self.n_own

    @property
    def n_choices(self) -> int:
        """Experts that a task sees in a level."""
        return self.n_experts + self.own
