"""Experts that come while a model trains, and dead ones brought back: docs/results/grow-experts.json.

python benchmarks/grow_experts.py --seeds 3

The quickstart's sparse model with router softmax in every layer: 8 experts all along, 8 that become 16 at a half and at
a third of the run, and 16 from the beginning; equal text, tokens, steps and learning rate. The loss on the same
validation batches is taken right before the growth, right after it, and 1, 10 and 50 steps later.

The collapse: a learned bias of the router holds every token at the first `top_k` experts from the beginning, so strong
that the load-balance loss finds no gradient to mend it. With `revive_after` and without it, the number of experts in
use is counted at each step.

A row that is finished lies in OUT/results and is not made again.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from common import kept, mean_and_deviation, write_result

from moekit.config.train import RunConfig
from moekit.data.loader import evaluation_batches
from moekit.data.prepare import PreparedData, prepare
from moekit.evaluate.metrics import evaluate_split, mean_bits_per_byte
from moekit.evaluate.run import setting_of
from moekit.models import build_model
from moekit.models.accounting import active_parameters, total_parameters
from moekit.recipes.quickstart import base_config, model_run, quickstart_recipe
from moekit.train.loop import Metrics, Trainer
from moekit.train.material import material_of
from moekit.train.run import LoadedRun
from moekit.train.validation import loss_over

FEW, MANY = 8, 16
# experts at the beginning, and the share of the steps after which there are MANY
GROWTH: dict[str, tuple[int, float | None]] = {
    "8 experts": (FEW, None),
    "8, 16 from a half on": (FEW, 1 / 2),
    "8, 16 from a third on": (FEW, 1 / 3),
    "16 experts": (MANY, None),
}
COLLAPSES = {"collapse": None, "collapse, revived": 40}
LATER = (1, 10, 50)  # steps after a growth at which the loss is taken again
PROBED = 6  # batches of the loss around a growth
EVERY = 20
STRONG = 20.0  # bias on the logits that no row of a router overcomes
STEADY = 10  # steps in a row for which all experts must be in use to count as alive
WAYS = (*GROWTH, *COLLAPSES)


def configuration(way: str, seed: int, args: argparse.Namespace) -> RunConfig:
    """The run of one row and seed."""
    recipe = quickstart_recipe(args.short)
    run = model_run(base_config(recipe, args.out, seed=seed, steps=args.steps), "moe", recipe)
    experts: dict[str, Any] | None = None
    moe = {"router": "softmax", "n_experts": FEW}
    steps = run.train.steps
    if way in GROWTH:
        n, at = GROWTH[way]
        moe["n_experts"] = n
        if at is not None:
            moe["families"] = True
            experts = {"grow_to": MANY, "at": at, "every": EVERY}
    else:
        after = COLLAPSES[way]
        steps = min(steps, 400)
        moe |= {"router": {"name": "softmax", "options": {"logit_bias": True}}, "families": True,
                "balance": {"load_balance": 0.01, "router_z": 0.0}}  # fmt: skip
        experts = None if after is None else {"revive_after": args.revive_after or after, "every": EVERY}
    if experts is not None:
        experts["perturbation"] = args.perturbation
    fields = {**run.train.to_dict(), "steps": steps, "experts": experts}
    whole = {**run.model.moe.to_dict(), **moe}
    model = run.model.replace(moe=type(run.model.moe).from_dict(whole), moe_by_layer={})
    return run.replace(model=model, train=type(run.train).from_dict(fields))


class Probed:
    """A trainer, and the loss of its model on batches that stay the same."""

    def __init__(self, config: RunConfig, data: PreparedData) -> None:
        material = material_of(config, data, None)
        self.config, self.data = material.config, data
        torch.manual_seed(self.config.train.seed)
        self.trainer = Trainer(build_model(self.config.model), self.config.train, material.loader())
        setting = setting_of(self.loaded)
        batches = evaluation_batches(data.validation, setting.batch_size, setting.seq_len)
        self.batches = list(islice(batches, PROBED))

    @property
    def loaded(self) -> LoadedRun:
        trainer = self.trainer
        return LoadedRun(self.config, trainer.model, self.data.tokenizer, trainer.step, Path())

    def loss(self) -> float:
        return loss_over(self.trainer.model, self.batches, self.trainer.device, self.trainer.dtype).mean

    def bits_per_byte(self) -> float:
        found = evaluate_split(
            self.trainer.model, self.data.validation, self.data.tokenizer, setting_of(self.loaded)
        )
        return mean_bits_per_byte(found)

    def steps(self, before_change: Callable[[int], None] | None = None) -> Iterator[Metrics]:
        """The steps of training; `before_change` is called with each one's number before experts come or go."""
        experts = self.trainer.experts
        if experts is not None and before_change is not None:
            change = experts.after_step

            def after_step(step: int, *more: Any) -> Any:
                before_change(step)
                return change(step, *more)

            experts.after_step = after_step  # type: ignore[method-assign]
        return self.trainer.steps()


