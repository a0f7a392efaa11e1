"""moekit fit"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from moekit.cli.memory_options import PRECISIONS
from moekit.cli.output import in_units, json_option, print_json, print_result, progress_to_stderr


@click.command("fit")
@click.argument("source", metavar="MODEL")
@click.option("--memory", required=True, metavar="SIZE", help="what the model may take, such as 2GB or 800MB")
@click.option("--context", type=int, help="tokens of prompt and answer  [default: the longest]")
@click.option("--precision", type=PRECISIONS, default="auto", show_default=True,
              help="auto: the most exact in which everything stays in memory, else as stored")  # fmt: skip
@click.option("--record", type=click.Path(path_type=Path, file_okay=False), metavar="FOLDER",
              help="a routing record of similar text: adds the hit rates to be expected")  # fmt: skip
@json_option
def command(
    source: str, memory: str, context: int | None, precision: str, record: Path | None, as_json: bool
) -> None:
    """What of a model fits a memory: precision, experts that stay, experts on disk.

    MODEL is a run, a model folder, or a Hugging Face folder or name. The memory is that of weights, keys and values and
    the work of a prompt; Python and PyTorch come on top. `moekit generate MODEL --memory SIZE` runs the plan.

    \b
        moekit fit runs/moe-small-1 --memory 20MB
        moekit fit olmoe --memory 4GB --context 2048 --record routing
    """
    with progress_to_stderr(as_json):
        from moekit.observe.record import RoutingRecord
        from moekit.serve.fit_report import fit_report

        said = None if record is None else RoutingRecord.load(record)
        report = fit_report(source, memory, context=context, precision=precision, record=said)
    if as_json:
        print_json(report)
    else:
        _show(report)


def _show(report: dict[str, Any]) -> None:
    def size(n: int) -> str:
        return in_units(n, "B")

    parts = {**report["bytes"], "allowed": report["memory"], "least": report["least_bytes"]}
    rows = [[name.replace("_", " "), size(n)] for name, n in parts.items()]
    kept = f"{report['experts_in_memory']:,} of {report['experts']:,} experts"
    rows.append(["experts that stay", f"{kept} ({report['share_in_memory']:.0%})"])
    if report["program_bytes"] is not None:
        rows.append(["beside it: Python and PyTorch", size(report["program_bytes"])])
    title = f"{report['model']} in {size(report['memory'])}, experts in {report['precision']}"
    print_result({"title": title, "table": {"columns": ["part", "memory"], "rows": rows}})
    choices = [
        [one["precision"], "yes" if one["exact"] else "no", size(one["expert_bytes"]), size(one["total_bytes"]),
         "-" if one["share_in_memory"] is None else f"{one['share_in_memory']:.0%}",
         "chosen" if one["chosen"] else f"--precision {one['option']}"]
        for one in report["precisions"]
    ]  # fmt: skip
    columns = ["experts in", "exact", "all experts", "all in memory", "would stay", "how"]
    print_result({"title": "By precision", "table": {"columns": columns, "rows": choices}})
    if "expected" in report:
        rates = [
            [name.replace("_", " "), f"{rate:.1%}"] for name, rate in report["expected"]["hit_rate"].items()
        ]
        title = f"Hit rates to be expected, by {report['expected']['tokens_in_order']:,} tokens in order"
        print_result({"title": title, "table": {"columns": ["which stay", "hit rate"], "rows": rates}})
    click.echo(report["advice"])
