"""One model for several numbers of experts per token, against a model trained for each: docs/results/elastic.json.

python benchmarks/elastic.py --seeds 3

The quickstart's sparse model with router softmax in every layer (a hash has no number to vary), 16 experts, and for
k = 2 the active parameters of its dense twin. All rows have equal text, tokens, steps, learning rate and weights to
begin with; each is measured at every k. A row that is finished lies in OUT/results and is not made again.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from common import kept, mean_and_deviation, write_result

from moekit.config.train import RunConfig
from moekit.data.prepare import PreparedData, prepare
from moekit.evaluate.metrics import evaluate_split, mean_bits_per_byte
from moekit.evaluate.run import setting_of
from moekit.layers.elastic import Elastic
from moekit.models.accounting import active_parameters, at_setting
from moekit.models.elastic import AtSetting
from moekit.recipes.quickstart import base_config, model_run, quickstart_recipe
from moekit.train.run import load_run, train_run

KS = (1, 2, 4)
LIMIT = 0.015  # of bits per byte over the model that was trained for one k
ALONE = {f"k = {k} alone": k for k in KS}
# what `train.elastic` and `train.accumulation` are in the other rows; {weights} comes from the command line
ELASTIC: dict[str, dict[str, Any]] = {
    "elastic": {},
    "elastic, weighted": {"weights": None},
    "elastic, 2 draws a step": {"accumulation": 2},
    "elastic, 4 draws a step": {"accumulation": 4},
}
WAYS = (*ALONE, *ELASTIC)


def configuration(way: str, seed: int, args: argparse.Namespace) -> RunConfig:
    """The run of one row and seed."""
    recipe = quickstart_recipe(args.short)
    run = model_run(base_config(recipe, args.out, seed=seed, steps=args.steps), "moe", recipe)
    # a weight that is normalised after the choice is 1 at k = 1, and teaches the router nothing
    router = {"name": "softmax", "options": {"normalize": args.normalize}}
    moe = run.model.moe.replace(n_experts=args.experts, top_k=ALONE.get(way, 2), router=router)
    train: dict[str, Any] = {"validate_every": 0, "log_every": 20}
    if way in ELASTIC:
        fields = dict(ELASTIC[way])
        train["accumulation"] = fields.pop("accumulation", 1)
        train["elastic"] = {"k": KS, **({"weights": args.weights} if fields else {})}
    fields = {**run.train.to_dict(), **train}
    return run.replace(
        name=f"{WAYS.index(way)}-{seed}",
        model=run.model.replace(moe=moe, moe_by_layer={}),
        train=type(run.train).from_dict(fields),
    )


def measured(way: str, seed: int, args: argparse.Namespace, data: PreparedData) -> dict[str, Any]:
    """Train one row and measure it at every k."""
    result = train_run(configuration(way, seed, args), data=data, quiet=True)
    run = load_run(result.folder)
    setting = setting_of(run)
    bits, domains = {}, {}
    for k in KS:
        found = evaluate_split(
            AtSetting(run.model, Elastic(top_k=k)), data.validation, data.tokenizer, setting
        )
        bits[str(k)] = mean_bits_per_byte(found)
        domains[str(k)] = {name: domain.bits_per_byte for name, domain in found.items()}
    active = {str(k): active_parameters(at_setting(run.config.model, Elastic(top_k=k))) for k in KS}
    return {
        "way": way, "seed": seed, "bits_per_byte": bits, "domains": domains, "active_parameters": active,
        "tokens": result.final["tokens"], "seconds": result.final["train_seconds"],
        "max_violation": result.final.get("validation_max_violation"),
    }  # fmt: skip


def row_name(way: str, seed: int, args: argparse.Namespace) -> str:
    """With everything that the row depends on, so that other options make other rows."""
    parts = [args.experts, args.normalize, args.steps or "all", *(["short"] if args.short else [])]
    if way == "elastic, weighted":
        parts += [f"{weight:g}" for weight in args.weights]
    return f"{WAYS.index(way)}-{seed}-{'-'.join(map(str, parts))}.json"


def gaps(
    results: Sequence[Mapping[str, Any]], alone: Mapping[int, Sequence[Mapping[str, Any]]], k: int
) -> list[float]:
    """By how much a row is over the model trained for k alone, seed by seed."""
    return [
        result["bits_per_byte"][str(k)] / other["bits_per_byte"][str(k)] - 1
        for result, other in zip(results, alone[k], strict=True)
    ]


def cell(results: Sequence[Mapping[str, Any]], alone: Mapping[int, Any], k: int, is_alone: bool) -> str:
    text = mean_and_deviation([result["bits_per_byte"][str(k)] for result in results], 4)
    if is_alone:
        return text
    over = gaps(results, alone, k)
    return f"{text} ({sum(over) / len(over):+.1%})".replace("-", "−")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=None)
    parser.add_argument("--experts", type=int, default=16)
    parser.add_argument(
        "--weights", type=lambda text: [float(part) for part in text.split(",")], default=[1, 1, 2]
    )
    parser.add_argument("--normalize", choices=["before", "after"], default="before")
    parser.add_argument("--ways", nargs="*", default=list(WAYS), choices=WAYS, metavar="WAY",
                        help="make these rows alone, as one process of several; no file is written then")  # fmt: skip
    parser.add_argument(
        "--short", action="store_true", help="a small model and 40 steps; the result lies in OUT"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/elastic"))
    args = parser.parse_args()
    data = prepare(configuration(WAYS[0], 0, args).data, print)
    found: dict[str, list[dict[str, Any]]] = {way: [] for way in args.ways}
    for seed in range(args.seeds):
        for way in args.ways:
            path = args.out / "results" / row_name(way, seed, args)
            found[way].append(kept(path, partial(measured, way, seed, args, data)))
    if set(found) != set(WAYS):
        return
    write(found, args)


def write(found: Mapping[str, list[dict[str, Any]]], args: argparse.Namespace) -> None:
    """The table, and whether the aim was met."""
    alone = {k: found[way] for way, k in ALONE.items()}
    rows, worst = [], {}
    for way, results in found.items():
        rows.append([
            way,
            *(cell(results, alone, k, way in ALONE) for k in KS),
            mean_and_deviation([result["max_violation"] for result in results], 2),
            f"{min(result['seconds'] for result in results):.0f}",
        ])  # fmt: skip
        if way in ELASTIC:
            by_k = {k: sum(gaps(results, alone, k)) / len(results) for k in KS}
            worst[way] = {"gap_by_k": by_k, "worst": max(by_k.values()), "met": max(by_k.values()) <= LIMIT}
    first = found[WAYS[0]][0]
    options = [f"--seeds {args.seeds}", *([f"--steps {args.steps}"] if args.steps else [])]
    options += [f"--experts {args.experts}"] if args.experts != 16 else []
    options += [f"--normalize {args.normalize}"] if args.normalize != "before" else []
    options += [f"--weights {','.join(f'{w:g}' for w in args.weights)}"]
    options += ["--short"] if args.short else []
    met = ", ".join(f"{way}: {part['worst']:+.1%}" for way, part in worst.items()).replace("-", "−")
    write_result(
        "elastic",
        "One elastic model against a model for each number of experts",
        f"python benchmarks/elastic.py {' '.join(options)}",
        "Bits per byte on the validation documents, mean of the domains (lower is better), over "
        f"{args.seeds} seeds, of every model at k = 1, 2 and 4 experts per token; in brackets the difference to the "
        f"model that was trained for that k alone. Each has seen {first['tokens']:,} tokens, the same ones. Weighted: "
        f"k drawn {':'.join(f'{w:g}' for w in args.weights)}. 2 and 4 draws a step: k drawn for each of so many "
        f"micro-batches of the step. The aim is at most {LIMIT:.1%} at each k; the largest difference of each: {met}.",
        ["model", *(f"k = {k}" for k in KS), "max violation", "training seconds"],
        rows,
        into=args.out if args.short else None,
        aim={"limit": LIMIT, "by_row": worst},
        active_parameters=first["active_parameters"],
        raw=found,
    )


if __name__ == "__main__":
    main()