def growths(steps: int) -> list[int]:
    """The steps after which some row grows."""
    return sorted({-int(-at * steps // 1) for _, at in GROWTH.values() if at is not None})


def grown(way: str, seed: int, args: argparse.Namespace, data: PreparedData) -> dict[str, Any]:
    """Train one row, with the loss around the steps at which any row grows."""
    probed = Probed(configuration(way, seed, args), data)
    trainer, steps = probed.trainer, probed.config.train.steps
    begins = growths(steps)
    before: dict[str, float] = {}
    losses: dict[str, float] = {}

    def probe(step: int) -> None:
        if step in begins:
            before[str(step)] = probed.loss()

    said: dict[str, list[str]] = {}
    for metrics in probed.steps(probe):
        step = metrics["step"]
        if "experts" in metrics:
            said[str(step)] = metrics["experts"]
        if any(step - begin in (0, *LATER) for begin in begins):
            losses[str(step)] = probed.loss()
    (at,) = [int(step) for step in said] or [None]
    around = None
    if at is not None:
        later = {str(n): losses[str(at + n)] for n in LATER if str(at + n) in losses}
        around = {"step": at, "before": before[str(at)], "at": losses[str(at)], "later": later}
    return {
        "way": way, "seed": seed, "steps": steps, "tokens": trainer.tokens, "seconds": trainer.seconds,
        "bits_per_byte": probed.bits_per_byte(), "around": around, "losses": losses, "said": said,
        "n_experts": [layer.config.n_experts for layer in trainer.moe_layers],
        "active": active_parameters(trainer.model.config), "total": total_parameters(trainer.model.config),
    }  # fmt: skip


def collapsed(way: str, seed: int, args: argparse.Namespace, data: PreparedData) -> dict[str, Any]:
    """Train one row from a collapse on, counting the experts in use."""
    probed = Probed(configuration(way, seed, args), data)
    trainer = probed.trainer
    for layer in trainer.moe_layers:
        with torch.no_grad():
            layer.router.logit_bias[: layer.config.top_k] = STRONG
    alive = []
    for _ in probed.steps():
        alive.append([FEW - stats.dead_experts() for stats in trainer.last_stats])
    least = [min(step) for step in alive]
    return {
        "way": way, "seed": seed, "steps": len(alive), "tokens": trainer.tokens, "seconds": trainer.seconds,
        "all_alive_after": first_steady(least), "alive_at_the_end": least[-1], "alive": alive,
        "bits_per_byte": probed.bits_per_byte(),
        "experts": None if trainer.config.experts is None else trainer.config.experts.to_dict(),
    }  # fmt: skip


def first_steady(least: list[int]) -> int | None:
    """The first of STEADY steps in a row with all experts in use; None where there are none.

    >>> first_steady([2, 2] + [8] * 10), first_steady([8] * 9)
    (3, None)
    """
    for start in range(len(least) - STEADY + 1):
        if all(n == FEW for n in least[start : start + STEADY]):
            return start + 1
    return None


def row(way: str, results: list[dict[str, Any]], few: list[dict[str, Any]]) -> list[str]:
    """A line of the table."""
    bits = [result["bits_per_byte"] for result in results]
    first = results[0]
    if way in COLLAPSES:
        after = [result["all_alive_after"] for result in results]
        alive = "never" if None in after else f"after {min(after)} to {max(after)} steps"
        return [way, mean_and_deviation(bits, 4), "", "", f"{alive}, {min(r['alive_at_the_end'] for r in results)} "
                f"of {FEW} at the end", f"{min(result['seconds'] for result in results):.0f}"]  # fmt: skip
    gain = [
        result["bits_per_byte"] - other["bits_per_byte"] for result, other in zip(results, few, strict=True)
    ]
    jump = ""
    if first["around"] is not None:
        jumps = [result["around"]["at"] - result["around"]["before"] for result in results]
        jump = mean_and_deviation(jumps, 4).replace("-", "−")
    against = "" if results is few else mean_and_deviation(gain, 4).replace("-", "−")
    return [way, mean_and_deviation(bits, 4), against, jump, f"{first['total'] / 1e6:.2f} M",
            f"{min(result['seconds'] for result in results):.0f}"]  # fmt: skip


def write(found: Mapping[str, list[dict[str, Any]]], args: argparse.Namespace) -> None:
    first = found["8 experts"][0]
    revive = args.revive_after or COLLAPSES["collapse, revived"]
    options = [f"--seeds {args.seeds}", *([f"--steps {args.steps}"] if args.steps else [])]
    options += [f"--revive-after {args.revive_after}"] if args.revive_after else []
    options += [f"--perturbation {args.perturbation:g}"] if args.perturbation != 0.01 else []
    options += ["--short"] if args.short else []
    write_result(
        "grow-experts",
        "Experts that come while a model trains",
        f"python benchmarks/grow_experts.py {' '.join(options)}",
        f"Bits per byte on the validation documents (lower is better), {args.seeds} seeds, {first['tokens']:,} tokens "
        f"of the quickstart's text and {first['steps']} steps in the first four rows; {first['active'] / 1e6:.2f} M "
        "active parameters in each. Jump: the loss in nats per token right after the growth less that right before "
        f"it, on the same {PROBED} batches. Collapse: every token at the first experts from the beginning, "
        f"load-balance loss 0.01, {found['collapse'][0]['steps']} steps; "
        f"revived: `revive_after: {revive}`, a look every {EVERY} steps; all experts are in use from the named step on "
        f"(each above 1% of the mean load for {STEADY} steps).",
        ["experts", "bits per byte", "against 8 experts", "jump at the growth", "total parameters, or experts in use",
         "training seconds"],
        [row(way, results, found["8 experts"]) for way, results in found.items()],
        into=args.out if args.short else None,
        raw=found,
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=None)
    parser.add_argument("--revive-after", type=int, default=None)
    parser.add_argument(
        "--perturbation", type=float, default=0.01, help="of copies, over the router row's length"
    )
    parser.add_argument("--ways", nargs="*", default=list(WAYS), choices=WAYS, metavar="WAY",
                        help="make these rows alone, as one process of several; no file is written then")  # fmt: skip
    parser.add_argument(
        "--short", action="store_true", help="a small model and 40 steps; the result lies in OUT"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/grow-experts"))
    args = parser.parse_args()
    data = prepare(configuration(WAYS[0], 0, args).data, print)
    found: dict[str, list[dict[str, Any]]] = {way: [] for way in args.ways}
    for seed in range(args.seeds):
        for way in args.ways:
            tag = f"{args.steps or 'all'}{'-short' if args.short else ''}"
            if way in COLLAPSES and args.revive_after:
                tag += f"-{args.revive_after}"
            if args.perturbation != 0.01 and way not in ("8 experts", "16 experts", "collapse"):
                tag += f"-{args.perturbation:g}"
            make = grown if way in GROWTH else collapsed
            path = args.out / "results" / f"{WAYS.index(way)}-{seed}-{tag}.json"
            found[way].append(kept(path, partial(make, way, seed, args, data)))
    if set(found) == set(WAYS):
        write(found, args)


if __name__ == "__main__":
    main()
