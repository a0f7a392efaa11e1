"""moekit plan"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from moekit.cli.output import duration, in_units, json_option, overrides_argument, print_json


@click.command("plan")
@click.argument("config", type=click.Path(path_type=Path))
@overrides_argument
@json_option
def command(config: Path, overrides: tuple[str, ...], as_json: bool) -> None:
    """Parameters, memory, FLOPs and time of a run, before anything runs.

    CONFIG is a YAML file; KEY=VALUE changes single keys of it. Sizes and FLOPs are computed from the
    configuration; activations and time come from a few passes of the model on this machine.
    """
    from moekit.config.loading import load_run_config

    run_config = load_run_config(config, overrides)
    from moekit.evaluate.plan import plan_run

    plan = plan_run(run_config)
    if as_json:
        print_json(plan)
    else:
        _show(plan)


def _show(plan: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    parameters, flops, memory, time = plan["parameters"], plan["flops"], plan["memory_bytes"], plan["time"]
    table = Table(title=f"Plan of {plan['name']}", title_justify="left", show_header=False)
    table.add_row("parameters, total", in_units(parameters["total"]), "stored")
    table.add_row(
        "parameters, active", in_units(parameters["active"]), f"{parameters['active_share']:.0%} of them"
    )
    table.add_row(
        "tokens", in_units(plan["tokens"]), f"{plan['steps']:,} steps of {plan['tokens_per_step']:,}"
    )
    table.add_section()
    for name, words in plan["memory_notes"].items():
        table.add_row(f"memory, {name}", in_units(memory[name], "B", base=1024), words)
    table.add_section()
    table.add_row("FLOPs, a token", in_units(flops["per_token"], "FLOP"), "forward and backward")
    table.add_row("FLOPs, the run", in_units(flops["run"], "FLOP"), "")
    speed = in_units(time["flops_per_second"], "FLOP/s")
    table.add_row(
        "time, the run",
        f"about {duration(time['seconds'])}",
        f"at {speed} on {time['device']}, {time['precision']}",
    )
    rate = f"{time['tokens_per_second']:,.0f} tokens/s"
    table.add_row("time, a step", f"about {duration(time['seconds_per_step'])}", rate)
    console = Console()
    console.print(table)
    for warning in plan["warnings"]:
        console.print(f"[yellow]note:[/yellow] {warning}")
