"""Options that set a model's routing for one call: experts per token, a budget, or a latency target."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from moekit.config.errors import ConfigError

if TYPE_CHECKING:
    from torch import nn

    from moekit.layers.elastic import Elastic
    from moekit.serve.controller import LatencyController, Option

F = TypeVar("F", bound=Callable[..., Any])


def numbers(context: click.Context, parameter: click.Parameter, text: str | None) -> tuple[int, ...]:
    """Different whole numbers above 0 between commas."""
    if text is None:
        return ()
    try:
        found = tuple(int(part) for part in text.split(","))
    except ValueError:
        raise click.BadParameter(f"{text!r} must be numbers between commas, such as 1,2,4") from None
    if min(found) < 1 or len(set(found)) < len(found):
        raise click.BadParameter(f"{text!r} must hold different numbers of at least 1")
    return found


def settings_of(ks: Sequence[int]) -> list[Elastic]:
    """A setting for each number of experts per token."""
    from moekit.layers.elastic import Elastic

    return [Elastic(top_k=k) for k in ks]


def print_settings(rows: Sequence[Mapping[str, Any]]) -> None:
    """The table of `moekit evaluate --k` for people."""
    from moekit.cli.output import in_units, print_result

    columns = ["setting", "bits per byte", "over the best", "active parameters", "FLOPs/token", "tokens/s"]
    lines = [
        [row["setting"], f"{row['bits_per_byte']:.4f}", f"{row['change']:+.2%}", in_units(row["active_parameters"]),
         in_units(row["flops_per_token"]), f"{row['tokens_per_second']:,.0f}"]
        for row in rows
    ]  # fmt: skip
    print_result({"title": "By routing setting", "table": {"columns": columns, "rows": lines}})


def routing_options(function: F) -> F:
    """Adds the options that `routing_of` reads."""
    for option in reversed((
        click.option("--top-k-experts", type=click.IntRange(min=1), help="experts per token, of a sparse model"),
        click.option("--top-p-experts", type=float, help="the fewest experts whose probabilities reach this together"),
        click.option("--first-experts", type=click.IntRange(min=1), help="choose among the first so many experts only"),
        click.option("--flops", type=float, help="experts per token: as many as keep a token within these FLOPs"),
        click.option("--latency-ms", type=float, help="experts per token: as many as keep 95% of tokens within this"),
        click.option("--table", type=click.Path(path_type=Path), metavar="JSON",
                     help="what `moekit evaluate --k 1,2,4 --json` printed: what --latency-ms may choose from"),
    )):  # fmt: skip
        function = option(function)
    return function


def routing_of(model: nn.Module, given: dict[str, Any]) -> tuple[Elastic | None, LatencyController | None]:
    """The setting of a call, or the controller that chooses it, from what `routing_options` was given.

    Errors: `ConfigError` where the options contradict each other or the model cannot follow them.
    """
    from moekit.config.model import ModelConfig
    from moekit.layers.elastic import Elastic
    from moekit.models.accounting import at_setting, flops_per_token, within_budget
    from moekit.models.elastic import require_elastic_model
    from moekit.serve.controller import LatencyController, Option

    flops, latency, table = given["flops"], given["latency_ms"], given["table"]
    fixed = Elastic(given["top_k_experts"], given["first_experts"], given["top_p_experts"])
    if sum((bool(fixed), flops is not None, latency is not None)) > 1:
        raise ConfigError(
            "--flops, --latency-ms and the numbers of experts exclude each other: the first two choose --top-k-experts"
        )
    if table is not None and latency is None:
        raise ConfigError("--table is what --latency-ms chooses from. Add --latency-ms, or leave --table out")
    if flops is None and latency is None:
        require_elastic_model(model, fixed)
        return fixed or None, None
    config = getattr(model, "config", None)
    if not isinstance(config, ModelConfig) or config.moe is None:
        raise ConfigError(
            "--flops and --latency-ms choose the experts per token of a sparse decoder; this model is none"
        )
    choices = settings_of(range(1, config.moe.top_k + 1))
    for choice in choices:
        require_elastic_model(model, choice)
    if flops is not None:
        return within_budget(config, choices, flops=flops), None
    if table is not None:
        options = _options_in(table)
    else:
        options = [Option(choice, flops_per_token(at_setting(config, choice))) for choice in choices]
    for option in options:
        require_elastic_model(model, option.elastic)  # a controller may come to each of them
    return None, LatencyController(options, latency / 1000)


def _options_in(table: Path) -> list[Option]:
    from moekit.serve.controller import options_of_table

    try:
        answer = json.loads(table.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{table} cannot be read as JSON: {error}") from error
    if not isinstance(answer, dict) or not answer.get("by_setting"):
        raise ConfigError(f"{table} has no table by_setting. Make it: moekit evaluate MODEL --k 1,2,4 --json")
    try:
        return options_of_table(answer["by_setting"])
    except ConfigError as error:
        raise ConfigError(f"{table}: {error}") from None
