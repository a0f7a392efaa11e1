"""The latency controller while the load of real generation doubles: docs/results/latency-controller.json.

python benchmarks/latency_controller.py runs/elastic/runs/3-0-1

RUN is a run that was trained for several numbers of experts per token (benchmarks/elastic.py leaves some). So many
texts are continued together, and at half time twice as many: with the controller, and with the largest k throughout.
The target lies between what the smallest and the largest k take under the double load, unless it is given. A step is
one token of every text; the reading of prompts is none.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from common import write_result

from moekit.data.prepare import PreparedData, prepare
from moekit.evaluate.elastic import evaluate_settings
from moekit.evaluate.run import setting_of
from moekit.generate.text import Pace, generate
from moekit.layers.elastic import Elastic
from moekit.serve.controller import LatencyController, options_of_table
from moekit.train.run import LoadedRun, load_run, require_same_data

QUANTILE = 0.95
PROMPT = 16  # tokens
WARM = 5  # steps that a measurement leaves out


class Timed:
    """Another pace, or one setting throughout, with the seconds and the setting of each step written down."""

    def __init__(self, pace: Pace | Elastic) -> None:
        self.pace = pace
        self.steps: list[tuple[float, str]] = []

    @property
    def setting(self) -> Elastic:
        return self.pace if isinstance(self.pace, Elastic) else self.pace.setting

    def after_step(self, seconds: float) -> None:
        self.steps.append((seconds, str(self.setting)))
        if not isinstance(self.pace, Elastic):
            self.pace.after_step(seconds)


def quantile(seconds: Sequence[float]) -> float:
    """By nearest rank, as the controller has it.

    >>> quantile([3.0, 1.0, 2.0])
    3.0
    """
    return sorted(seconds)[math.ceil(QUANTILE * len(seconds)) - 1]


class Load:
    """Texts that are continued together, again and again from other beginnings."""

    def __init__(self, run: LoadedRun, data: PreparedData, tokens: int) -> None:
        self.run, self.tokens = run, tokens
        text = data.validation.tokens
        self.beginnings = [
            [int(t) for t in text[at : at + PROMPT]] for at in range(0, len(text) - PROMPT, PROMPT)
        ]
        self.at = 0

    def steps(self, pace: Timed, n_texts: int, n_steps: int) -> None:
        """Steps of so many texts; a text that is as long as the model's window makes place for another one."""
        wanted = len(pace.steps) + n_steps
        while len(pace.steps) < wanted:
            prompts = [self.beginnings[(self.at + i) % len(self.beginnings)] for i in range(n_texts)]
            self.at += n_texts
            n = min(wanted - len(pace.steps), self.tokens - 1) + 1
            generate(
                self.run.model, self.run.tokenizer, prompts, max_new_tokens=n, pace=pace, stop_at_end=False
            )


