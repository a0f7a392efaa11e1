"""Auxiliary-loss-free balancing against the load-balance loss: docs/results/balancing.json.

python benchmarks/balancing.py --seeds 3 --jobs 2

The quickstart's MoE with a learned router in every layer, on the quickstart's text. Two fifths of the documents are
kept for validation, because the max violation of a small set measures the set: experts specialise, a document goes
to a few of them, and which documents a set happens to hold moves the loads. The last column says by how much.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
from common import mean_and_deviation, write_result

from moekit.config.moe import BalanceConfig
from moekit.config.train import RunConfig
from moekit.data.loader import evaluation_batches
from moekit.data.prepare import PreparedData, prepare
from moekit.evaluate.run import setting_of
from moekit.recipes.quickstart import base_config, model_run, quickstart_recipe
from moekit.train.device import autocast
from moekit.train.run import LoadedRun, load_run, train_run

VALIDATION_SHARE = 0.4
RESAMPLES = 100
LOSS_FREE = {"load_balance": 0.0, "bias_update": "proportional"}
WAYS: dict[str, dict[str, Any]] = {
    "none": {"load_balance": 0.0},
    "load-balance loss 0.001": {"load_balance": 0.001},
    "load-balance loss 0.01": {"load_balance": 0.01},
    "load-balance loss 0.1": {"load_balance": 0.1},
    "loss-free, sign, constant 0.001": {
        "load_balance": 0.0,
        "bias_update_rate": 0.001,
        "bias_update_decay": False,
    },
    "loss-free, proportional, decaying 0.01": {**LOSS_FREE, "bias_update_rate": 0.01},
    "loss-free, proportional, decaying 0.02": {**LOSS_FREE, "bias_update_rate": 0.02},
}
COLUMNS = [
    "balancing",
    "validation loss",
    "max violation, mean of layers",
    "worst layer",
    "of it from sampling documents",
    "dead experts",
]


def configuration(way: str, router: str, seed: int, steps: int | None) -> RunConfig:
    """The run of one row and seed."""
    recipe = quickstart_recipe()
    base = base_config(recipe, Path("runs/balancing"), seed=seed, steps=steps)
    # nothing carries over from batch to batch here, so sequences may come in random order
    base = base.replace(data=base.data.replace(validation_share=VALIDATION_SHARE, order="shuffled"))
    run = model_run(base, "moe", recipe)
    moe = run.model.moe.replace(balance=BalanceConfig(**WAYS[way]), router={"name": router})
    model = run.model.replace(moe=moe, moe_by_layer={})
    name = f"{list(WAYS).index(way)}-{router}-{seed}"
    return run.replace(name=name, model=model, train=run.train.replace(seed=seed, validate_every=0))


def measured(job: tuple[str, str, int, int | None, int]) -> dict[str, Any]:
    """Train and evaluate one row and seed; runs in a process of its own."""
    way, router, seed, steps, threads = job
    torch.set_num_threads(threads)
    config = configuration(way, router, seed, steps)
    data = prepare(config.data)
    run = load_run(train_run(config, data=data, quiet=True).folder)
    loss, loads = loss_and_loads(run, data)
    result = {
        "loss": loss,
        "max_violation": violation(loads.sum(axis=0)).tolist(),
        "from_sampling": from_sampling(loads).tolist(),
        "dead_experts": int((loads.sum(axis=0) == 0).sum()),
    }
    print(way, seed, result, flush=True)
    return result


def violation(load: np.ndarray) -> np.ndarray:
    """Largest load over mean load, less one; `[..., E]` to `[...]`."""
    return load.max(axis=-1) / load.mean(axis=-1) - 1


@torch.no_grad()
def loss_and_loads(run: LoadedRun, data: PreparedData) -> tuple[float, np.ndarray]:
    """Mean loss over the validation set, and how often each document chose each expert `[documents, layers, E]`."""
    setting, layers = setting_of(run), run.model.moe_layers
    run.model.eval()
    n_experts = layers[0].router.n_experts
    nats, n_targets, n_documents = 0.0, 0, 0
    counts = np.zeros((data.validation.n_documents, len(layers), n_experts))
    for domain in data.validation.domains:
        first = n_documents  # segments count from 0 in each domain
        for batch in evaluation_batches(data.validation, setting.batch_size, setting.seq_len, domain=domain):
            ids, targets, segments = (
                part.to(setting.device) for part in (batch.token_ids, batch.targets, batch.segment_ids)
            )
            with autocast(setting.device, setting.dtype):
                out = run.model(ids, targets=targets, segment_ids=segments, return_logits=False)
            nats, n_targets = nats + float(out.loss) * int(out.n_targets), n_targets + int(out.n_targets)
            document = segments.flatten()
            n_documents = max(n_documents, first + int(document.max()) + 1)
            for layer, plan in enumerate(out.routing):
                of_row = document[plan.token_index]
                cell = (first + of_row) * n_experts + plan.expert_of_row()
                found = torch.bincount(cell[of_row >= 0], minlength=len(counts) * n_experts)
                counts[:, layer] += found.view(-1, n_experts).cpu().numpy()
    return nats / n_targets, counts


def from_sampling(loads: np.ndarray) -> np.ndarray:
    """Max violation that sampling documents alone would show if the experts were loaded evenly `[layers]`.

    Documents are drawn anew from the set itself (a bootstrap); what the loads then differ from those of the set
    is the noise of a set of this size, whatever its balance.
    """
    rng = np.random.default_rng(0)
    share = _relative(loads.sum(axis=0))
    drawn = (rng.integers(0, len(loads), len(loads)) for _ in range(RESAMPLES))
    return np.mean([(_relative(loads[rows].sum(axis=0)) - share).max(axis=-1) for rows in drawn], axis=0)


def _relative(load: np.ndarray) -> np.ndarray:
    return load / load.mean(axis=-1, keepdims=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=None)
    parser.add_argument("--router", default="softmax")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, which share the cores")
    parser.add_argument("--ways", nargs="*", default=list(WAYS), choices=list(WAYS), metavar="WAY")
    args = parser.parse_args()
    prepare(
        configuration(args.ways[0], args.router, 0, args.steps).data
    )  # once, before the processes need it
    threads = max(1, (os.cpu_count() or 1) // args.jobs)
    jobs = [(way, args.router, seed, args.steps, threads) for seed in range(args.seeds) for way in args.ways]
    with ProcessPoolExecutor(args.jobs, multiprocessing.get_context("spawn")) as pool:
        results = dict(zip(jobs, pool.map(measured, jobs), strict=True))
    rows, raw = [], {}
    for way in args.ways:
        found = [result for job, result in results.items() if job[0] == way]
        raw[way] = found
        rows.append([
            way,
            mean_and_deviation([r["loss"] for r in found], 4),
            mean_and_deviation([fmean(r["max_violation"]) for r in found], 3),
            mean_and_deviation([max(r["max_violation"]) for r in found], 3),
            mean_and_deviation([fmean(r["from_sampling"]) for r in found], 3),
            str(max(r["dead_experts"] for r in found)),
        ])  # fmt: skip
    options = [f"--seeds {args.seeds}", f"--jobs {args.jobs}"]
    options += [f"--steps {args.steps}"] if args.steps else []
    options += [f"--router {args.router}"] if args.router != "softmax" else []
    options += [" ".join(["--ways", *(f'"{way}"' for way in args.ways)])] if args.ways != list(WAYS) else []
    write_result(
        "balancing",
        "Balancing: what it costs and what it reaches",
        f"python benchmarks/balancing.py {' '.join(options)}",
        f"The quickstart's MoE with router {args.router} in every layer, {args.seeds} seeds; z-loss 0.001 in all "
        "rows. Two fifths of the documents are validation. Loss in nats per token; max violation is the largest load "
        "over the mean load, less one, over the whole validation set. From sampling: what a perfectly even model would "
        "show on a set of so many documents, by bootstrap over documents.",
        COLUMNS,
        rows,
        raw=raw,
    )


if __name__ == "__main__":
    main()
