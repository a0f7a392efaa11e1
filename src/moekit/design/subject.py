"""What a search is about: a default configuration, read data, and the figure that is to become better.

A `Subject` can be sent to another process; a `Bench` holds the data that it names, read and encoded once for all
trials.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from moekit.config.errors import ConfigError
from moekit.config.task_run import TaskRunConfig
from moekit.config.train import RunConfig
from moekit.data.examples import Examples, TaskData
from moekit.data.loader import evaluation_batches
from moekit.data.task_loader import task_batches
from moekit.models.task_model import TaskModel
from moekit.train.device import resolve_device, resolve_dtype
from moekit.train.material import AnyRunConfig, Material, TaskMaterial, TextMaterial, material_of
from moekit.train.run import LoadedTask
from moekit.train.validation import loss_over

Say = Callable[[str], None]
Changes = dict[str, Any]
LOSS = "loss"
# examples that a trial is measured on, and passes that a latency is the median of
MEASURED, PASSES = 1000, 11
# weight of the loss beside another figure: less than any difference that counts
TIE = 1e-5


class Measures(Protocol):
    """Figures of a trained task on examples; the first is the one to improve. An object that can be pickled."""

    def __call__(self, loaded: LoadedTask, examples: Examples) -> dict[str, float]: ...


@dataclass(frozen=True)
class Subject:
    """Attributes: title: for people. config: the default, as a recipe or a file gives it. key: the figure to improve,
    of those that `measures` gives, or `loss`. higher: whether more of it is better. measures: of a task; None for a
    language model, whose loss is taken.
    """

    title: str
    config: AnyRunConfig
    key: str = LOSS
    higher: bool = False
    measures: Measures | None = None

    def worse(self, value: float) -> float:
        """The figure turned so that less is better."""
        return -value if self.higher else value

    def order(self, figures: Mapping[str, float]) -> float:
        """What trials are ordered by, less is better: the figure, and where two are equal, the loss.

        Of fifty validation examples an accuracy has fifty values; the loss tells designs apart that it holds for equal.

        >>> subject = Subject("spam", RunConfig(), key="accuracy", higher=True)
        >>> subject.order({"accuracy": 0.9, "loss": 0.4}) < subject.order({"accuracy": 0.9, "loss": 0.5})
        True
        """
        tie = 0.0 if self.key == LOSS else TIE * min(figures.get(LOSS, 0.0), 10.0)
        return self.worse(figures[self.key]) + tie


@dataclass
class Bench:
    """The data of a subject, and what trials do with it.

    Attributes: subject. config: the default with what follows from the data (vocabulary, labels, steps). material: the
        encoded examples. data: for runs of their own.
    """

    subject: Subject
    config: AnyRunConfig
    material: TextMaterial | TaskMaterial
    data: Any = field(repr=False)

    @classmethod
    def open(cls, subject: Subject, say: Say | None = None) -> Bench:
        """Read the data. Errors: those of the data; `ConfigError` where there is nothing to validate on."""
        material = material_of(subject.config, None, say)
        bench = cls(subject, material.config, material, material.data)
        if bench.n_validation == 0:
            raise ConfigError(
                f"{subject.title} has no validation data, and designs are chosen on it alone. "
                "Set data.validation_share=0.1"
            )
        return bench

    @property
    def n_validation(self) -> int:
        if isinstance(self.material, TaskMaterial):
            return len(self.material.held)
        return int(self.material.data.validation.n_tokens)

    def fitted(self, config: AnyRunConfig) -> AnyRunConfig:
        """A changed configuration with what follows from the data; its steps are those of its epochs."""
        model = config.model
        if isinstance(config, TaskRunConfig):
            known = self.config.model
            model = model.replace(stems=known.stems, heads=known.heads, max_seq_len=known.max_seq_len)  # type: ignore[union-attr]
            if config.epochs is not None and isinstance(self.material, TaskMaterial):
                per_epoch = max(1, len(self.material.train) // config.train.batch_size)
                steps = max(1, round(config.epochs * per_epoch))
                config = config.replace(train=config.train.replace(steps=steps), epochs=None)
        else:
            own: Any = self.config.model
            model = model.replace(vocab_size=own.vocab_size, max_seq_len=own.max_seq_len)
        return config.replace(model=model)

    def material_of(self, config: AnyRunConfig) -> Material:
        """The same examples under another configuration; what was fitted to them (wide maps) is shared."""
        found = copy.copy(self.material)
        found.config = config
        return found

    def score(self, config: AnyRunConfig, model: nn.Module, part: str = "validation") -> dict[str, float]:
        """Figures of a trained model on the part `validation` (a share that stays the same), or `test`.

        A language model is tested on the held-out domain and on the validation text behind what a search has looked at.
        """
        device = resolve_device(config.train.device)
        dtype = resolve_dtype(config.train.precision, device)
        material = self.material
        if isinstance(material, TextMaterial):
            batches = list(self._text_batches(part))
            return {LOSS: loss_over(model, batches, device, dtype).mean} if batches else {}
        data: TaskData = material.data
        examples = data.test if part == "test" else data.validation
        if part == "validation":
            examples = examples.rows(range(min(MEASURED, len(examples))))
        if len(examples) == 0:
            return {}
        encoded = material.encoding.encode(examples)
        scores = {LOSS: loss_over(model, task_batches(encoded, 64), device, dtype).mean}
        if self.subject.measures is not None and isinstance(model, TaskModel):
            was_training = model.training
            model.eval()
            assert isinstance(config, TaskRunConfig)
            loaded = LoadedTask(config, model, material.encoding, 0, Path())
            scores |= self.subject.measures(loaded, examples)
            model.train(was_training)
        return scores

    def _text_batches(self, part: str) -> Any:
        assert isinstance(self.material, TextMaterial)
        config = self.material.config
        size, length = config.train.batch_size, config.data.seq_len
        batches = evaluation_batches(self.material.data.validation, size, length)
        looked_at = config.train.validation_batches
        return islice(batches, looked_at) if part == "validation" else islice(batches, looked_at, None)

    def latency(self, model: nn.Module) -> float:
        """Seconds of a forward pass of one example or sequence: the median of several."""
        if isinstance(self.material, TaskMaterial):
            batch: Any = next(iter(task_batches(self.material.held, 1, 1)))
        else:
            config = self.material.config
            batch = next(iter(evaluation_batches(self.material.data.validation, 1, config.data.seq_len)))
        device = next(model.parameters()).device
        arguments: Mapping[str, Any] = batch.to(device).arguments()
        was_training, seconds = model.training, []
        model.eval()
        with torch.random.fork_rng(devices=[]), torch.inference_mode():
            for _ in range(PASSES + 3):
                began = time.perf_counter()
                model(**arguments)
                if device.type == "cuda":
                    torch.cuda.synchronize(device)
                seconds.append(time.perf_counter() - began)
        model.train(was_training)
        return sorted(seconds[3:])[PASSES // 2]


def changed(config: AnyRunConfig, changes: Mapping[str, Any]) -> AnyRunConfig:
    """The configuration with dotted keys set, each as a whole; also what `key=value` of a command line would give.

    >>> config = changed(RunConfig(), {"train.optimizer.lr": 0.5, "model.n_layers": 2})
    >>> config.train.optimizer.lr, config.model.n_layers
    (0.5, 2)
    """
    data = config.to_dict()
    for key, value in changes.items():
        *groups, leaf = key.split(".")
        group = data
        for name in groups:
            group = group[name]
        group[leaf] = value
    return type(config).from_dict(data)


def require_searchable(config: AnyRunConfig) -> None:
    """Raise `ConfigError` for runs whose training a trial cannot repeat by itself."""
    train = config.train
    for name in ("experts", "elastic", "distill", "lora"):
        if getattr(train, name) is not None:
            raise ConfigError(
                f"train.{name} must be null in a search; got a value. Search without it and set it afterwards: "
                f"train.{name}=null"
            )
    if isinstance(config, RunConfig) and config.model.kind != "decoder":
        raise ConfigError(
            f"model.kind must be decoder in a search; got {config.model.kind!r}. Name a decoder's or a task's run"
        )
