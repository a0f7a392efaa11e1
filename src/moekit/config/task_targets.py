"""What a task answers: columns, by the kind of the answer."""

from __future__ import annotations

from typing import Annotated, Literal, Union

from pydantic import Field, model_validator

from moekit.config.base import StrictConfig
from moekit.config.errors import require
from moekit.config.task_language import SequenceTarget, SpanTarget
from moekit.config.task_transcript import TranscriptTarget
from moekit.config.task_vision import BoxesTarget, CodesTarget, MaskTarget


class ClassTarget(StrictConfig):
    """One of several classes, or any number of them."""

    kind: Literal["class"] = Field(default="class", description="one class of several")
    column: str = Field(default="label", description="the column")
    multi: bool = Field(default=False, description="any number of classes; the column holds lists")
    smoothing: float = Field(default=0.0, ge=0, lt=1, description="label smoothing")
    wide: tuple[str, ...] = Field(
        default=(), description="inputs of kind bag that also reach the classes by a linear map of their own"
    )
    wide_fit: Literal["jointly", "svm", "logistic"] = Field(
        default="jointly",
        description="the wide map learns with all the rest and its logits are added; or scikit-learn fits it to the "
        "training examples, the rest learns by itself, and the answer is a weighted mean of both",
    )
    wide_c: float = Field(default=1.0, gt=0, description="C of svm and logistic: larger fits more closely")
    wide_share: float = Field(
        default=0.8, gt=0, lt=1, description="weight of svm and logistic in the mean of log-probabilities"
    )
    weight: float = Field(default=1.0, gt=0, description="of its loss beside other targets")

    @model_validator(mode="after")
    def _rules(self) -> ClassTarget:
        if self.wide_fit != "jointly":
            require(self.wide, "wide_fit", self.wide_fit, "needs inputs in wide")
            require(not self.multi, "wide_fit", self.wide_fit, "must be jointly with multi: true")
        return self


class NumberTarget(StrictConfig):
    """One or several numbers."""

    kind: Literal["number"] = Field(default="number", description="numbers, by squared error")
    columns: tuple[str, ...] = Field(default=("value",), min_length=1, description="the columns")
    bounds: tuple[float, float] | None = Field(
        default=None, description="answers are clipped to these, in prediction"
    )
    wide: tuple[str, ...] = Field(
        default=(),
        description="inputs of kind profile whose means are added, by a map of their own that starts at 1",
    )
    weight: float = Field(default=1.0, gt=0, description="of its loss beside other targets")


class TagsTarget(StrictConfig):
    """A tag for each word of an input of kind words, or of kind text (the tag of its first token)."""

    kind: Literal["tags"] = Field(default="tags", description="a tag for each word")
    column: str = Field(
        default="tags", description="the column: a list of tags, as long as the list of words"
    )
    input: str = Field(default="text", description="the input whose words are tagged")
    crf: bool = Field(
        default=False, description="choose all tags of an example together: a conditional random field"
    )
    weight: float = Field(default=1.0, gt=0, description="of its loss beside other targets")


class ActionTarget(StrictConfig):
    """An action that was taken, one of several."""

    kind: Literal["action"] = Field(default="action", description="an action, by a policy")
    column: str = Field(default="action", description="the column")
    advantage: str | None = Field(
        default=None,
        description="column of what each action was worth beyond the others; all count 1 where null",
    )
    weight: float = Field(default=1.0, gt=0, description="of its loss beside other targets")


class ReturnTarget(StrictConfig):
    """What came of a state: the sum of the rewards from there on."""

    kind: Literal["return"] = Field(default="return", description="what a state is worth, by squared error")
    column: str = Field(default="return", description="the column")
    weight: float = Field(default=1.0, gt=0, description="of its loss beside other targets")


class EntityTarget(StrictConfig):
    """An entity out of all that an input knows: the tail of a relation, the next item of a history."""

    kind: Literal["entity"] = Field(default="entity", description="an entity, by a score for each of them")
    column: str = Field(default="item", description="the column")
    input: str = Field(
        default="ids", description="the input of kind ids or sequence that knows the same entities"
    )
    like: str | None = Field(
        default=None,
        description="the column of that input with entities of the same kind, where it has several",
    )
    new: bool = Field(
        default=True,
        description="leave out of an order what is known: other right answers to the same question, or what the "
        "sequence holds already",
    )
    every: bool = Field(
        default=True,
        description="learn each entity of a sequence from those before it, not the last one alone",
    )
    wide: bool = Field(
        default=False,
        description="the products of an input of kind ids also score by themselves: the factorisation beside the model",
    )
    n_best: int = Field(default=10, ge=1, description="entities that an answer names")
    smoothing: float = Field(default=0.0, ge=0, lt=1, description="label smoothing")
    weight: float = Field(default=1.0, gt=0, description="of its loss beside other targets")


AnyTarget = Annotated[
    Union[  # noqa: UP007  one a line
        ClassTarget,
        NumberTarget,
        TagsTarget,
        ActionTarget,
        ReturnTarget,
        SequenceTarget,
        SpanTarget,
        EntityTarget,
        BoxesTarget,
        MaskTarget,
        CodesTarget,
        TranscriptTarget,
    ],
    Field(discriminator="kind"),
]
