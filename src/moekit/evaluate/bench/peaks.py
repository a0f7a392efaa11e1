"""Peak memory of the contestants of `bench layer`, each in a process of its own.

In one process, what an earlier contestant gave back to the allocator would hide what a later one takes.
"""

from __future__ import annotations

import ctypes
import gc
import json
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

from moekit.config.errors import MoekitError
from moekit.evaluate.bench.compare import Case

_RUNS = 2  # the second one meets what the first one left behind, as in training


def add_peaks(case: Case, settings: Mapping[str, Any]) -> None:
    """Fill in `peak_memory_bytes` of each contestant: the most that it held beside weights and inputs."""
    for row in case["contestants"]:
        row["peak_memory_bytes"] = peak_of(row["name"], settings)


def peak_of(name: str, settings: Mapping[str, Any]) -> int | None:
    """Bytes by which the process of one contestant grew; None where this system does not tell.

    Raises:
        MoekitError: the process ended without an answer.
    """
    import torch

    question = json.dumps({**settings, "contestant": name, "threads": torch.get_num_threads()})
    command = [sys.executable, "-m", "moekit.evaluate.bench.peaks"]
    result = subprocess.run(command, input=question, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        words = (result.stderr.strip().splitlines() or ["no message"])[-1]
        raise MoekitError(
            f"measuring the memory of {name} ended with exit code {result.returncode}: {words}. Leave out --memory"
        )
    answer: int | None = json.loads(result.stdout.splitlines()[-1])["bytes"]
    return answer


def measure(settings: dict[str, Any]) -> dict[str, Any]:
    """What the process of its own does: load everything with a tiny layer, then watch the real one."""
    import torch

    from moekit.evaluate.bench.layer import DTYPES, LayerShape, layer_contestants
    from moekit.train.memory import PeakMemory

    torch.set_num_threads(settings["threads"])
    sizes = {name: settings[name] for name in LayerShape.__dataclass_fields__}

    def contestant(shape: LayerShape) -> Any:
        found, _ = layer_contestants(
            shape,
            DTYPES[settings["dtype"]],
            backward=settings["backward"],
            against=settings["against"],
            seed=settings["seed"],
        )
        return next(each for each in found if each.name == settings["contestant"])

    contestant(LayerShape(**{**sizes, "tokens": min(64, sizes["tokens"])})).run()
    taking = contestant(LayerShape(**sizes))
    gc.collect()
    _return_memory()
    with PeakMemory() as memory:
        for _ in range(_RUNS):
            taking.run()
    return {"bytes": None if memory.method == "unavailable" else memory.increase, "method": memory.method}


def _return_memory() -> None:
    """Ask the C library to give free memory back to the system, so that the peak does not start inside it."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)


if __name__ == "__main__":
    print(json.dumps(measure(json.load(sys.stdin))))
