"""Which experts serve which values of a task's columns, in figures and in a sentence."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from moekit.config.errors import ConfigError, nearest
from moekit.config.task import ClassTarget
from moekit.config.task_run import TaskRunConfig
from moekit.data.encoding.fields import category
from moekit.data.examples import Examples
from moekit.data.task_data import columns_of
from moekit.evaluate.experts_by import experts_by
from moekit.evaluate.task import layers_of, predict
from moekit.train.run import LoadedTask

# a column of so many different texts is one that experts may divide
FEWEST, MOST = 2, 60


def experts_of_columns(
    loaded: LoadedTask, examples: Examples, by: Sequence[str] = ()
) -> list[dict[str, Any]]:
    """`moekit.evaluate.experts_by` of each column, with the layers' names and those of their experts.

    Args:
        loaded: a run; one without sparse layers has nothing to compare.
        examples: with or without answers.
        by: columns; by default classes that are asked for, and columns of few different texts that no model reads.

    Errors: `ConfigError` for a column that is not there.
    """
    if not loaded.model.moe_layers:
        return []
    shares = predict(loaded.model, loaded.encoding, examples, with_experts=True).experts
    found = []
    for column in by or columns_to_compare(loaded.config, examples):
        if column not in examples.columns:
            raise ConfigError(
                f"--by {column}: the examples have no such column: {nearest(column, list(examples.columns))}"
            )
        values = [category(value) or "(none)" for value in examples[column]]
        table = experts_by(shares, values)
        for number, (layer, known) in enumerate(zip(table["layers"], layers_of(loaded.model), strict=True)):
            task = f" of {known['task']}" if known["task"] else ""
            layer |= {"name": f"Sparse layer {number}{task}", "names": list(known["names"] or ())}
        found.append({"column": column, **table})
    return found


def columns_to_compare(config: TaskRunConfig, examples: Examples) -> list[str]:
    """Classes that are asked for, and columns of few different texts that the model does not read."""
    found = [
        str(target.column)
        for target in config.targets.values()
        if isinstance(target, ClassTarget) and not target.multi
    ]
    used = set(columns_of(config))
    for name, values in examples.columns.items():
        texts = {value for value in values if isinstance(value, str)} if name not in used else set()
        few = FEWEST <= len(texts) <= MOST and len(texts) * 5 <= len(values)
        # the same under another name says nothing new
        if few and list(values) not in [list(examples.columns[other]) for other in found]:
            found.append(name)
    return found


def in_words(tables: Iterable[Mapping[str, Any]]) -> Iterator[str]:
    """A sentence for each column: in how many layers its values have experts of their own.

    >>> layers = [{"name": "Sparse layer 0", "difference": 0.3, "chance": 0.1}]
    >>> list(in_words([{"column": "label", "layers": layers}]))
    ['Experts by label differ by more than chance in 1 of 1 sparse layers (0.300 at most; by chance up to 0.100).']
    """
    for table in tables:
        above = sum(layer["difference"] > layer["chance"] for layer in table["layers"])
        most = max(table["layers"], key=lambda layer: layer["difference"] - layer["chance"])
        yield (
            f"Experts by {table['column']} differ by more than chance in {above} of {len(table['layers'])} "
            f"sparse layers ({most['difference']:.3f} at most; by chance up to {most['chance']:.3f})."
        )
