"""The quickstart with several seeds: docs/results/quickstart.json, and the picture of the README from the first seed.

python benchmarks/quickstart_seeds.py --seeds 3
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from common import RESULTS, mean_and_deviation, write_result

from moekit.evaluate.page import summary_figure
from moekit.recipes.quickstart import MODELS, run_quickstart

NAMES = {"dense": "dense twin", "transformer_xl": "Transformer-XL", "moe": "**MoE**"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("runs/quickstart-seeds"))
    args = parser.parse_args()
    reports = [_report(args.out / f"seed-{seed}", seed) for seed in range(args.seeds)]
    first = reports[0]
    settings = first["settings"]
    domains = first["corpus"]["domains"]
    rows = []
    for name in MODELS:
        models = [report["models"][name] for report in reports]
        rows.append([
            NAMES[name],
            *(mean_and_deviation([m["bits_per_byte"][key] for m in models], 3) for key in ("mean", *domains)),
            f"{models[0]['active_parameters'] / 1e6:.2f} M",
            f"{models[0]['total_parameters'] / 1e6:.2f} M",
            f"{models[0]['train_tokens_per_second']:,.0f}",
            f"{models[0]['inference_tokens_per_second']:,.0f}",
        ])  # fmt: skip
    shares = [report["to_dense_loss"] for report in reports]
    write_result(
        "quickstart",
        "Quickstart: equal active parameters, equal tokens",
        f"python benchmarks/quickstart_seeds.py --seeds {args.seeds}",
        f"Bits per byte on the validation documents (lower is better), mean ± deviation over {args.seeds} seeds; "
        f"{settings['steps']} steps of {settings['batch_size'] * settings['seq_len']:,} tokens "
        "for each model, each with its own tuned learning rate; tokens per second are medians of "
        "the first seed on 2 shared CPU cores. The MoE reached the dense twin's final loss after "
        f"{_range(shares, 'steps_share')} of its steps and {_range(shares, 'seconds_share')} of its seconds.",
        ["model", "mean", *domains, "active", "total", "training tokens/s", "inference tokens/s"],
        rows,
        to_dense_loss=shares,
        balance=[report["balance"]["max_violation"] for report in reports],
        bits_per_byte={name: [r["models"][name]["bits_per_byte"] for r in reports] for name in MODELS},
        gap={name: [r["models"][name]["gap"] for r in reports] for name in MODELS},
        seconds={name: [r["models"][name]["train_seconds"] for r in reports] for name in MODELS},
        machine=first["machine"],
    )
    (RESULTS.parent / "images").mkdir(exist_ok=True)
    (RESULTS.parent / "images" / "quickstart.svg").write_text(summary_figure(first), "utf-8")


def _range(shares: list[dict[str, float | None]], key: str) -> str:
    """The shares of all seeds as "84% to 87%"; says so where a seed never got there."""
    values = [share[key] for share in shares]
    if None in values:
        return "(in some seeds never) more than 100%"
    return f"{min(values):.0%} to {max(values):.0%}"


def _report(out: Path, seed: int) -> dict[str, Any]:
    """The report of a seed; one that lies there already, from an interrupted benchmark, is taken as it is."""
    if (out / "report.json").exists():
        return json.loads((out / "report.json").read_text("utf-8"))
    return run_quickstart(out=out, seed=seed, quiet=True)


if __name__ == "__main__":
    main()
