"""Configuration of a task's data and of a whole run on it."""

from __future__ import annotations

from typing import Any

from pydantic import Field, model_validator

from moekit.config.base import StrictConfig
from moekit.config.errors import nearest, require
from moekit.config.task import (
    AnyInput,
    AnyTarget,
    BagInput,
    ClassTarget,
    EntityTarget,
    IdsInput,
    NumberTarget,
    ProfileInput,
    SequenceInput,
    SequenceTarget,
    SpanTarget,
    TagsTarget,
    TaskModelConfig,
    TextInput,
    WordsInput,
)
from moekit.config.task_reshape import AnyReshape
from moekit.config.task_transcript import TranscriptTarget
from moekit.config.task_vision import BoxesTarget, MaskTarget
from moekit.config.train import TrainConfig


class TaskDataConfig(StrictConfig):
    """Examples: a named source, or the user's own files, and how they are split."""

    source: str | None = Field(default=None, description="a named source of examples, unless path is set")
    options: dict[str, Any] = Field(default_factory=dict, description="options of the named source")
    path: str | None = Field(
        default=None,
        description="your own examples: a .csv, .tsv, .jsonl or .parquet file, or a folder of folders, one a class",
    )
    validation_path: str | None = Field(
        default=None, description="examples for validation; a share of path's where null"
    )
    test_path: str | None = Field(
        default=None, description="examples to test on; a share of path's where null"
    )
    columns: dict[str, str] = Field(
        default_factory=dict, description="your names of the columns: {text: review, label: stars}"
    )
    validation_share: float = Field(default=0.1, ge=0, lt=0.9, description="share held for validation")
    test_share: float = Field(default=0.1, ge=0, lt=0.9, description="share to test on, where none is given")
    split_seed: int = Field(default=0, ge=0, description="seed of the split")
    max_examples: int | None = Field(default=None, ge=1, description="take at most this many of each split")
    reshape: AnyReshape | None = Field(
        default=None, description="make the examples of those that are given: histories, or both directions"
    )
    offline: bool = Field(default=False, description="use the cache and this Python installation only")

    @model_validator(mode="after")
    def _rules(self) -> TaskDataConfig:
        for name in ("validation_path", "test_path"):
            require(
                getattr(self, name) is None or self.path is not None, name, getattr(self, name), "needs path"
            )
        require(self.validation_share + self.test_share < 1, "test_share", self.test_share,
                f"must leave something to train on beside validation_share ({self.validation_share})")  # fmt: skip
        return self


class TaskRunConfig(StrictConfig):
    """Everything that defines a run on a task; stored beside it as config.yaml."""

    name: str = Field(default="task", description="name of the run, part of its folder")
    runs_dir: str = Field(default="runs", description="folder that holds the folders of runs")
    recipe: str | None = Field(default=None, description="the recipe that it came from")
    inputs: dict[str, AnyInput] = Field(min_length=1, description="what is read, by a name of your choice")
    targets: dict[str, AnyTarget] = Field(
        min_length=1, description="what is answered, by a name of your choice"
    )
    data: TaskDataConfig = Field(default_factory=TaskDataConfig)
    model: TaskModelConfig = Field(default_factory=TaskModelConfig)
    train: TrainConfig = Field(default_factory=TrainConfig)
    epochs: float | None = Field(
        default=None, gt=0, description="passes over the training examples; replaces train.steps"
    )

    @model_validator(mode="after")
    def _rules(self) -> TaskRunConfig:
        for name, target in self.targets.items():
            if isinstance(target, TagsTarget | SpanTarget):
                tagged = self.inputs.get(target.input)
                require(isinstance(tagged, TextInput | (WordsInput if isinstance(target, TagsTarget) else TextInput)),
                        f"targets.{name}.input", target.input,
                        "must be an input of kind text" + (" or words" if isinstance(target, TagsTarget) else ""),
                        nearest(target.input, list(self.inputs)))  # fmt: skip
            if isinstance(target, SequenceTarget) and target.share is not None:
                require(isinstance(self.inputs.get(target.share), TextInput), f"targets.{name}.share", target.share,
                        "must be an input of kind text", nearest(target.share, list(self.inputs)))  # fmt: skip
            if isinstance(target, EntityTarget):
                self._entity_rules(name, target)
            if isinstance(target, NumberTarget):
                for wide in target.wide:
                    require(isinstance(self.inputs.get(wide), ProfileInput), f"targets.{name}.wide", wide,
                            "must name inputs of kind profile", nearest(wide, list(self.inputs)))  # fmt: skip
            if isinstance(target, BoxesTarget | MaskTarget | TranscriptTarget):
                target.require_input(f"targets.{name}.input", self.inputs)
            if isinstance(target, ClassTarget):
                for wide in target.wide:
                    require(isinstance(self.inputs.get(wide), BagInput), f"targets.{name}.wide", wide,
                            "must name inputs of kind bag", nearest(wide, list(self.inputs)))  # fmt: skip
        tokens = [name for name, given in self.inputs.items() if getattr(given, "token", True)]
        require(tokens, "inputs", list(self.inputs), "must hold one that the backbone reads",
                "Set token: true for a bag")  # fmt: skip
        used = {bag for one in self.targets.values() if isinstance(one, ClassTarget) for bag in one.wide}
        for name in self.inputs:
            require(name in tokens or name in used, f"inputs.{name}.token", False,
                    "must be true: no target names the input in wide")  # fmt: skip
        lora = self.train.lora is None and self.train.distill is None
        require(lora, "train.lora", "set", "and train.distill are for language models")
        return self

    def _entity_rules(self, name: str, target: EntityTarget) -> None:
        given = self.inputs.get(target.input)
        require(isinstance(given, IdsInput | SequenceInput), f"targets.{name}.input", target.input,
                "must be an input of kind ids or sequence", nearest(target.input, list(self.inputs)))  # fmt: skip
        if isinstance(given, IdsInput):
            like = target.like if target.like is not None or len(given.columns) > 1 else given.columns[0]
            require(like in given.columns, f"targets.{name}.like", like,
                    f"must be the column of inputs.{target.input} that holds such entities",
                    nearest(str(like), given.columns))  # fmt: skip
        products = given.products if isinstance(given, IdsInput) else ()
        require(products or not target.wide, f"targets.{name}.wide", True,
                f"needs products in inputs.{target.input}")  # fmt: skip
        if isinstance(given, SequenceInput) and target.every:
            require(self.model.causal, "model.causal", False,
                    f"must be true for targets.{name}, which learns each entity of a sequence from those before it",
                    f"Or set targets.{name}.every: false")  # fmt: skip