def calibrated(load: Load, ks: Sequence[int], n_texts: int, n_steps: int) -> dict[int, list[float]]:
    """Seconds of steps at each k, in turns."""
    found: dict[int, list[float]] = {k: [] for k in ks}
    for _ in range(3):
        for k in ks:
            timed = Timed(Elastic(top_k=k))
            load.steps(timed, n_texts, n_steps // 3 + WARM)
            found[k] += [seconds for seconds, _ in timed.steps[WARM:]]
    return found


def windows(steps: Sequence[tuple[float, str]], size: int) -> list[dict[str, Any]]:
    """The quantile of each stretch of `size` steps, and which settings it had."""
    parts = [steps[at : at + size] for at in range(0, len(steps) - size + 1, size)]
    return [
        {
            "quantile_ms": 1000 * quantile([s for s, _ in part]),
            "settings": _counts([setting for _, setting in part]),
        }
        for part in parts
    ]


def _counts(settings: Sequence[str]) -> dict[str, int]:
    return {setting: settings.count(setting) for setting in sorted(set(settings))}


def phases(load: Load, pace: Timed, n_texts: int, n_steps: int) -> list[list[tuple[float, str]]]:
    """The steps of the first half, and of the second with twice the texts."""
    load.at = 0  # the same beginnings for everyone
    load.steps(pace, n_texts, n_steps)
    load.steps(pace, 2 * n_texts, n_steps)
    return [pace.steps[:n_steps], pace.steps[n_steps:]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--ks", type=lambda text: [int(part) for part in text.split(",")], default=[1, 2, 4])
    parser.add_argument(
        "--texts", type=int, default=32, help="continued together; twice as many from half time on"
    )
    parser.add_argument("--steps", type=int, default=600, help="of each half")
    parser.add_argument("--window", type=int, default=50, help="steps of a row of the result")
    parser.add_argument("--target-ms", type=float, default=None)
    parser.add_argument(
        "--short", action="store_true", help="few steps and texts; the result lies beside the run's folder"
    )
    args = parser.parse_args()
    if args.short:
        args.texts, args.steps, args.window = 4, 60, 20
    run = load_run(args.run)
    data = prepare(run.config.data)
    require_same_data(run.folder, data)
    room = run.config.model.max_seq_len - PROMPT
    load = Load(run, data, room)
    ks = sorted(args.ks)
    quality = {
        row["top_k"]: row["bits_per_byte"]
        for row in evaluate_settings(
            run.model, run.config.model, data, setting_of(run, 2 if args.short else None),
            [Elastic(top_k=k) for k in ks],
        )
    }  # fmt: skip
    single = calibrated(load, ks, args.texts, args.steps // 2)
    double = calibrated(load, ks, 2 * args.texts, args.steps // 2)
    low, high = quantile(double[ks[0]]), quantile(double[ks[-1]])
    target = args.target_ms / 1000 if args.target_ms is not None else math.sqrt(low * high)
    print(
        {"single_ms": _median(single), "double_ms": _median(double), "target_ms": 1000 * target}, flush=True
    )
    # by the table's rule: a k that was measured slower than a better one is no option
    options = options_of_table([
        {"top_k": k, "bits_per_byte": quality[k], "tokens_per_second": 1 / statistics.median(single[k])} for k in ks
    ])  # fmt: skip
    controller = LatencyController(options, target, quantile=QUANTILE)
    with_it = phases(load, Timed(controller), args.texts, args.steps)
    without = phases(load, Timed(Elastic(top_k=ks[-1])), args.texts, args.steps)
    report = controller.report()
    report["changes"] = [
        {"step": change.step, "before": str(change.before), "after": str(change.after)}
        for change in controller.changes
    ]
    rows = [row(name, half, texts, target, quality)
            for name, halves in (("controller", with_it), (f"k = {ks[-1]}", without))
            for half, texts in zip(halves, (args.texts, 2 * args.texts), strict=True)]  # fmt: skip
    name = f"{args.run.parent.name}/{args.run.name}"
    command = f"python benchmarks/latency_controller.py {args.run}"
    for option, given in (("texts", 32), ("steps", 600), ("window", 50), ("target_ms", None)):
        value = getattr(args, option)
        if value != given and not args.short:
            command += f" --{option.replace('_', '-')} {value:g}"
    write_result(
        "latency-controller",
        "A latency target while the load doubles",
        command + (" --short" if args.short else ""),
        f"Texts continued together by an elastic model ({name}), {args.steps} steps each half; a step is one token of "
        f"each text. The target is {1000 * target:.1f} ms for {QUANTILE:.0%} of the steps"
        f"{'' if args.target_ms is not None else ', between those of the smallest and the largest k under double load'}"
        f"; alone, k = {ks[0]} takes {1000 * low:.1f} ms there and k = {ks[-1]} {1000 * high:.1f} ms ({QUANTILE:.0%} "
        "of the steps). Quality cost: bits per byte on the validation documents over the best k, mean over the steps. "
        f"On {torch.get_num_threads()} CPU threads.",
        ["experts per token", "texts", "95% of steps within", "steps over the target", "windows within",
         "quality cost"],
        rows,
        into=args.run.parent if args.short else None,
        target_ms=1000 * target,
        single_ms=_median(single),
        double_ms=_median(double),
        bits_per_byte=quality,
        controller=report,
        windows={
            label: [windows(half, args.window) for half in halves]
            for label, halves in (("controller", with_it), ("fixed", without))
        },
    )  # fmt: skip


def row(
    name: str, steps: Sequence[tuple[float, str]], n_texts: int, target: float, quality: dict[int, float]
) -> list[str]:
    """One half of one of the two."""
    seconds = [taken for taken, _ in steps]
    bits = {f"k={k}": value for k, value in quality.items()}
    cost = statistics.fmean(bits[setting] for _, setting in steps) - min(bits.values())
    parts = windows(steps, 20)  # as long as the controller's own
    within = sum(part["quantile_ms"] <= 1000 * target for part in parts)
    used = ", ".join(f"{n} at {setting}" for setting, n in _counts([setting for _, setting in steps]).items())
    return [
        f"{name} ({used})", str(n_texts), f"{1000 * quantile(seconds):.1f} ms",
        f"{sum(taken > target for taken in seconds) / len(seconds):.1%}", f"{within} of {len(parts)}", f"{cost:.4f}",
    ]  # fmt: skip


def _median(seconds: dict[int, list[float]]) -> dict[str, float]:
    return {f"k={k}": round(1000 * statistics.median(each), 3) for k, each in seconds.items()}


if __name__ == "__main__":
    main()
