"""Auxiliary-loss-free balancing against the load-balance loss: docs/results/balancing.json.

python benchmarks/balancing.py --seeds 3
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from common import mean_and_deviation, train_and_evaluate, write_result

from moekit.config.moe import BalanceConfig
from moekit.data.prepare import prepare
from moekit.recipes.quickstart import base_config, model_run, quickstart_recipe

WAYS = {
    "none": {"load_balance": 0.0, "router_z": 0.001},
    "load-balance loss 0.001": {"load_balance": 0.001},
    "load-balance loss 0.01": {"load_balance": 0.01},
    "load-balance loss 0.1": {"load_balance": 0.1},
    "auxiliary-loss-free, rate 0.001": {
        "load_balance": 0.0,
        "bias_update_rate": 0.001,
        "bias_update_decay": False,
    },
    "auxiliary-loss-free, rate 0.002": {
        "load_balance": 0.0,
        "bias_update_rate": 0.002,
        "bias_update_decay": False,
    },
    "auxiliary-loss-free, decaying 0.01": {
        "load_balance": 0.0,
        "bias_update_rate": 0.01,
        "bias_update_decay": True,
    },
}


def violations(result: dict[str, Any], weights: dict[str, float]) -> list[float]:
    """Max violation of each layer with the domains in the given proportions (largest load over mean load, less one)."""
    loads = result["experts_by_domain"]
    layers = []
    for layer in loads["layers"]:
        shares = torch.tensor(layer["share"], dtype=torch.float64)
        mix = torch.tensor([weights[domain] for domain in loads["domains"]], dtype=torch.float64)
        load = (mix / mix.sum()) @ shares
        layers.append(float(load.max() / load.mean() - 1))
    return layers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=None)
    parser.add_argument("--router", default="sigmoid", help="as in the paper: sigmoid scores")
    parser.add_argument("--ways", nargs="*", default=list(WAYS))
    args = parser.parse_args()
    recipe = quickstart_recipe()
    base = base_config(recipe, Path("runs/balancing"), seed=0, steps=args.steps)
    data = prepare(base.data)
    train_tokens = {domain: size["tokens"] for domain, size in data.train.domain_sizes().items()}
    rows, raw = [], {}
    for name in args.ways:
        results: list[dict[str, Any]] = []
        for seed in range(args.seeds):
            run = model_run(base, "moe", recipe)
            moe = run.model.moe.replace(balance=BalanceConfig(**WAYS[name]), router={"name": args.router})
            train = run.train.replace(seed=seed, validate_every=0)
            results.append(
                train_and_evaluate(
                    run.replace(model=run.model.replace(moe=moe, moe_by_layer={}), train=train), data
                )
            )
            print(name, seed, results[-1]["loss"], results[-1]["balance"]["max_violation"], flush=True)
        layers = [[layer["max_violation"] for layer in r["balance"]["layers"]] for r in results]
        as_trained = [violations(r, train_tokens) for r in results]
        rows.append([
            name,
            mean_and_deviation([r["loss"] for r in results], 4),
            mean_and_deviation([r["bits_per_byte"]["mean"] for r in results], 4),
            mean_and_deviation([sum(each) / len(each) for each in as_trained], 3),
            mean_and_deviation([max(each) for each in as_trained], 3),
            mean_and_deviation([sum(each) / len(each) for each in layers], 3),
            str(max(r["balance"]["dead_experts"] for r in results)),
        ])  # fmt: skip
        raw[name] = [
            {"loss": r["loss"], "max_violation": plain, "max_violation_in_training_proportions": mixed}
            for r, plain, mixed in zip(results, layers, as_trained, strict=True)
        ]
    write_result(
        "balancing",
        "Balancing: what it costs and what it reaches",
        f"python benchmarks/balancing.py --seeds {args.seeds}"
        + (f" --steps {args.steps}" if args.steps else "")
        + (" --ways " + " ".join(f'"{way}"' for way in args.ways) if args.ways != list(WAYS) else ""),
        f"The quickstart's MoE with router {args.router}, {args.seeds} seeds. Loss in nats per token and max violation "
        "(largest load over mean load, less one) over the whole validation set. Experts specialise by domain, and the "
        "validation set holds a sixth more English than training did, so the violation is given with the domains in "
        "training's proportions and, in the last but one column, as the set is.",
        [
            "balancing",
            "validation loss",
            "bits per byte",
            "max violation, mean of layers",
            "worst layer",
            "mean of layers, set as it is",
            "dead experts",
        ],
        rows,
        raw=raw,
    )


if __name__ == "__main__":
    main()
