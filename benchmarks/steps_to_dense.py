"""How many of the dense twin's steps the MoE needs for the twin's final loss, each run with its own full schedule.

python benchmarks/steps_to_dense.py --shares 0.5 0.6 0.7 0.8
"""

from __future__ import annotations

import argparse
from pathlib import Path

from common import train_and_evaluate, write_result

from moekit.data.prepare import prepare
from moekit.recipes.quickstart import base_config, model_run, quickstart_recipe


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shares", nargs="*", type=float, default=[0.5, 0.6, 0.7, 0.8])
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    recipe = quickstart_recipe()
    base = base_config(recipe, Path("runs/steps-to-dense"), seed=args.seed)
    data = prepare(base.data)
    quiet = {"validate_every": 0}
    dense_run = model_run(base, "dense", recipe)
    dense = train_and_evaluate(dense_run.replace(train=dense_run.train.replace(**quiet)), data)
    rows = [
        ["dense twin", str(dense["steps"]), f"{dense['loss']:.4f}", f"{dense['seconds']:.0f}", "1.00", "1.00"]
    ]
    for share in args.shares:
        run = model_run(base, "moe", recipe)
        train = run.train.replace(steps=round(share * base.train.steps), **quiet)
        moe = train_and_evaluate(run.replace(train=train), data)
        reached = "" if moe["loss"] <= dense["loss"] else " (not reached)"
        rows.append([
            f"MoE{reached}", str(moe["steps"]), f"{moe['loss']:.4f}", f"{moe['seconds']:.0f}",
            f"{moe['steps'] / dense['steps']:.2f}", f"{moe['seconds'] / dense['seconds']:.2f}",
        ])  # fmt: skip
        print(rows[-1], flush=True)
    write_result(
        "steps-to-dense",
        "Steps to the dense twin's loss",
        f"python benchmarks/steps_to_dense.py --shares {' '.join(map(str, args.shares))}",
        "Each row is a run of its own with its full learning-rate schedule; loss in nats per token over the whole "
        "validation set; one seed, seconds on 2 shared CPU cores.",
        ["model", "steps", "validation loss", "seconds", "share of steps", "share of seconds"],
        rows,
    )


if __name__ == "__main__":
    main()
