"""What the experts of the quickstart's sparse model are good for: docs/results/quickstart-experts.json.

    python benchmarks/quickstart_experts.py RUN [--batches 8] [--draws 10] [--threads 1]

RUN is the folder of the sparse run of `moekit quickstart`. Specialisation by domain of each layer against both nulls,
then each domain's specialists switched off, once with the next best expert in their place and once with nothing.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import write_result

from moekit.data.loader import evaluation_batches
from moekit.data.prepare import prepare
from moekit.explain.nulls import specialisation_claim
from moekit.explain.reading import record_split
from moekit.explain.specialists import CausalCheck, Verdict, ways_of
from moekit.observe.record import RoutingRecord
from moekit.train.device import resolve_device, resolve_dtype
from moekit.train.run import LoadedRun, load_run, require_same_data

WORDS = {"nothing": "nothing in their place", "next": "the next best expert"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--batches", type=int, default=8)
    parser.add_argument("--draws", type=int, default=10)
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    run = load_run(given.run)
    data = prepare(run.config.data)
    require_same_data(given.run, data)
    split = data.validation
    record = record_split(run, split, tokens=split.n_tokens)
    layers = [claim_of(record, layer) for layer in range(len(record.layers))]
    print(json.dumps(layers, indent=1))
    verdicts, check, seconds = tested(run, split, record, given.batches, given.draws)
    rows = [row for layer, claim in enumerate(layers) for row in rows_of(record, layer, claim, verdicts)]
    texts = ", ".join(f"{n} {name}" for n, name in zip(check.n_texts, record.groups, strict=True))
    write_result(
        "quickstart-experts",
        "What the experts of the quickstart model are good for",
        f"python benchmarks/quickstart_experts.py RUN --batches {given.batches} --draws {given.draws} "
        f"--threads {given.threads}",
        f"RUN is the sparse run of `moekit quickstart` (step {run.step}). Information: mutual information "
        f"of expert and domain over the entropy of the domains, on {split.n_tokens:,} validation tokens, with a 95% "
        f"interval over {split.n_documents} documents; nulls (domains permuted, choices drawn) are 95th percentiles. "
        f"Switched off: the fewest experts that hold half of what a domain asks for beyond the others, on "
        f"{check.n_tokens:,} tokens of {sum(check.n_texts)} documents ({texts}); difference: the rise of the domain's "
        "loss less that of the others, in nats a token, with a 95% interval over documents; random: the largest "
        f"difference of {given.draws} sets of as many other experts with the nearest load. {check.passes} passes over "
        f"the text took {seconds:.0f} s of processor time on one thread.",
        ["layer", "domain", "information", "nulls", "experts", "share", "elsewhere", "in their place", "difference",
         "random", "verdict"],
        rows,
        layers=layers,
        verdicts=[{**asdict(one), "domain": record.groups[one.group]} for one in verdicts],
        processor_seconds=seconds, passes=check.passes,
    )  # fmt: skip


def claim_of(record: RoutingRecord, layer: int) -> dict[str, Any]:
    """Specialisation by domain against its nulls, from the recorded tokens of all documents."""
    claim = specialisation_claim(
        record.of(layer, "token/experts"), record.arrays["token/group"].astype(np.int64), record.arrays["token/text"],
        record.layers[layer].n_experts, len(record.groups),
    )  # fmt: skip
    return {**asdict(claim), "holds": claim.holds, "tokens": record.n_token_rows}


def tested(
    run: LoadedRun, split: Any, record: RoutingRecord, batches: int, draws: int
) -> tuple[list[Verdict], CausalCheck, float]:
    config = run.config
    device = resolve_device(config.train.device)
    began = time.process_time()
    check = CausalCheck(
        run.model.to(device),
        lambda: evaluation_batches(split, config.train.batch_size, config.data.seq_len, max_batches=batches),
        len(record.groups), device, resolve_dtype(config.train.precision, device), draws=draws,
    )  # fmt: skip
    found: list[Verdict] = []
    for layer in range(len(record.layers)):
        counts, requested = record.of(layer, "counts"), record.of(layer, "requested")
        for one in check.layer(layer, counts, requested, ways_of(record, layer)):
            found.append(one)
            print(
                f"layer {layer}, {record.groups[one.group]}, {one.instead}: {one.value:+.4f} "
                f"({one.low:+.4f} to {one.high:+.4f}), random up to {max(one.null):+.4f}: {one.ruling}",
                flush=True,
            )
    return found, check, time.process_time() - began


def rows_of(
    record: RoutingRecord, layer: int, claim: dict[str, Any], verdicts: list[Verdict]
) -> list[list[str]]:
    return [
        [
            str(layer), record.groups[one.group],
            f"{claim['value']:.1%} ({claim['low']:.1%} to {claim['high']:.1%})",
            f"{claim['permuted']:.1%}, {claim['random']:.1%}", str(len(one.experts)), f"{one.share:.0%}",
            f"{one.elsewhere:.0%}", WORDS[one.instead], f"{one.value:+.4f} ({one.low:+.4f} to {one.high:+.4f})",
            f"{max(one.null):+.4f}", one.ruling,
        ]
        for one in verdicts if one.layer == layer
    ]  # fmt: skip


if __name__ == "__main__":
    main()
