"""Options that open a model within a memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from moekit.config.errors import ConfigError

if TYPE_CHECKING:
    from moekit.convert.formats.opening import OpenedModel
    from moekit.serve.fitting import FittedModel

F = TypeVar("F", bound=Callable[..., Any])
PRECISIONS = click.Choice(["stored", "auto", "float32", "bfloat16", "int8", "int4"])


def memory_options(function: F) -> F:
    """Adds the options that `opened_within` reads."""
    for option in reversed((
        click.option("--memory", metavar="SIZE", help="keep within this, such as 2GB: what does not fit stays on disk"),
        click.option("--precision", type=PRECISIONS, default="stored", show_default=True,
                     help="with --memory: auto takes the most exact in which everything stays in memory"),
        click.option("--policy", type=click.Choice(["aged", "lru"]), default="aged", show_default=True,
                     help="with --memory: which expert leaves, the least used or the least recent one"),
        click.option("--read-ahead", type=click.Choice(["auto", "on", "off"]), default="auto", show_default=True,
                     help="with --memory: read what the next layer will probably need; auto: if the disk is slow"),
        click.option("--routing", type=click.Path(path_type=Path, file_okay=False), metavar="RECORD",
                     help="with --memory: read the experts first that this routing record used most"),
    )):  # fmt: skip
        function = option(function)
    return function


@contextmanager
def opened_within(
    source: str, given: dict[str, Any], context: int | None
) -> Iterator[tuple[OpenedModel, FittedModel | None]]:
    """The model, and how it fits where a memory was given; what belongs to these options is taken out of `given`."""
    names = ("memory", "precision", "policy", "read_ahead", "routing")
    memory, precision, policy, read_ahead, routing = (given.pop(name) for name in names)
    if memory is None:
        if routing is not None or precision != "stored":
            raise ConfigError("--routing and --precision go with --memory. Add --memory, or leave them out")
        from moekit.convert.formats.opening import open_model

        yield open_model(source), None
        return
    from moekit.observe.record import RoutingRecord
    from moekit.serve.fitting import fit_to_memory

    ahead = {"auto": None, "on": True, "off": False}[read_ahead]
    record = None if routing is None else RoutingRecord.load(routing)
    with fit_to_memory(
        source, memory, context=context, precision=precision, policy=policy, read_ahead=ahead,
        record=record,
    ) as fitted:  # fmt: skip
        yield fitted.opened, fitted


def in_words(fitted: FittedModel) -> str:
    """One line for people: what is in memory, and what was read."""
    from moekit.cli.output import in_units

    plan = fitted.plan
    words = f"{in_units(plan.total_bytes, 'B')} of memory, experts in {plan.precision}"
    if fitted.store is None:
        return f"{words}, all of them in memory"
    counts = fitted.store.counts
    return (
        f"{words}, {plan.share_in_memory:.0%} of their bytes in memory; {counts.hit_rate:.1%} of "
        f"{counts.needed:,} were there when needed, {in_units(counts.bytes_read, 'B')} read"
    )
