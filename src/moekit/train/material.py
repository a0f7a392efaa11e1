"""What a run is trained on: text for a language model, or the examples of a task. One interface for both."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn

from moekit.config.task import ClassTarget, TaskModelConfig
from moekit.config.task_run import TaskRunConfig
from moekit.config.train import RunConfig
from moekit.data.documents import SourceInfo
from moekit.data.encoding.codebook import CodesEncoder
from moekit.data.encoding.whole import EncodedExamples, Encoding
from moekit.data.encoding.wide import WideFit, fit_wide
from moekit.data.examples import TaskData
from moekit.data.groups import groups_of
from moekit.data.loader import TrainLoader, evaluation_batches
from moekit.data.prepare import PreparedData, prepare
from moekit.data.task_data import load_task_data
from moekit.data.task_loader import TaskLoader, task_batches
from moekit.data.tokenizer import Tokenizer
from moekit.observe.recorder import Recorder
from moekit.observe.tasks import add_task

AnyRunConfig = RunConfig | TaskRunConfig
Progress = Callable[[str], None]


class Material(Protocol):
    """Attributes: config: of the run, its model fitted to the data. fingerprint: equal exactly where a model sees the
    same data. sources: origins and licences. tokenizer: of the text; None where there is none.
    """

    config: Any
    fingerprint: str
    sources: list[SourceInfo]
    tokenizer: Tokenizer | None

    def groups(self) -> tuple[str, ...]:
        """Names of the groups of tokens in validation: domains, or classes."""
        ...

    def observe(self, recorder: Recorder, batch: Any, out: Any, step: int) -> None:
        """Give the routing of a batch of validation to a recorder of these groups."""
        ...

    def loader(self) -> TrainLoader | TaskLoader:
        """A new loader of the training examples, at their beginning."""
        ...

    def validation(self) -> Iterator[Any]:
        """The batches of one validation."""
        ...

    def begin(self, model: nn.Module) -> None:
        """Put into a new model what is fitted to the training examples before any step."""
        ...

    def save(self, folder: Path) -> None:
        """Write what is needed to read new input as the training examples were read."""
        ...


class TextMaterial:
    """Text for a language model."""

    def __init__(self, config: RunConfig, data: PreparedData | None, progress: Progress | None) -> None:
        self.data = prepare(config.data, progress) if data is None else data
        model = config.model
        if model.vocab_size < self.data.tokenizer.vocab_size:
            model = model.replace(vocab_size=self.data.tokenizer.vocab_size)
        if model.max_seq_len < config.data.seq_len:
            model = model.replace(max_seq_len=config.data.seq_len)
        self.config = config.replace(model=model)
        self.fingerprint, self.sources = self.data.fingerprint, self.data.sources
        self.tokenizer: Tokenizer | None = self.data.tokenizer

    def groups(self) -> tuple[str, ...]:
        return self.data.validation.domains

    def observe(self, recorder: Recorder, batch: Any, out: Any, step: int) -> None:
        recorder.add(
            out.routing, token_ids=batch.token_ids, targets=batch.targets, groups=batch.domain_ids,
            texts=batch.segment_ids, step=step,
        )  # fmt: skip

    def loader(self) -> TrainLoader:
        train, data = self.config.train, self.config.data
        return TrainLoader(
            self.data.train, train.batch_size, data.seq_len, train.seed, data.order, data.domains
        )

    def validation(self) -> Iterator[Any]:
        train = self.config.train
        return evaluation_batches(
            self.data.validation,
            train.batch_size,
            self.config.data.seq_len,
            max_batches=train.validation_batches,
        )

    def begin(self, model: nn.Module) -> None:
        return None

    def save(self, folder: Path) -> None:
        self.data.tokenizer.save(folder / "tokenizer.json")


@dataclass
class TaskMaterial:
    """The examples of a task, encoded.

    `of` makes it from a configuration; a run that is resumed gives its own encoding.
    """

    config: TaskRunConfig
    data: TaskData
    encoding: Encoding
    train: EncodedExamples
    held: EncodedExamples
    fingerprint: str
    sources: list[SourceInfo]
    tokenizer: Tokenizer | None = None

    @classmethod
    def of(
        cls,
        config: TaskRunConfig,
        data: TaskData | None = None,
        encoding: Encoding | None = None,
        progress: Progress | None = None,
    ) -> TaskMaterial:
        """Errors: those of `load_task_data` and of the encoders."""
        data = load_task_data(config, progress) if data is None else data
        if encoding is None:
            encoding = Encoding.fit(config.inputs, config.targets, data.train)
            for part in (data.validation, data.test):
                encoding.learn(part)
        train, held = encoding.encode(data.train), encoding.encode(data.validation)
        settings = config.train
        if config.epochs is not None:
            per_epoch = max(1, len(data.train) // settings.batch_size)
            settings = settings.replace(steps=max(1, round(config.epochs * per_epoch)))
        longest = int(max(train.lengths.max(initial=0), held.lengths.max(initial=0)))
        model = encoding.fill(config.model)
        fixed = _fixed_tokens(encoding, model)
        model = model.replace(max_seq_len=max(model.max_seq_len, longest + fixed))
        config = config.replace(model=model, train=settings)
        return cls(config, data, encoding, train, held, data.fingerprint(), data.sources)

    @cached_property
    def wide(self) -> dict[str, WideFit]:
        """The wide maps that are fitted before training, by target."""
        found = {}
        for name, target in self.config.targets.items():
            if isinstance(target, ClassTarget) and target.wide_fit != "jointly":
                encoder: Any = self.encoding.targets[name]
                bags: Any = {bag: self.train.inputs[bag] for bag in target.wide}
                classes: Any = self.train.targets[name].batch(np.arange(len(self.train)))["targets"]
                found[name] = fit_wide(
                    target.wide_fit, target.wide_c, bags, encoder.wide, classes.numpy(), len(encoder.labels)
                )
        return found

    @cached_property
    def _groups(self) -> tuple[tuple[str, ...], list[int]]:
        return groups_of(self.config, self.data.validation)

    def groups(self) -> tuple[str, ...]:
        return self._groups[0]

    def observe(self, recorder: Recorder, batch: Any, out: Any, step: int) -> None:
        add_task(recorder, batch.inputs, out, batch.rows, self._groups[1], step)

    def loader(self) -> TaskLoader:
        # bags that fixed maps alone read stay behind: nothing in training looks at them
        read = set(self.encoding.tokens)
        for target in self.config.targets.values():
            if isinstance(target, ClassTarget) and target.wide_fit == "jointly":
                read |= set(target.wide)
        inputs = {name: part for name, part in self.train.inputs.items() if name in read}
        train = replace(self.train, inputs=inputs)
        return TaskLoader(train, self.config.train.batch_size, self.config.train.seed)

    def begin(self, model: nn.Module) -> None:
        for name, fit in self.wide.items():
            head: Any = model.get_submodule(f"heads.{name}")
            tables = {bag: torch.from_numpy(table) for bag, table in fit.tables.items()}
            head.set_wide(tables, torch.from_numpy(fit.bias))

    def validation(self) -> Iterator[Any]:
        train = self.config.train
        return task_batches(self.held, train.batch_size, train.validation_batches)

    def save(self, folder: Path) -> None:
        self.encoding.save(folder)


def _fixed_tokens(encoding: Encoding, model: TaskModelConfig) -> int:
    """Tokens of the inputs whose number does not depend on the example."""
    total = model.fixed_tokens
    for target in encoding.targets.values():
        if isinstance(target, CodesEncoder):
            total += target.part().length  # a picture that is written stands behind what is read
    return total


def material_of(
    config: AnyRunConfig,
    data: PreparedData | TaskData | None,
    progress: Progress | None,
    encoding: Encoding | None = None,
) -> TextMaterial | TaskMaterial:
    """The material that a configuration names, or that the caller has already."""
    if isinstance(config, TaskRunConfig):
        assert not isinstance(data, PreparedData)
        return TaskMaterial.of(config, data, encoding, progress)
    assert not isinstance(data, TaskData)
    return TextMaterial(config, data, progress)
