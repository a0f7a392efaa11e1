"""What the subjects of `moekit bench` share: options, threads, the table and the JSON."""

from __future__ import annotations

import contextlib
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import click

from moekit.cli.output import cell, in_units, json_option, print_json, progress_to_stderr

F = TypeVar("F", bound=Callable[..., Any])

# cases that people compare in tokens a second
_WITH_TOKENS = ("prefill", "decode", "training step")
_SIZES = {
    "tokens": "tokens of the batch",
    "d-model": "width of the hidden states",
    "d-expert": "inner width of an expert",
    "experts": "experts",
    "top-k": "experts of each token",
    "layers": "layers",
    "heads": "attention heads",
    "vocab-size": "token ids",
    "prompt": "tokens of the prefill",
    "new-tokens": "tokens decoded behind it",
}


def common_options(against: str, *, repeats: int, warmup: int = 2) -> Callable[[F], F]:
    """Adds what every subject has."""

    def add(function: F) -> F:
        for option in reversed(
            (
                click.option(
                    "--against", default=against, show_default=True, help="peers, with commas; or none"
                ),
                click.option("--repeats", type=int, default=repeats, show_default=True, help="timed rounds"),
                click.option(
                    "--warmup", type=int, default=warmup, show_default=True, help="rounds before them"
                ),
                click.option(
                    "--threads", type=click.IntRange(min=1), help="threads; torch's own number without it"
                ),
                click.option("--seed", type=int, default=0, show_default=True, help="of inputs and weights"),
                json_option,
            )
        ):
            function = option(function)
        return function

    return add


def sizes(*names: str) -> Callable[[F], F]:
    """Adds `--NAME` for each size; what is not given is the subject's own default."""

    def add(function: F) -> F:
        for name in reversed(names):
            function = click.option(f"--{name}", type=int, help=_SIZES[name])(function)
        return function

    return add


def numbers(name: str, default: str, help: str) -> Callable[[F], F]:
    """Adds an option that takes whole numbers with commas between them."""
    return click.option(name, default=default, show_default=True, help=f"{help}; with commas")


def typed(function: F) -> F:
    """Adds --dtype."""
    kind = click.Choice(["bf16", "float32"])
    text = "type of the arithmetic"
    return click.option("--dtype", type=kind, default="bf16", show_default=True, help=text)(function)


def words(text: str) -> list[str]:
    """The parts between the commas."""
    return [part.strip() for part in text.split(",") if part.strip()]


def read_numbers(name: str, text: str) -> list[int]:
    """The whole numbers between the commas; `ConfigError` for anything else."""
    from moekit.config.errors import require

    parts = words(text)
    require(parts and all(part.isdigit() for part in parts), name, text, "must be whole numbers with commas")
    return [int(part) for part in parts]


@dataclass
class Run:
    """What a subject is asked, and the cases that it fills in."""

    against: tuple[str, ...]
    sizes: dict[str, int]
    common: dict[str, Any]
    threads: int
    cases: list[dict[str, Any]] = field(default_factory=list)


@contextlib.contextmanager
def measured(subject: str, options: dict[str, Any]) -> Iterator[Run]:
    """Read the shared options, let the block measure with the threads asked for, then print and judge the result."""
    from moekit.evaluate.bench.peers import parse_peers

    against = parse_peers(subject, options.pop("against"))
    as_json, threads, seed = options.pop("as_json"), options.pop("threads"), options.pop("seed")
    import torch

    from moekit.evaluate.bench.compare import TimingOptions
    from moekit.evaluate.bench.result import bench_result, fail_on_refused

    timing = TimingOptions(
        options.pop("repeats"), options.pop("warmup"), say=lambda line: click.echo(line, err=True)
    )
    given = {name: value for name, value in options.items() if value is not None}
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        run = Run(against, given, {"timing": timing, "seed": seed}, torch.get_num_threads())
        with progress_to_stderr(as_json):
            yield run
        settings = {
            "against": list(against),
            "seed": seed,
            "repeats": timing.repeats,
            "warmup": timing.warmup,
        }
        result = bench_result(subject, run.cases, settings, against, _command())
    finally:
        torch.set_num_threads(before)
    if as_json:
        print_json(result)
    else:
        show(result)
    fail_on_refused(result)


