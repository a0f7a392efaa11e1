"""Configuration of a task's model: stems, one backbone, heads; and all kinds of inputs and targets by one import.

A user names columns and kinds; sizes that follow from the data (vocabulary, labels, categories) are filled in when the
data has been read, and stand in `model.stems` and `model.heads` of the stored configuration.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from moekit.config.backbone import BackboneConfig
from moekit.config.errors import nearest, require
from moekit.config.moe import BalanceConfig
from moekit.config.task_experts import TaskExpertsConfig
from moekit.config.task_heads import (
    AnyHead,
    ClassifyHeadConfig,
    PolicyHeadConfig,
    RankHeadConfig,
    RegressHeadConfig,
    TagHeadConfig,
    ValueHeadConfig,
)
from moekit.config.task_inputs import (
    AnyInput,
    AudioInput,
    BagInput,
    FieldsInput,
    IdsInput,
    ImageInput,
    ProfileInput,
    SequenceInput,
    TextInput,
    WordsInput,
)
from moekit.config.task_language import (
    SequenceHeadConfig,
    SequenceTarget,
    SpanHeadConfig,
    SpanTarget,
)
from moekit.config.task_stems import (
    AnyStem,
    BagStemConfig,
    FieldStemConfig,
    FrameStemConfig,
    IdStemConfig,
    PatchStemConfig,
    ProfileStemConfig,
    TokenStemConfig,
    WordStemConfig,
    n_fixed_tokens,
)
from moekit.config.task_targets import (
    ActionTarget,
    AnyTarget,
    ClassTarget,
    EntityTarget,
    NumberTarget,
    ReturnTarget,
    TagsTarget,
)
from moekit.config.task_transcript import CtcHeadConfig
from moekit.config.task_vision import CodesHeadConfig, DetectHeadConfig, SegmentHeadConfig

__all__ = [
    "ActionTarget",
    "AnyHead",
    "AnyInput",
    "AnyStem",
    "AnyTarget",
    "AudioInput",
    "BagInput",
    "BagStemConfig",
    "ClassTarget",
    "ClassifyHeadConfig",
    "EntityTarget",
    "FieldStemConfig",
    "FieldsInput",
    "FrameStemConfig",
    "IdStemConfig",
    "IdsInput",
    "ImageInput",
    "NumberTarget",
    "PatchStemConfig",
    "PolicyHeadConfig",
    "ProfileInput",
    "ProfileStemConfig",
    "RankHeadConfig",
    "RegressHeadConfig",
    "ReturnTarget",
    "SequenceHeadConfig",
    "SequenceInput",
    "SequenceTarget",
    "SpanHeadConfig",
    "SpanTarget",
    "TagHeadConfig",
    "TagsTarget",
    "TaskExpertsConfig",
    "TaskModelConfig",
    "TextInput",
    "TokenStemConfig",
    "ValueHeadConfig",
    "WordStemConfig",
    "WordsInput",
]


# heads that read the tokens of one stem
READS_ONE_STEM = (
    TagHeadConfig,
    SpanHeadConfig,
    RankHeadConfig,
    DetectHeadConfig,
    SegmentHeadConfig,
    CtcHeadConfig,
)


class TaskModelConfig(BackboneConfig):
    """Stems, one backbone, heads."""

    kind: Literal["task"] = Field(default="task", description="stems and heads around one backbone")
    stems: dict[str, AnyStem] = Field(
        default_factory=dict, description="by the name of the input; filled in from the data"
    )
    heads: dict[str, AnyHead] = Field(
        default_factory=dict, description="by the name of the target; filled in from the data"
    )
    causal: bool = Field(default=False, description="a token sees the earlier ones alone")
    pooling: Literal["mean", "max", "first", "attention"] = Field(
        default="mean", description="how the tokens' vectors become one for heads that answer once"
    )
    task_experts: TaskExpertsConfig | None = Field(
        default=None, description="experts behind the pooling, mixed by each target for itself; null for none"
    )
    products: tuple[tuple[str, str], ...] = Field(
        default=(),
        description="pairs of inputs whose first tokens are multiplied, one more token for each pair",
    )
    fuse: bool = Field(
        default=False,
        description="join the tokens of columns (ids, fields, profiles, bags) into one, each by a matrix of its own",
    )
    embedding_dropout: float = Field(default=0.0, ge=0, lt=1, description="dropout of what stems give")
    head_dropout: float = Field(default=0.0, ge=0, lt=1, description="dropout before the heads' maps")

    @model_validator(mode="after")
    def _task_rules(self) -> TaskModelConfig:
        require(self.causal or self.sliding_window is None, "sliding_window", self.sliding_window,
                "needs causal: true")  # fmt: skip
        require(
            self.moe is None or self.task_experts is None or self.task_experts.balance is None,
            "task_experts.balance", "set", "must be null beside moe, whose balance holds for the whole model",
            "Set moe.balance",
        )  # fmt: skip
        for pair in self.products:
            for given in pair if self.stems else ():
                near = nearest(given, list(self.stems))
                require(given in self.stems, "products", given, "must name inputs", near)
        if self.fuse:
            for name, one in self.stems.items():
                require(n_fixed_tokens(one) is not None, "fuse", True,
                        f"needs inputs with equally many tokens in every example; {name} has not")  # fmt: skip
        for name, head in self.heads.items():
            alone = isinstance(head, READS_ONE_STEM) and not (
                isinstance(head, RankHeadConfig) and not head.sequence
            )
            require(not (self.fuse and alone), "fuse", True,
                    f"leaves no tokens for the target {name}, which reads those of one input")  # fmt: skip
            if isinstance(head, READS_ONE_STEM):
                require(head.stem in self.stems, f"heads.{name}.stem", head.stem,
                        f"must be one of the stems: {', '.join(self.stems)}")  # fmt: skip
            if isinstance(head, RankHeadConfig):
                known = isinstance(self.stems[head.stem], IdStemConfig | TokenStemConfig)
                require(known, f"heads.{name}.stem", head.stem,
                        "must be a stem of ids or tokens, which has vectors of entities")  # fmt: skip
            if isinstance(head, SequenceHeadConfig) and head.share is not None:
                stem = self.stems.get(head.share)
                require(isinstance(stem, TokenStemConfig) and stem.vocab_size == head.vocab_size,
                        f"heads.{name}.share", head.share,
                        f"must be a stem of kind tokens with the same vocab_size ({head.vocab_size})")  # fmt: skip
            if isinstance(head, CodesHeadConfig):
                require(
                    self.causal,
                    "causal",
                    False,
                    f"must be true for heads.{name}: a code sees those before it alone",
                )
                require(len(self.heads) == 1, "heads", ", ".join(self.heads),
                        f"must hold {name} alone: another head would see what is to be generated")  # fmt: skip
        return self

    @property
    def fixed_tokens(self) -> int:
        """Tokens of the stems whose number does not depend on the example."""
        return sum(n_fixed_tokens(stem) or 0 for stem in self.stems.values()) + len(self.products)

    @property
    def balance(self) -> BalanceConfig:
        """What weighs the auxiliary losses of every sparse layer."""
        if self.moe is not None:
            return self.moe.balance
        own = None if self.task_experts is None else self.task_experts.balance
        return BalanceConfig() if own is None else own
