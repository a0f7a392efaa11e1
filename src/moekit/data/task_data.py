"""From a configuration to the examples of a task, in three splits."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from moekit.config.errors import ConfigError, require
from moekit.config.task import ProfileInput
from moekit.config.task_run import TaskDataConfig, TaskRunConfig
from moekit.data.documents import SourceInfo
from moekit.data.examples import Examples, TaskData, split_examples
from moekit.data.reshape import reshaped_after_split, reshaped_before_split
from moekit.data.tables import read_examples
from moekit.data.task_sources.base import Fetcher, load_source

# the fields of inputs and targets that name columns
FIELDS_OF_COLUMNS = (
    "column",
    "label_column",
    "columns",
    "numbers",
    "categories",
    "advantage",
    "start",
    "end",
    "lists",
    "by",
    "of",
)


def columns_of(config: TaskRunConfig) -> list[str]:
    """Every column that inputs and targets name, in order, and those that training alone reads."""
    more = [part.value for part in config.inputs.values() if isinstance(part, ProfileInput) and part.value]
    return list(dict.fromkeys([*_columns([*config.inputs.values(), *config.targets.values()]), *more]))


def _columns(parts: Sequence[Any]) -> list[str]:
    found: dict[str, None] = {}
    for part in parts:
        for name in FIELDS_OF_COLUMNS:
            value = getattr(part, name, None) or ()
            found.update(dict.fromkeys([value] if isinstance(value, str) else value))
    return list(found)


def columns_of_inputs(config: TaskRunConfig) -> list[str]:
    """Every column that inputs name, in order."""
    return _columns(list(config.inputs.values()))


def load_task_data(config: TaskRunConfig, progress: Callable[[str], None] | None = None) -> TaskData:
    """The examples that a configuration names, split.

    Where the source gives a test split, it stays; validation is then a share of the training examples. Classes have
    about the same shares in all splits.

    Errors: as sources and files raise them.
    """
    data, wanted = config.data, columns_of(config)
    given = wanted
    if data.reshape is not None:
        given = [name for name in wanted if name not in data.reshape.makes]
        given = list(dict.fromkeys([*given, *data.reshape.needs]))
    report = progress if progress is not None else (lambda message: None)
    require(data.source is not None or data.path is not None, "data.source", None, "must be given",
            "Or set data.path to your own file")  # fmt: skip
    if data.path is not None:
        found = _own(data, given)
    else:
        assert data.source is not None
        found = load_source(data.source, data.options, Fetcher(data.offline, report))
    found = reshaped_before_split(found, data.reshape)
    by = _class_column(config)
    train, validation, test = found.train, found.validation, found.test
    if len(test) == 0:
        require(
            data.test_share > 0, "data.test_share", data.test_share, "must be above 0 where no test is given"
        )
        share = data.test_share
        train, test = split_examples(train, [share], data.split_seed, by)
    if len(validation) == 0 and data.validation_share > 0:
        train, validation = split_examples(train, [data.validation_share], data.split_seed + 1, by)
    parts = [_at_most(part, data.max_examples, data.split_seed) for part in (train, validation, test)]
    found = replace(found, train=parts[0], validation=parts[1], test=parts[2])
    found = reshaped_after_split(found, data.reshape)
    for name in wanted:
        found.train[name]  # an unknown column is an error now
    return found


def _own(data: TaskDataConfig, wanted: Sequence[str]) -> TaskData:
    assert data.path is not None
    train = read_examples(data.path, data.columns, wanted)
    empty = train.rows([])
    validation = (
        empty if data.validation_path is None else read_examples(data.validation_path, data.columns, wanted)
    )
    test = empty if data.test_path is None else read_examples(data.test_path, data.columns, wanted)
    info = SourceInfo(
        Path(data.path).name, f"{len(train)} examples of {data.path}", "yours", _sha256(data.path)
    )
    return TaskData(train, validation, test, [info], given_test=data.test_path is not None)


def _sha256(path: str) -> str | None:
    file = Path(path).expanduser()
    return hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else None


def _class_column(config: TaskRunConfig) -> str | None:
    """The column whose values every split should have in equal shares: that of a single target of one class."""
    for target in config.targets.values():
        if target.kind == "class" and not target.multi:
            return target.column
    return None


def _at_most(part: Examples, most: int | None, seed: int) -> Examples:
    if most is None or len(part) <= most:
        return part
    import numpy as np

    return part.rows(np.sort(np.random.Generator(np.random.PCG64([seed, 9])).permutation(len(part))[:most]))


def require_source_or_path(data: TaskDataConfig) -> None:
    """Raise `ConfigError` where a configuration names two origins of examples."""
    if data.source is not None and data.path is not None:
        raise ConfigError(
            "data.source and data.path cannot both be given. Set data.source=null for your own file"
        )
