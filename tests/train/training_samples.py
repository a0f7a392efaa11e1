"""Tiny data, models and runs for the tests of this folder: a step takes milliseconds."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moekit.config.model import model_config_from_dict
from moekit.config.train import RunConfig, TrainConfig
from moekit.data.loader import TrainLoader
from moekit.data.packing import TokenizedSplit
from moekit.models import build_model
from moekit.train.checkpoints import latest_checkpoint, load_checkpoint
from moekit.train.loop import Trainer
from moekit.train.trackers import read_metrics

VOCABULARY, ROWS, LENGTH = 64, 6, 16
BATCHES_PER_EPOCH = 5

# what a clock measures differs from run to run
CLOCK = {"time", "seconds", "tokens_per_second", "train_seconds"}

MOE: dict[str, Any] = {"n_experts": 4, "top_k": 2, "d_expert": 8}


def decoder(**moe: Any) -> dict[str, Any]:
    """A sparse decoder as plain data; the keys of `moe` are laid over a plain layer."""
    return {"vocab_size": VOCABULARY, "d_model": 16, "n_layers": 2, "n_heads": 2, "max_seq_len": LENGTH,
            "init_std": 0.2, "moe": {**MOE, **moe}}  # fmt: skip


def dense() -> dict[str, Any]:
    """A dense decoder."""
    return {**decoder(), "d_ff": 24, "moe": None}


def transformer_xl(**fields: Any) -> dict[str, Any]:
    """Transformer-XL with a memory of one segment."""
    return {"kind": "transformer_xl", "vocab_size": VOCABULARY, "d_model": 16, "n_layers": 2, "n_heads": 2,
            "d_ff": 24, "max_seq_len": LENGTH, "memory_length": LENGTH, **fields}  # fmt: skip


def random_split(n_tokens: int = ROWS * LENGTH * BATCHES_PER_EPOCH + 7, seed: int = 0) -> TokenizedSplit:
    """Random tokens in documents of some 40, of two domains; token 0 is the end marker."""
    random_numbers = np.random.default_rng(seed)
    offsets = [0]
    while offsets[-1] < n_tokens:
        offsets.append(min(n_tokens, offsets[-1] + int(random_numbers.integers(20, 60))))
    tokens = random_numbers.integers(1, VOCABULARY, n_tokens).astype(np.uint16)
    tokens[offsets[:-1]] = 0
    n = len(offsets) - 1
    return TokenizedSplit(
        tokens=tokens,
        offsets=np.array(offsets),
        domain_index=np.arange(n, dtype=np.int32) % 2,
        n_bytes=3 * (np.diff(offsets) - 1),
        domains=("even", "odd"),
        names=tuple(f"document {i}" for i in range(n)),
        end_id=0,
    )


def make_trainer(
    model: Mapping[str, Any],
    *,
    weights_seed: int = 0,
    order: str = "streams",
    loader: type[TrainLoader] = TrainLoader,
    **train: Any,
) -> Trainer:
    """A trainer on random tokens, float32 on the CPU unless `train` says otherwise."""
    fields = {"steps": 8, "batch_size": ROWS, "device": "cpu", "precision": "float32",
              "schedule": {"warmup_steps": 3}, **train}  # fmt: skip
    config = TrainConfig.from_dict(fields)
    torch.manual_seed(weights_seed)
    built = build_model(model_config_from_dict(dict(model)))
    return Trainer(built, config, loader(random_split(), config.batch_size, LENGTH, config.seed, order))  # type: ignore[arg-type]


def exact(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Metrics without what a clock measures."""
    return {name: value for name, value in metrics.items() if name not in CLOCK}


def copies(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The values of now, since a trainer gives references."""
    return {name: tensor.clone() for name, tensor in tensors.items()}


def assert_same_tensors(got: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Equal names, types, shapes and bits."""
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        assert got[name].dtype == tensor.dtype, name
        assert torch.equal(got[name], tensor), f"{name} differs by {(got[name] - tensor).abs().max()}"


# --- whole runs, from text


def write_corpus(path: Path, n_documents: int = 60, seed: int = 0) -> Path:
    """Sentences of two domains as JSONL, some 150 bytes a document."""
    chance = random.Random(seed)
    animals = ["cat", "dog", "owl", "hen", "fox", "eel", "ape", "bee"]
    words = {"animals": animals, "numbers": [str(i * i) for i in range(30)]}
    lines = []
    for index in range(n_documents):
        domain = sorted(words)[index % 2]
        text = " ".join(chance.choice(words[domain]) for _ in range(40))
        lines.append(json.dumps({"text": f"{index}: {text}.", "domain": domain}))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def run_config(
    folder: Path, model: Mapping[str, Any] | None = None, data: Any = None, **train: Any
) -> RunConfig:
    """A run on `folder`/corpus.jsonl (written where it is missing) into `folder`/runs."""
    corpus = folder / "corpus.jsonl"
    if not corpus.exists():
        write_corpus(corpus)
    return RunConfig.from_dict(
        {
            "name": "tiny",
            "runs_dir": str(folder / "runs"),
            "model": dict(model if model is not None else decoder()),
            "data": {"path": str(corpus), "domain_column": "domain", "vocab_size": 280, "seq_len": LENGTH,
                     "validation_share": 0.1, "offline": True, **(data or {})},
            "train": {"steps": 10, "batch_size": ROWS, "device": "cpu", "precision": "float32",
                      "validate_every": 4, "validation_batches": 2, "checkpoint_every": 3, "log_every": 1,
                      "schedule": {"warmup_steps": 3}, **train},
        }
    )  # fmt: skip


def newest(run: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and state of a run's newest checkpoint."""
    path = latest_checkpoint(run / "checkpoints")
    assert path is not None
    return load_checkpoint(path)


def assert_same_run(got: Path, expected: Path) -> None:
    """Two finished runs agree bit for bit: tensors, generators, place in the data, metrics, result."""
    (tensors, state), (expected_tensors, expected_state) = newest(got), newest(expected)
    assert_same_tensors(tensors, expected_tensors)
    assert exact(state) == exact(expected_state)
    lines, expected_lines = (
        sorted(
            (exact(line) for line in read_metrics(run / "metrics.jsonl")),
            key=lambda line: (line["step"], line["kind"]),
        )
        for run in (got, expected)
    )
    assert lines == expected_lines
    final, expected_final = (json.loads((run / "final.json").read_text()) for run in (got, expected))
    assert exact(final) == exact(expected_final)


def at_micro_step(monkeypatch: Any, step: int, micro: int, action: Callable[[Trainer], None]) -> None:
    """Do something right before micro-batch `micro` of the step after `step` steps, once."""
    original, done = Trainer._micro_step, []

    def micro_step(self: Trainer, *arguments: Any) -> None:
        if (self.step, self.micro) == (step, micro) and not done:
            done.append(True)
            action(self)
        original(self, *arguments)

    monkeypatch.setattr(Trainer, "_micro_step", micro_step)
