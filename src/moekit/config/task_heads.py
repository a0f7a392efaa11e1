"""Heads of a task, which turn vectors into answers; sizes and names are filled in from the data."""

from __future__ import annotations

from typing import Annotated, Literal, Union

from pydantic import Field, model_validator

from moekit.config.base import StrictConfig
from moekit.config.errors import require
from moekit.config.task_language import SequenceHeadConfig, SpanHeadConfig
from moekit.config.task_transcript import CtcHeadConfig
from moekit.config.task_vision import CodesHeadConfig, DetectHeadConfig, SegmentHeadConfig


class ClassifyHeadConfig(StrictConfig):
    """Logits of classes from the pooled vectors."""

    kind: Literal["classify"] = Field(default="classify", description="classes")
    labels: tuple[str, ...] = Field(default=("no", "yes"), min_length=2, description="names of the classes")
    multi: bool = Field(default=False, description="any number of classes, by a sigmoid each")
    smoothing: float = Field(default=0.0, ge=0, lt=1, description="label smoothing")
    wide: dict[str, int] = Field(
        default_factory=dict, description="stems of kind bag with a linear map of their own, and their sizes"
    )
    wide_share: float | None = Field(
        default=None,
        gt=0,
        lt=1,
        description="the wide maps are fixed, and have this weight in the answer; null where they learn with the rest",
    )
    weight: float = Field(default=1.0, gt=0, description="of its loss beside other heads")


class RegressHeadConfig(StrictConfig):
    """Numbers from the pooled vectors, trained in standard deviations."""

    kind: Literal["regress"] = Field(default="regress", description="numbers")
    means: tuple[float, ...] = Field(default=(0.0,), min_length=1, description="of the training values")
    deviations: tuple[float, ...] = Field(default=(1.0,), description="of the training values")
    bounds: tuple[float, float] | None = Field(default=None, description="answers are clipped to these")
    wide: tuple[str, ...] = Field(default=(), description="stems of kind profile whose means are added")
    weight: float = Field(default=1.0, gt=0, description="of its loss beside other heads")

    @model_validator(mode="after")
    def _rules(self) -> RegressHeadConfig:
        require(len(self.deviations) == len(self.means), "deviations", self.deviations,
                f"must be as many as means ({len(self.means)})")  # fmt: skip
        require(all(value > 0 for value in self.deviations), "deviations", self.deviations,
                "must be above 0", "A target that never changes cannot be learnt")  # fmt: skip
        return self


class TagHeadConfig(StrictConfig):
    """A tag for each token of one stem."""

    kind: Literal["tag"] = Field(default="tag", description="a tag for each token")
    labels: tuple[str, ...] = Field(default=("O",), min_length=1, description="names of the tags")
    stem: str = Field(default="text", description="the stem whose tokens are tagged")
    crf: bool = Field(default=False, description="tags are chosen together, by how well each follows another")
    bio: bool = Field(default=False, description="with crf: I-X follows B-X and I-X alone")
    weight: float = Field(default=1.0, gt=0, description="of its loss beside other heads")


class PolicyHeadConfig(StrictConfig):
    """Logits of discrete actions from the pooled vectors."""

    kind: Literal["policy"] = Field(default="policy", description="discrete actions")
    actions: tuple[str, ...] = Field(
        default=("0", "1"), min_length=2, description="names of the actions, in the order of their numbers"
    )
    weight: float = Field(default=1.0, gt=0, description="of its loss beside other heads")


class ValueHeadConfig(StrictConfig):
    """How much a state is worth, from the pooled vectors: one number, trained in standard deviations."""

    kind: Literal["value"] = Field(default="value", description="what a state is worth")
    mean: float = Field(default=0.0, description="of the returns")
    deviation: float = Field(default=1.0, gt=0, description="of the returns")
    weight: float = Field(default=1.0, gt=0, description="of its loss beside other heads")


class RankHeadConfig(StrictConfig):
    """A score for each entity of a stem's table: the product with its vector, and a bias."""

    kind: Literal["rank"] = Field(default="rank", description="a score for each entity")
    n_entities: int = Field(default=1, ge=1, description="entities that can be answered")
    stem: str = Field(default="ids", description="the stem whose table holds their vectors")
    start: int = Field(default=1, ge=0, description="row of the first of them in that table")
    sequence: bool = Field(
        default=False, description="answer behind each token of the stem, not from the pooled vectors"
    )
    wide: int = Field(
        default=0,
        ge=0,
        description="products of the stem, its first tokens, that score by themselves as well",
    )
    smoothing: float = Field(default=0.0, ge=0, lt=1, description="label smoothing")
    weight: float = Field(default=1.0, gt=0, description="of its loss beside other heads")


AnyHead = Annotated[
    Union[  # noqa: UP007  one a line
        ClassifyHeadConfig,
        RegressHeadConfig,
        TagHeadConfig,
        PolicyHeadConfig,
        ValueHeadConfig,
        SequenceHeadConfig,
        SpanHeadConfig,
        RankHeadConfig,
        DetectHeadConfig,
        SegmentHeadConfig,
        CodesHeadConfig,
        CtcHeadConfig,
    ],
    Field(discriminator="kind"),
]
