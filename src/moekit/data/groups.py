"""Groups of a task's examples: the classes of a target, or the values of a column."""

from __future__ import annotations

from moekit.config.errors import ConfigError, nearest, require
from moekit.config.task import ClassTarget
from moekit.config.task_run import TaskRunConfig
from moekit.data.encoding.fields import category
from moekit.data.examples import Examples

ALL = "all"
MISSING = "(none)"
# groups are kept in 16 bits
MOST = 32_000


def groups_of(
    config: TaskRunConfig, examples: Examples, by: str | None = None
) -> tuple[tuple[str, ...], list[int]]:
    """Names of groups and the number of each example's group.

    Args:
        config: of the task.
        examples: with or without answers.
        by: a column; the first target that is one class by default, and one group where there is none.

    Errors: `ConfigError` for a column that is not there.
    """
    column = by
    if by is not None and by not in examples.columns:
        raise ConfigError(
            f"by {by!r}: the examples have no such column: {nearest(by, list(examples.columns))}"
        )
    if column is None:
        classes = [
            str(one.column)
            for one in config.targets.values()
            if isinstance(one, ClassTarget) and not one.multi and str(one.column) in examples.columns
        ]
        if not classes:
            return (ALL,), [0] * len(examples)
        column = classes[0]
    values = [category(value) or MISSING for value in examples[column]]
    names = tuple(sorted(set(values)))
    require(
        0 < len(names) <= MOST, "by", column, f"must have 1 to {MOST:,} different values; got {len(names):,}"
    )
    number = {name: place for place, name in enumerate(names)}
    return names, [number[value] for value in values]
