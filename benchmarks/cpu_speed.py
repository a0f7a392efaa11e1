"""moekit's CPU kernels against transformers and dense layers: every case that the documentation quotes.

python benchmarks/cpu_speed.py                        # about fifteen minutes on two cores, nothing else running
python benchmarks/cpu_speed.py --parts layer,decode   # some of it; the others' rows stay as they are
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable
from typing import Any

import torch
from common import RESULTS, write_result

from moekit.convert.transformers import undo, use_in_transformers
from moekit.evaluate.bench.compare import TimingOptions
from moekit.evaluate.bench.decode import DecodeShape, run_decode
from moekit.evaluate.bench.layer import LayerShape, run_layer
from moekit.evaluate.bench.model import ModelShape, run_model
from moekit.evaluate.bench.step import run_step
from moekit.evaluate.machine import cpu_name

TIMING = TimingOptions(repeats=7, warmup=2, say=lambda message: print(message, flush=True))
SHAPES = {"D=F=512 E=16 K=2": (512, 512, 16, 2), "D=F=256 E=32 K=4": (256, 256, 32, 4),
          "D=1024 F=512 E=64 K=8": (1024, 512, 64, 8)}  # fmt: skip


def shapes(tokens: int, kind: str) -> dict[str, LayerShape]:
    return {f"{kind} T={tokens:,} {name}": LayerShape(tokens, *sizes) for name, sizes in SHAPES.items()}


def layer() -> list[dict[str, Any]]:
    return run_layer(shapes(4096, "bf16"), timing=TIMING, with_memory=True)


def rows() -> list[dict[str, Any]]:
    cases = [run_layer(shapes(t, "bf16"), backward=False, timing=TIMING) for t in (512, 1024, 2048)]
    return [case for each in cases for case in each]


def float32() -> list[dict[str, Any]]:
    return [
        case for t in (512, 4096)
        for case in run_layer(shapes(t, "float32"), dtype="float32", backward=False, timing=TIMING)
    ]  # fmt: skip


def experts() -> list[dict[str, Any]]:
    """Fixed active size, more and more experts; nobody else takes part."""
    sizes = {f"bf16 T=4,096 D=512 F={f} K={k} E={e}": LayerShape(4096, 512, f, e, k)
             for f, k in ((512, 2), (256, 8)) for e in (8, 64, 256)}  # fmt: skip
    return run_layer(sizes, backward=True, against=(), timing=TIMING)


def decode() -> list[dict[str, Any]]:
    return run_decode(DecodeShape(layers=2), timing=TIMING)


def step() -> list[dict[str, Any]]:
    from pathlib import Path

    from moekit.recipes.quickstart import base_config, quickstart_recipe

    return run_step(base_config(quickstart_recipe(), Path("runs"), seed=0), timing=TIMING)


def model() -> list[dict[str, Any]]:
    timing = TimingOptions(repeats=5, warmup=1, say=TIMING.say)
    return run_model(
        ModelShape(),
        use_moekit=use_in_transformers,
        undo_moekit=undo,
        threads=torch.get_num_threads(),
        timing=timing,
    )


PARTS: dict[str, Callable[[], list[dict[str, Any]]]] = {
    "layer": layer,
    "rows": rows,
    "float32": float32,
    "experts": experts,
    "decode": decode,
    "step": step,
    "model": model,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", default=",".join(PARTS))
    wanted = parser.parse_args().parts.split(",")
    torch.set_num_threads(os.cpu_count() or 1)
    file = RESULTS / "cpu-speed.json"
    cases: dict[str, list[dict[str, Any]]] = json.loads(file.read_text())["cases"] if file.is_file() else {}
    for name in wanted:
        cases[name] = PARTS[name]()
        _write({part: cases[part] for part in PARTS if part in cases})


def _write(cases: dict[str, list[dict[str, Any]]]) -> None:
    write_result(
        "cpu-speed",
        "Speed on a CPU",
        "python benchmarks/cpu_speed.py",
        f"Medians of alternating rounds in one run for each case, {torch.get_num_threads()} threads of a shared "
        f"{cpu_name()}, torch {torch.__version__}; every answer checked against float32. GFLOP/s of the products, "
        "GB/s of the weights that must be read; in brackets the share of what a large matrix product, or reading "
        "memory, reached in the same run. Against peer: the fastest of transformers' implementations; against dense: "
        "a dense layer, or the dense twin, of equal active size. Above 1 moekit is faster.",
        ["case", "contestant", "ms", "GFLOP/s or GB/s", "against peer", "against dense"],
        [row for part in cases.values() for case in part for row in _rows(case)],
        cases={name: [_short(case) for case in part] for name, part in cases.items()},
    )


def _short(case: dict[str, Any]) -> dict[str, Any]:
    """A case without every round's time and every tensor's deviation."""
    rows = [
        {key: value for key, value in each.items() if key != "deviations"}
        | {"seconds": {key: value for key, value in each["seconds"].items() if key != "samples"}}
        for each in case["contestants"]
    ]
    return {**case, "contestants": rows}


def _rows(case: dict[str, Any]) -> list[list[str]]:
    peer = min((c for c in case["contestants"] if c["role"] == "peer"), key=_seconds, default=None)
    dense = next((c for c in case["contestants"] if c["name"].startswith("dense")), None)
    ours = [
        each for each in case["contestants"] if each["role"] == "moekit" and each["name"] != "moekit plain"
    ]
    return [
        [case["name"], each["name"], f"{1000 * _seconds(each):,.2f}", _speed(each)]
        + [_against(other, each) for other in (peer, dense)]
        for each in ours
    ]


def _seconds(contestant: dict[str, Any]) -> float:
    return float(contestant["seconds"]["median"])


def _speed(contestant: dict[str, Any]) -> str:
    for key in ("bytes", "flops"):
        share = contestant[f"{key}_share"]
        if share:
            return f"{contestant[f'{key}_per_second'] / 1e9:,.0f} ({share:.0%})"
    return "–"


def _against(other: dict[str, Any] | None, each: dict[str, Any]) -> str:
    if other is None:
        return "–"
    return f"{_seconds(other) / _seconds(each):.2f} ({other['name'].removeprefix('transformers ')})"


if __name__ == "__main__":
    main()
