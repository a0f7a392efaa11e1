"""Configuration of one Mixture-of-Experts layer: router, experts, aggregation and balancing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from moekit.config.base import StrictConfig
from moekit.config.errors import require

Activation = Literal[
    "swiglu",
    "geglu",
    "geglu_tanh",
    "clamped_swiglu",
    "gelu",
    "gelu_tanh",
    "relu",
    "relu_squared",
    "silu",
    "sigmoid",
]
Combine = Literal["weighted_sum", "winner", "vote_soft", "vote_hard"]
DropPolicy = Literal["position", "probability"]


class RouterConfig(StrictConfig):
    """A router by its registered name, with the options of its class.

    YAML accepts the name alone (`router: softmax`) or a mapping whose further keys are the options
    (`router: {name: softmax, normalize: before}`). The options are checked when the layer is built, because
    a user's own router brings its own.
    """

    name: str = Field(default="softmax", description="registered name of the rule")
    options: dict[str, Any] = Field(default_factory=dict, description="options of the rule's class")

    @model_validator(mode="before")
    @classmethod
    def _accept_short_forms(cls, value: Any) -> Any:
        if isinstance(value, str):
            return {"name": value}
        if isinstance(value, Mapping) and "options" not in value:
            rest = {key: item for key, item in value.items() if key != "name"}
            return {"name": value.get("name", "softmax"), "options": rest}
        return value


class NullExpertsConfig(StrictConfig):
    """Experts that cost nothing (MoE++, Jin et al. 2024): how many of each kind stand behind the real ones."""

    zero: int = Field(default=0, ge=0, description="experts that return zero: the token skips the layer")
    copy_input: int = Field(default=0, ge=0, description="experts that return their input unchanged")
    constant: int = Field(default=0, ge=0, description="experts that mix their input with one learned vector")

    @property
    def total(self) -> int:
        return self.zero + self.copy_input + self.constant


class QuantizationConfig(StrictConfig):
    """Weights stored in 8 or 4 bits, for inference alone (`moekit.kernels.quantized`)."""

    bits: Literal[8, 4] = Field(default=8, description="bits of a weight")
    group_size: Literal[32, 64, 128] = Field(default=64, description="neighbouring inputs that share a scale")


class BalanceConfig(StrictConfig):
    """How the load of the experts is kept even. Coefficients weight the losses in training, nowhere else."""

    load_balance: float = Field(
        default=0.01, ge=0, description="coefficient of E * sum(f * P), 1 at perfect balance"
    )
    scope: Literal["global_batch", "sequence"] = Field(
        default="global_batch",
        description="over which tokens f and P are taken: the optimizer step's (with gradient accumulation, f of "
        "the micro-batches so far and P of the present one), or each sequence by itself",
    )
    router_z: float = Field(
        default=0.001, ge=0, description="coefficient of the mean squared log-sum-exp of logits"
    )
    importance: float = Field(
        default=0.0, ge=0, description="coefficient of the squared variation of expert weight"
    )
    load: float = Field(
        default=0.0, ge=0, description="coefficient of the squared variation of expected load (noisy)"
    )
    bias_update_rate: float = Field(
        default=0.0,
        ge=0,
        description="auxiliary-loss-free balancing: b += rate * direction each step; 0 for none",
    )
    bias_update: Literal["sign", "proportional"] = Field(
        default="sign",
        description="the direction: sign(mean load - load), or (mean load - load) / mean load within -1..1",
    )
    bias_update_decay: bool = Field(
        default=True,
        description="let the rate of the bias follow the learning-rate schedule; false keeps it constant",
    )
    router_loss: float = Field(
        default=1.0, ge=0, description="factor of losses that a router brings by itself (ReMoE's L1)"
    )


class MoEConfig(StrictConfig):
    """One Mixture-of-Experts layer; `d_model` comes from the model around it."""

    n_experts: int = Field(default=8, ge=1, description="routed experts that compute")
    d_expert: int = Field(default=512, ge=1, description="inner width of each expert")
    top_k: int = Field(default=2, ge=1, description="experts chosen for each token")
    router: RouterConfig = Field(default_factory=RouterConfig, description="the rule that chooses")
    activation: Activation = Field(
        default="swiglu", description="activation of the experts; clamped_swiglu is GPT-OSS's"
    )
    bias: bool = Field(default=False, description="whether the experts' linear maps have biases")
    d_out: int | None = Field(
        default=None, ge=1, description="output width of each expert; d_model where null"
    )
    n_shared_experts: int = Field(default=0, ge=0, description="experts that every token passes")
    d_shared: int | None = Field(
        default=None,
        ge=1,
        description="inner width of all shared experts together; n_shared_experts * d_expert if null",
    )
    shared_gate: bool = Field(
        default=False, description="scale the shared expert by a learned sigmoid (Qwen2-MoE)"
    )
    output_bias: bool = Field(
        default=False, description="one learned bias on the layer's answer, whichever experts are chosen"
    )
    linear_path: bool = Field(default=False, description="add xW to the experts' answer: y = xW + g(x)v")
    null_experts: NullExpertsConfig = Field(
        default_factory=NullExpertsConfig, description="experts without computation, chosen like the others"
    )
    combine: Combine = Field(
        default="weighted_sum", description="how the answers of a token's experts become one"
    )
    weight_scale: float = Field(
        default=1.0, gt=0, description="factor on all combine weights (DeepSeek's scaling)"
    )
    capacity_factor: float | None = Field(
        default=None, gt=0, description="rows an expert accepts, over the mean; null never drops a token"
    )
    drop_policy: DropPolicy = Field(
        default="position",
        description="which rows stay when an expert is full: the earliest or the most probable",
    )
    balance: BalanceConfig = Field(default_factory=BalanceConfig, description="load balancing")
    merged_into: tuple[int, ...] | None = Field(
        default=None,
        description="which expert computes for each one that the router chooses, where experts were merged",
    )
    quantization: QuantizationConfig | None = Field(
        default=None,
        description="8 or 4 bits for the weights of routed and shared experts; for inference alone",
    )
    families: bool = Field(
        default=False,
        description="let experts that came from one another share a family, of which a token takes one alone; "
        "train.experts needs it",
    )
    kernel: str = Field(
        default="auto", description="implementation of the experts; auto takes the fastest that fits"
    )

    @field_validator("balance", mode="before")
    @classmethod
    def _no_balance(cls, value: Any) -> Any:
        return BalanceConfig(load_balance=0.0, router_z=0.0) if value in (None, False) else value

    @model_validator(mode="after")
    def _rules(self) -> MoEConfig:
        if self.merged_into is not None:
            require(
                set(self.merged_into) == set(range(self.n_experts)), "merged_into", self.merged_into,
                f"must name every expert of 0..{self.n_experts - 1} (n_experts less 1), and no other",
            )  # fmt: skip
        require(
            self.top_k <= self.n_choices, "top_k", self.top_k, f"must be in 1..n_experts ({self.n_choices})"
        )
        require(
            self.d_shared is None or self.n_shared_experts > 0, "d_shared", self.d_shared,
            "needs n_shared_experts of at least 1", "Set n_shared_experts: 1 or remove d_shared",
        )  # fmt: skip
        require(
            not self.shared_gate or self.n_shared_experts > 0, "shared_gate", self.shared_gate,
            "needs n_shared_experts of at least 1", "Set n_shared_experts: 1 or remove shared_gate",
        )  # fmt: skip
        votes = self.combine.startswith("vote")
        side_paths = self.n_shared_experts > 0 or self.linear_path or self.output_bias
        side_paths = side_paths or self.null_experts.total > 0
        require(
            not (votes and side_paths), "combine", self.combine,
            "needs plain experts: shared, null and linear paths and biases cast no vote", "Use combine: weighted_sum",
        )  # fmt: skip
        require(not self.families or (self.merged_into is None and self.null_experts.total == 0), "families",
                self.families, "must be false with merged or null experts")  # fmt: skip
        self._quantization_rules()
        return self

    def _quantization_rules(self) -> None:
        if self.quantization is None:
            return
        size = self.quantization.group_size
        for field, width in (("d_expert", self.d_expert), ("d_shared", self.shared_width)):
            require(width % size == 0, field, width, f"must be a multiple of quantization.group_size ({size})",
                    "`moekit compress quantize` pads it with neurons of zeros")  # fmt: skip

    @property
    def n_choices(self) -> int:
        """Experts a router chooses from: the real ones (before a merge) and, behind them, the null ones."""
        real = self.n_experts if self.merged_into is None else len(self.merged_into)
        return real + self.null_experts.total

    @property
    def shared_width(self) -> int:
        """Inner width of the shared experts together; 0 where there are none."""
        if self.n_shared_experts == 0:
            return 0
        return self.d_shared if self.d_shared is not None else self.n_shared_experts * self.d_expert
