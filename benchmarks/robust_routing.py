"""Digits under attack, a sparse model and its dense twin, trained against it or not: docs/results/robust-routing.json.

python benchmarks/robust_routing.py --seeds 3

Attacks are those of Madry et al. 2018 on MNIST: PGD of 40 steps of 0.01 from a random start, epsilon 0.3 in l-infinity,
and 0.1 beside it. Every row is a file in --out and made once; so the command may be stopped and given again, and
--minutes starts no row after so long. `--variant small` takes the digits of 8 x 8 pixels. With foolbox installed
(pip install foolbox), the same attack by that library stands beside moekit's in the rows of checks.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from common import mean_and_deviation, write_result
from torch import Tensor, nn

from moekit.config.adversarial import AttackConfig
from moekit.config.task_run import TaskRunConfig
from moekit.data.task_data import load_task_data
from moekit.data.task_loader import TaskBatch, task_batches
from moekit.evaluate.robustness import gradient_checks, measure_attack
from moekit.models.accounting import active_parameters, total_parameters
from moekit.recipes.rows import Row, kept_row
from moekit.recipes.running import dense_run
from moekit.recipes.tasks import load_recipe
from moekit.train.attack import continuous_inputs
from moekit.train.material import TaskMaterial
from moekit.train.run import load_task_run, train_run

EPSILONS = (0.1, 0.3)
STEPS, STEP_SIZE = 40, 0.01
# against which the models of "adversarial" learn: fewer and longer steps than they are measured by
TRAINING = {"epsilon": 0.3, "steps": 5, "step_size": 0.1, "weight": 0.5}
PLAIN, DENSE_PLAIN = "MoE", "dense twin"
KINDS: dict[str, dict[str, Any] | None] = {
    PLAIN: None,
    DENSE_PLAIN: None,
    "MoE, adversarial": {},
    "dense twin, adversarial": {},
    "MoE, adversarial for the routers alone": {"target": "router"},
    "MoE, adversarial and stability": {"stability": 1.0},
    "MoE, adversarial by turns (AdvMoE)": {"target": "alternate"},
}
CHECKED = (PLAIN, "MoE, adversarial")


class Experiment:
    """The rows of one variant of the recipe."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.out = options, Path(options.out)
        recipe = load_recipe("digits")
        overrides = [f"epochs={options.epochs}", "train.batch_size=64", "train.validate_every=0"]
        self.config: TaskRunConfig = recipe.config(options.variant, short=False, overrides=overrides).replace(
            runs_dir=str(self.out / "runs")
        )
        self.data = load_task_data(self.config, print)
        self.material = TaskMaterial.of(self.config, self.data)
        self.dense = dense_run(self.config, recipe, self.material)
        self.folders: dict[tuple[str, int], str] = {}

    def run_of(self, kind: str, seed: int) -> TaskRunConfig:
        """The configuration of a row's run."""
        run, more = self.dense if kind.startswith(DENSE_PLAIN) else self.config, KINDS[kind]
        train = run.train.replace(seed=seed)
        if more is not None:
            # attacks grow over the first third: at their full size from the start nothing is learnt
            ramp = self.material.config.train.steps // 3
            train = train.replace(adversarial={**TRAINING, "ramp_steps": ramp, **more})
        name = kind.replace(" ", "-").replace(",", "").replace("(", "").replace(")", "").lower()
        return run.replace(name=f"{name}-{seed}", train=train)

    def row(self, kind: str, seed: int) -> Row:
        """A model trained, and measured at both sizes; its routes attacked as well."""
        run = self.run_of(kind, seed)

        def make() -> Row:
            began = time.process_time()
            trained = train_run(run, data=self.data, quiet=True)
            seconds, steps = time.process_time() - began, trained.final["step"]
            model, batches, continuous = self.tested(str(trained.folder), self.options.examples)
            found: Row = {
                "folder": str(trained.folder), "train_processor_seconds": seconds, "steps": steps,
                "active": active_parameters(run.model if kind.startswith(DENSE_PLAIN) else self.material.config.model),
                "total": total_parameters(run.model if kind.startswith(DENSE_PLAIN) else self.material.config.model),
            }  # fmt: skip
            for epsilon in EPSILONS:
                found[f"at {epsilon}"] = measure_attack(
                    model, batches, attack(epsilon), continuous=continuous, seed=seed
                )
            if not kind.startswith(DENSE_PLAIN):
                found["routing attacked"] = measure_attack(
                    model, batches, attack(EPSILONS[0]).replace(objective="routing"), continuous=continuous, seed=seed
                )["routes"]  # fmt: skip
            return found

        row = kept_row(self.path(kind, seed), self.depends(run), make, lambda row: told(kind, seed, row))
        self.folders[kind, seed] = row["folder"]
        return row

    def checks(self, kind: str, seed: int) -> Row:
        """Whether gradients mislead the attack on a model; the dense twin trained alike lends its own."""
        twin = kind.replace(PLAIN, DENSE_PLAIN, 1)

        def make() -> Row:
            wanted = self.options.checked
            model, batches, continuous = self.tested(self.folders[kind, seed], wanted)
            source, _, _ = self.tested(self.folders[twin, seed], wanted)
            config = attack(EPSILONS[0])
            found = {"checks": gradient_checks(model, batches, config, continuous=continuous, source=source)}
            own = measure_attack(model, batches, config, continuous=continuous)["accuracy"]["label"]["attack"]
            return {**found, "accuracy": own, "foolbox": by_foolbox(model, batches, continuous["image"])}

        depends = [self.depends(self.run_of(kind, seed)), self.options.checked]
        return kept_row(
            self.path(f"checks of {kind}", seed), depends, make, lambda row: print(kind, row, flush=True)
        )

    def tested(self, folder: str, examples: int) -> tuple[nn.Module, list[TaskBatch], Any]:
        """A trained model, an even sample of the test examples, and what can be moved of them."""
        loaded, test = load_task_run(folder), self.data.test
        step = max(1, len(test) // examples)
        chosen = test.rows(list(range(0, len(test), step))[:examples])
        batches = list(task_batches(loaded.encoding.encode(chosen), 100))
        return loaded.model, batches, continuous_inputs(self.material.train.inputs, attack(EPSILONS[0]))

    def depends(self, run: TaskRunConfig) -> Any:
        return [
            run.replace(runs_dir="").to_dict(),
            self.material.fingerprint,
            self.options.examples,
            EPSILONS,
        ]

    def path(self, kind: str, seed: int) -> Path:
        return self.out / "rows" / f"{self.options.variant}-{kind.replace(' ', '-')}-{seed}.json"


def attack(epsilon: float) -> AttackConfig:
    """PGD-40 of this size."""
    return AttackConfig(epsilon=epsilon, steps=STEPS, step_size=STEP_SIZE)


def told(kind: str, seed: int, row: Row) -> None:
    """A line about a finished row."""
    accuracies = [row[f"at {epsilon}"]["accuracy"]["label"] for epsilon in EPSILONS]
    print(seed, kind, accuracies, [row[f"at {epsilon}"]["routes"] for epsilon in EPSILONS],
          f"{row['train_processor_seconds']:.0f} s", flush=True)  # fmt: skip


def by_foolbox(model: nn.Module, batches: list[TaskBatch], pixels: Any) -> float | None:
    """Accuracy under the same attack by foolbox; None where it is not installed."""
    try:
        import foolbox
    except ImportError:
        return None

    class Pixels(nn.Module):
        """The model on pixels from 0 to 1."""

        def forward(self, x: Tensor) -> Tensor:
            answers: Tensor = model({"image": {"pixels": pixels.low + x * pixels.unit}}).answers["label"]
            return answers

    torch.manual_seed(0)
    made = foolbox.attacks.LinfPGD(abs_stepsize=STEP_SIZE, steps=STEPS, random_start=True)
    wrapped = foolbox.PyTorchModel(Pixels().eval(), bounds=(0, 1))
    right = total = 0
    for batch in batches:
        x = (batch.inputs["image"]["pixels"] - pixels.low) / pixels.unit
        _, _, fooled = made(wrapped, x.clamp(0, 1), batch.targets["label"], epsilons=EPSILONS[0])
        right, total = right + int((~fooled).sum()), total + len(fooled)
    return right / total


def table(rows: dict[str, list[Row]]) -> tuple[list[str], list[list[str]]]:
    """Columns and cells."""
    columns = ["model", "clean", *(f"PGD-40, epsilon {epsilon}" for epsilon in EPSILONS)]
    columns += [f"routes changed at {epsilon} (by noise)" for epsilon in EPSILONS]
    columns += ["by an attack on routing at 0.1", "training, processor seconds"]
    cells = []
    for kind, found in rows.items():
        accuracy = [[row[f"at {epsilon}"]["accuracy"]["label"] for row in found] for epsilon in EPSILONS]
        cell = [kind, mean_and_deviation([each["clean"] for each in accuracy[0]], 3)]
        cell += [mean_and_deviation([each["attack"] for each in one], 3) for one in accuracy]
        for epsilon in EPSILONS:
            routes = [row[f"at {epsilon}"]["routes"] for row in found if row[f"at {epsilon}"]["layers"]]
            shares = [
                mean_and_deviation([each[way]["set"] for each in routes], 3)
                for way in ("attack", "noise")
                if routes
            ]
            cell.append(f"{shares[0]} ({shares[1]})" if shares else "–")
        worst = [row["routing attacked"]["attack"]["set"] for row in found if "routing attacked" in row]
        cell.append(mean_and_deviation(worst, 3) if worst else "–")
        cell.append(f"{sum(row['train_processor_seconds'] for row in found) / len(found):.0f}")
        cells.append(cell)
    return columns, cells


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--variant", default="mnist-10k", choices=["mnist-10k", "small"])
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--epochs", type=float, default=4)
    parser.add_argument("--examples", type=int, default=500, help="test digits that are attacked")
    parser.add_argument("--checked", type=int, default=100, help="of them for the checks of gradients")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="start no row after so long")
    parser.add_argument("--out", default="runs/robust-routing")
    options = parser.parse_args()
    began, experiment = time.monotonic(), Experiment(options)
    rows: dict[str, list[Row]] = {}
    checks: dict[str, Row] = {}

    def due(name: str, seed: int) -> bool:
        return time.monotonic() - began < 60 * options.minutes or experiment.path(name, seed).is_file()

    for seed in range(options.seeds):
        for kind in KINDS:
            if due(kind, seed):
                rows.setdefault(kind, []).append(experiment.row(kind, seed))
        for kind in CHECKED if seed == 0 else ():
            twins = {(kind, 0), (kind.replace(PLAIN, DENSE_PLAIN, 1), 0)}
            if twins <= set(experiment.folders) and due(f"checks of {kind}", 0):
                checks[kind] = experiment.checks(kind, 0)
    # as the kinds stand, whatever was made first
    rows = {kind: rows[kind] for kind in KINDS if kind in rows}
    columns, cells = table(rows)
    missing = options.seeds * len(KINDS) - sum(map(len, rows.values()))
    data = experiment.data
    note = (
        f"{len(data.train):,} digits to train on for {options.epochs:g} epochs in batches of 64, an even sample of "
        f"{options.examples} of {len(data.test):,} test digits attacked; "
        + ("one seed" if options.seeds == 1 else f"mean ± deviation over {options.seeds} seeds")
        + ("" if not missing else f", {missing} of {options.seeds * len(KINDS)} rows are not made yet")
        + f". Trained against PGD of {TRAINING['steps']} steps of {TRAINING['step_size']} at epsilon "
        f"{TRAINING['epsilon']}, half of the loss from moved digits. A route is a token in a sparse layer; it changes "
        "where its set of experts is another. The twin has equal active parameters."
    )
    write_result(
        "robust-routing" if options.variant == "mnist-10k" else f"robust-routing-{options.variant}",
        "Digits under attack",
        f"python benchmarks/robust_routing.py --variant {options.variant} --seeds {options.seeds} "
        f"--epochs {options.epochs:g} --examples {options.examples} --checked {options.checked}",
        note, columns, cells, details=rows, checks=checks,
    )  # fmt: skip


if __name__ == "__main__":
    main()
