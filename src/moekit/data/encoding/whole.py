"""All inputs and targets of a task together: fitted once, kept in the run's folder, used on every split."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from moekit.config.atomic import write_json
from moekit.config.errors import CheckpointError
from moekit.config.task import AnyInput, AnyTarget, ClassTarget, TaskModelConfig
from moekit.data.encoding.actions import ActionEncoder, ReturnEncoder
from moekit.data.encoding.base import Encoded, Encoder, located
from moekit.data.encoding.codebook import CodesEncoder
from moekit.data.encoding.entities import EntityEncoder, IdSequenceEncoder
from moekit.data.encoding.fields import FieldsEncoder, IdsEncoder
from moekit.data.encoding.keywords import with_keywords
from moekit.data.encoding.pictures import BoxesEncoder, MaskEncoder, VideoEncoder
from moekit.data.encoding.profiles import ProfileEncoder
from moekit.data.encoding.sequences import SequenceEncoder, with_shared
from moekit.data.encoding.signals import AudioEncoder, ImageEncoder
from moekit.data.encoding.spans import SpanEncoder
from moekit.data.encoding.targets import ClassEncoder, NumberEncoder, TagsEncoder, TargetEncoder
from moekit.data.encoding.text import BagEncoder, TextEncoder
from moekit.data.encoding.transcripts import TranscriptEncoder
from moekit.data.encoding.words import WordsEncoder
from moekit.data.examples import Examples

INPUTS: dict[str, type[Encoder]] = {
    cls.kind: cls
    for cls in (
        TextEncoder,
        WordsEncoder,
        BagEncoder,
        ImageEncoder,
        AudioEncoder,
        FieldsEncoder,
        IdsEncoder,
        IdSequenceEncoder,
        ProfileEncoder,
        VideoEncoder,
    )
}
TARGETS: dict[str, type[TargetEncoder]] = {
    cls.kind: cls
    for cls in (
        ClassEncoder,
        NumberEncoder,
        TagsEncoder,
        ActionEncoder,
        ReturnEncoder,
        SequenceEncoder,
        SpanEncoder,
        EntityEncoder,
        BoxesEncoder,
        MaskEncoder,
        CodesEncoder,
        TranscriptEncoder,
    )
}
FILE = "encoding.json"


@dataclass(frozen=True)
class EncodedExamples:
    """Examples as arrays, by the names of inputs and targets.

    Attributes: inputs; targets: empty where the examples have no answers; examples: what they were made of.
    """

    inputs: Mapping[str, Encoded]
    targets: Mapping[str, Encoded]
    examples: Examples

    def __len__(self) -> int:
        return len(self.examples)

    @property
    def lengths(self) -> np.ndarray:
        """`[N]` tokens of each example that differ in number, over all inputs; zeros where all are equal."""
        found = np.zeros(len(self), dtype=np.int64)
        for part in self.inputs.values():
            if part.lengths is not None:
                found = found + part.lengths
        return found

    def arrays(
        self, rows: np.ndarray, rng: np.random.Generator | None = None
    ) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
        """Inputs and targets of some examples; `rng` in training."""
        inputs = {name: part.batch(rows, rng) for name, part in self.inputs.items()}
        return inputs, {name: part.batch(rows, rng)["targets"] for name, part in self.targets.items()}


class Encoding:
    """The encoders of a task by the names of its inputs and targets."""

    def __init__(self, inputs: Mapping[str, Encoder], targets: Mapping[str, TargetEncoder]) -> None:
        self.inputs, self.targets = dict(inputs), dict(targets)

    @classmethod
    def fit(
        cls, inputs: Mapping[str, AnyInput], targets: Mapping[str, AnyTarget], train: Examples
    ) -> Encoding:
        """Learn vocabularies, classes and statistics from the training examples alone."""
        with located(train):
            fitted = {
                name: INPUTS[config.kind].fit(config, with_shared(name, config, targets, train))
                for name, config in inputs.items()
            }
        answered: dict[str, Any] = {}
        for name, target in targets.items():
            with located(train):
                encoder: Any = TARGETS[target.kind].fit_with(target, train, fitted)
            if isinstance(target, ClassTarget):
                encoder.wide = {bag: fitted[bag].part().vocab_size for bag in target.wide}  # type: ignore[attr-defined]
            answered[name] = encoder
        return cls(fitted, answered)

    def learn(self, examples: Examples) -> None:
        """Keep what these examples say is so, for orders of entities that leave out what is known; fits nothing."""
        for encoder in self.targets.values():
            if isinstance(encoder, EntityEncoder):
                encoder.learn(examples)

    def unseen_entities(self, parts: Sequence[Examples]) -> dict[str, str]:
        """What these examples name that training never saw, by column: how many, and the first of them."""
        found: dict[str, set[str]] = {}
        for encoder in [*self.inputs.values(), *self.targets.values()]:
            if isinstance(encoder, IdsEncoder | IdSequenceEncoder | EntityEncoder):
                for part in parts:
                    for column, names in encoder.unseen(part).items():
                        found.setdefault(column, set()).update(names)
        return {
            column: f"{len(names)}: {', '.join(sorted(names)[:5])}{', ...' if len(names) > 5 else ''}"
            for column, names in found.items()
            if names
        }

    def fill(self, model: TaskModelConfig) -> TaskModelConfig:
        """The model's configuration with the stems and heads that belong to the data, keywords of routers as rules."""
        return with_keywords(model, self.inputs).replace(
            stems={name: self.inputs[name].part().to_dict() for name in self.tokens},
            heads={
                name: encoder.part_beside(self.inputs).to_dict() for name, encoder in self.targets.items()
            },
        )

    @property
    def tokens(self) -> list[str]:
        """Inputs that the backbone reads: all but bags that are there for wide maps alone."""
        return [name for name, encoder in self.inputs.items() if getattr(encoder.config, "token", True)]  # type: ignore[attr-defined]

    def encode(self, examples: Examples, *, targets: bool = True) -> EncodedExamples:
        """Arrays of examples; without `targets` the columns of the answers need not be there."""
        with located(examples):
            inputs = {name: encoder.encode(examples) for name, encoder in self.inputs.items()}
            wanted = {
                name: encoder.encode_with(examples, inputs)
                for name, encoder in (self.targets.items() if targets else ())
            }
        return EncodedExamples(inputs, wanted, examples)

    def save(self, folder: Path) -> None:
        """Write encoding.json."""
        state = {
            "inputs": {name: encoder.state() for name, encoder in self.inputs.items()},
            "targets": {name: encoder.state() for name, encoder in self.targets.items()},
        }
        write_json(folder / FILE, state)

    @classmethod
    def load(cls, folder: Path, inputs: Mapping[str, AnyInput], targets: Mapping[str, AnyTarget]) -> Encoding:
        """What `save` wrote. Errors: `CheckpointError` where it is missing or damaged."""
        try:
            state = json.loads((folder / FILE).read_text("utf-8"))
            return cls(
                {name: INPUTS[c.kind].from_state(c, state["inputs"][name]) for name, c in inputs.items()},
                {name: TARGETS[c.kind].from_state(c, state["targets"][name]) for name, c in targets.items()},  # type: ignore[misc]
            )
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(
                f"{folder / FILE} is missing or damaged: {error}. Train the run again"
            ) from None
