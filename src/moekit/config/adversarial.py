"""Configuration of attacks by gradients, and of training against them."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from moekit.config.base import StrictConfig
from moekit.config.errors import require


class AttackConfig(StrictConfig):
    """How far an input may be moved, and how the worst place within reach is looked for (PGD)."""

    epsilon: float = Field(
        default=0.1,
        gt=0,
        description="largest change: of pictures and clips in ranges of a pixel (0.1 is a tenth from black to white), "
        "of other numbers in standard deviations, of embeddings in the typical length of a token's vector (with linf, "
        "in the typical size of its numbers)",
    )
    steps: int = Field(default=7, ge=1, description="steps of gradient ascent")
    step_size: float | None = Field(
        default=None, gt=0, description="length of a step, as epsilon; 2.5 epsilon / steps where null"
    )
    norm: Literal["linf", "l2"] = Field(
        default="linf",
        description="what epsilon bounds: each number, or the length of the whole change (of an embedding, of each "
        "token's)",
    )
    random_start: bool = Field(default=True, description="begin at a random place within reach")
    objective: Literal["loss", "routing"] = Field(
        default="loss",
        description="what is made large: the loss, or the divergence of the routing from that without attack",
    )
    space: Literal["auto", "input", "embedding"] = Field(
        default="auto",
        description="what is moved: numbers of the input where it has any, else vectors of the stem; or one of both",
    )
    inputs: tuple[str, ...] | None = Field(
        default=None, description="names of a task's inputs that are moved; all where null"
    )
    valid_range: tuple[float, float] | None = Field(
        default=None,
        description="smallest and largest number of a pixel as it was given; where null, 0 to 255 for bytes, else what "
        "the training examples hold",
    )

    @property
    def stride(self) -> float:
        """Length of a step, in the unit of epsilon."""
        return 2.5 * self.epsilon / self.steps if self.step_size is None else self.step_size

    @model_validator(mode="after")
    def _rules(self) -> AttackConfig:
        low, high = self.valid_range or (0.0, 1.0)
        require(low < high, "valid_range", self.valid_range, "must hold a smaller and a larger number")
        require(self.random_start or self.objective == "loss", "random_start", False,
                "must be true with objective: routing, whose divergence is flat where nothing has moved")  # fmt: skip
        return self


class AdversarialConfig(AttackConfig):
    """Training on inputs that are moved against the model while it learns."""

    loss: Literal["mix", "trades"] = Field(
        default="mix",
        description="mix: weight parts of the moved input's loss, the rest of the given one's; trades: weight times "
        "the divergence of the answers to both, beside the loss of the given one",
    )
    weight: float = Field(
        default=0.5, ge=0, description="of what is learnt of moved inputs; TRADES takes 1 to 10"
    )
    stability: float = Field(
        default=0.0,
        ge=0,
        description="weight of the divergence of routing probabilities under attack from those without",
    )
    target: Literal["all", "router", "alternate"] = Field(
        default="all",
        description="what moved inputs teach: everything, or the routers alone; alternate: routers and everything else "
        "learn by turns, a step each, from given and moved inputs (AdvMoE)",
    )
    ramp_steps: int = Field(
        default=0, ge=0, description="steps of training in which epsilon grows from nothing"
    )

    @model_validator(mode="after")
    def _training_rules(self) -> AdversarialConfig:
        require(self.loss == "trades" or self.weight <= 1, "weight", self.weight,
                "must be at most 1 with loss: mix, which it is a share of")  # fmt: skip
        require(self.weight > 0 or self.stability > 0, "weight", 0,
                "must be above 0, or stability", "Set train.adversarial: null to train without attacks")  # fmt: skip
        require(self.random_start or self.loss == "mix", "random_start", False,
                "must be true with loss: trades, whose divergence is flat where nothing has moved")  # fmt: skip
        return self

    def at(self, step: int) -> AdversarialConfig:
        """The configuration in the step after `step` steps: epsilon and steps' length grow with the ramp.

        >>> AdversarialConfig(epsilon=0.3, ramp_steps=10).at(4).epsilon
        0.15
        """
        if step + 1 >= self.ramp_steps:
            return self
        share = (step + 1) / self.ramp_steps
        size = None if self.step_size is None else self.step_size * share
        return self.model_copy(update={"epsilon": self.epsilon * share, "step_size": size})