def show(result: Mapping[str, Any]) -> None:
    """The result for people: a table for each case."""
    from rich.console import Console

    console = Console()
    if not console.is_terminal:
        console.width = max(console.width, 100)  # a file has no width that tables must fit
    machine = result["machine"]
    peers = [f"{name} {version}" for name, version in result["peers"].items()]
    facts = [machine["cpu"], f"{machine['threads']} threads", f"torch {machine['torch']}", *peers]
    console.print(", ".join(facts), highlight=False, markup=False)
    for case in result["cases"]:
        _show_case(console, case)


def _show_case(console: Any, case: Mapping[str, Any]) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    rows, limits = case["contestants"], case["limits"]
    columns: dict[str, Callable[[Any], str]] = {
        "contestant": lambda row: row["name"],
        "median ms": lambda row: _milliseconds(row["seconds"]["median"]),
        "quartiles": lambda row: " to ".join(
            _milliseconds(row["seconds"][name]) for name in ("first_quartile", "third_quartile")
        ),
        "x moekit": lambda row: cell(row["ratio"]),
    }
    if case["name"] in _WITH_TOKENS:
        columns["tokens/s"] = lambda row: f"{row['tokens_per_second']:,.0f}"
    # of two limits the one that was measured is the one that binds
    if limits["flops_per_second"]:
        columns["GFLOP/s"] = lambda row: f"{row['flops_per_second'] / 1e9:,.0f}"
        columns["of limit"] = lambda row: f"{row['flops_share']:.0%}"
    if limits["bytes_per_second"]:
        columns["GB/s"] = lambda row: f"{row['bytes_per_second'] / 1e9:,.1f}"
        columns["of limit"] = lambda row: f"{row['bytes_share']:.0%}"
    if any(row["peak_memory_bytes"] is not None for row in rows):
        columns["memory"] = lambda row: in_units(row["peak_memory_bytes"] or 0, "B", base=1024)
    console.print()
    console.print(f"{case['name']}: ", style="bold", end="")
    console.print(_shape(case["shape"]), highlight=False)
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for position, column in enumerate(columns):
        table.add_column(column, justify="left" if position == 0 else "right", no_wrap=True)
    for row in rows:
        table.add_row(*(text(row) for text in columns.values()))
    console.print(table)
    if limits["flops_per_second"]:
        console.print(f"limit: {limits['flops_per_second'] / 1e9:,.0f} GFLOP/s, a large matrix product")
    if limits["bytes_per_second"]:
        console.print(f"limit: {limits['bytes_per_second'] / 1e9:,.1f} GB/s, reading memory")
    if case["moekit_speedup"] is not None:
        sentence = f"moekit against the best peer, {case['best_peer']}: {case['moekit_speedup']:.2f}x as fast"
        console.print(sentence, highlight=False)
    for name, reason in case["skipped"].items():
        console.print(f"[yellow]note:[/yellow] {name}: {reason}", highlight=False)
    for name, reason in case["refused"].items():
        console.print(f"[red]refused:[/red] {name}: {reason}", highlight=False)


def _shape(shape: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in shape.items())


def _milliseconds(seconds: float) -> str:
    """Three digits.

    >>> _milliseconds(0.0123456), _milliseconds(1.5), _milliseconds(12e-6)
    ('12.3', '1,500', '0.012')
    """
    value = seconds * 1e3
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.3g}"


def _command() -> str:
    # what the shell was given, where this is the command line at all
    arguments = sys.argv[1:] if "bench" in sys.argv[1:2] else ["bench"]
    return shlex.join(["moekit", *(argument for argument in arguments if argument != "--json")])
