"""`moekit quickstart`: the dense twin, Transformer-XL and the MoE on real text, compared and explained.

All three see the same tokens in the same order and have equal active parameters (the twins a little more, never
fewer); each has its own tuned learning rate.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from datetime import datetime, timezone
from importlib import resources
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import yaml

from moekit import __version__
from moekit.config.atomic import write_json, write_text
from moekit.config.model import AnyConfig, ModelConfig, TransformerXLConfig
from moekit.config.train import RunConfig
from moekit.data.loader import evaluation_batches
from moekit.data.prepare import PreparedData, prepare
from moekit.evaluate.machine import cores, cpu_name, memory
from moekit.evaluate.metrics import inference_speeds
from moekit.evaluate.page import SCHEMA, check_report, render_quickstart_page, to_dense_loss
from moekit.evaluate.run import SPEED_BATCHES, evaluate_model, setting_of
from moekit.models.twins import dense_twin, transformer_xl_twin
from moekit.train.memory import PeakMemory
from moekit.train.run import LoadedRun, load_run, train_run
from moekit.train.trackers import read_metrics

# trained in this order, so that the model of interest comes last and the others' results are there already
MODELS = ("dense", "transformer_xl", "moe")
PROMPTS = {"code": "def read_config(path):\n    ", "english": "The state of the union ", "chinese": "中国"}


def run_quickstart(
    *, out: Path | str = "runs/quickstart", steps: int | None = None, seed: int = 0, short: bool = False,
    offline: bool = False, quiet: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """Train, evaluate and compare; write `report.json` and `report.html` into `out` and return the report.

    Args:
        out: folder of the report; the three runs lie in its folder `runs`.
        steps: optimizer steps of each model; the recipe's where None.
        seed: seed of weights, data order and noise.
        short: a small version of everything on real text, for continuous integration.
        offline: fetch nothing; use the cache or the text of this Python installation.
        quiet: show nothing.
    """
    out = Path(out)

    def say(message: str) -> None:
        if not quiet:
            print(message, file=sys.stderr if not sys.stdout.isatty() else sys.stdout, flush=True)

    recipe = quickstart_recipe(short)
    base = base_config(recipe, out, seed=seed, steps=steps, offline=offline)
    say("Preparing the corpus")
    data = prepare(base.data, None if quiet else say)
    base = base.replace(model=base.model.replace(vocab_size=data.tokenizer.vocab_size))
    folders: dict[str, Path] = {}
    peaks: dict[str, int] = {}
    for name in MODELS:
        say(
            f"Training {name} ({base.train.steps} steps of {base.train.batch_size * base.data.seq_len:,} tokens)"
        )
        with PeakMemory(base.train.device if base.train.device != "auto" else "cpu") as memory:
            result = train_run(model_run(base, name, recipe), data=data, quiet=quiet)
        peaks[name] = memory.bytes
        folders[name] = result.folder
    say("Evaluating")
    # loaded only now: a model that is held already would count into the peak memory of the next one's training
    runs = {name: load_run(folder) for name, folder in folders.items()}
    report = build_report(runs, data, peaks)
    report["command"] = _command(out, steps, seed, short, offline)
    report["settings"]["lr"] = {name: runs[name].config.train.optimizer.lr for name in MODELS}
    check_report(report)
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "report.json", report)
    write_text(out / "report.html", render_quickstart_page(report))
    say(summary_line(report))
    return report


def quickstart_recipe(short: bool = False) -> dict[str, Any]:
    """The recipe as plain data; `short` merges its small version over it."""
    recipe = yaml.safe_load(resources.files("moekit.recipes").joinpath("quickstart.yaml").read_text("utf-8"))
    small = recipe.pop("short")
    if short:
        recipe["run"] = _merge(recipe["run"], small)
    return recipe


def base_config(
    recipe: Mapping[str, Any], out: Path, *, seed: int, steps: int | None = None, offline: bool = False
) -> RunConfig:
    """The recipe's run for the sparse model."""
    config = RunConfig.from_dict({**recipe["run"], "name": "moe", "runs_dir": str(Path(out) / "runs")})
    train = config.train.replace(seed=seed, **({"steps": steps} if steps else {}))
    return config.replace(train=train, data=config.data.replace(offline=offline))


def model_run(base: RunConfig, name: str, recipe: Mapping[str, Any]) -> RunConfig:
    """The run of one of the three models: the same data and training, its own learning rate."""
    assert isinstance(base.model, ModelConfig)
    models: dict[str, ModelConfig | TransformerXLConfig] = {
        "moe": base.model,
        "dense": dense_twin(base.model),
        "transformer_xl": transformer_xl_twin(base.model, **recipe["transformer_xl"]),
    }
    optimizer = base.train.optimizer.replace(lr=recipe["lr"][name])
    return base.replace(
        name=name.replace("_", "-"), model=models[name], train=base.train.replace(optimizer=optimizer)
    )


def build_report(
    runs: Mapping[str, LoadedRun], data: PreparedData, peaks: Mapping[str, int]
) -> dict[str, Any]:
    """Everything measured about trained runs, in the schema of `moekit.evaluate.page.schema`."""
    first = next(iter(runs.values()))
    settings = {name: setting_of(run) for name, run in runs.items()}
    measured = {name: evaluate_model(run, data, settings[name]) for name, run in runs.items()}
    setting = next(iter(settings.values()))
    batches = islice(evaluation_batches(data.validation, setting.batch_size, setting.seq_len), SPEED_BATCHES)
    speeds = inference_speeds(
        {name: run.model for name, run in runs.items()}, batches, setting.device, setting.dtype
    )
    curves = {name: _curve(run.folder) for name, run in runs.items()}
    models = {}
    for name, run in runs.items():
        result, curve = measured[name], curves[name]
        speed = [entry["tokens_per_second"] for entry in read_metrics(run.folder / "metrics.jsonl", "train")]
        models[name] = {
            **{
                key: result[key]
                for key in (
                    "bits_per_byte",
                    "active_parameters",
                    "total_parameters",
                    "flops_per_token",
                    "gap",
                )
            },
            "tokens": curve[-1]["tokens"],
            "train_tokens_per_second": sorted(speed)[len(speed) // 2],
            "inference_tokens_per_second": speeds[name],
            "peak_memory_bytes": peaks.get(name),
            "train_seconds": curve[-1]["seconds"],
            "final_loss": _last(curve, "validation_loss"),
            "curve": curve,
            "sample": _sample(run),
            "description": describe(run.config.model),
        }
    config, train = first.config, first.config.train
    balance = measured["moe"]["balance"] if "moe" in measured else None
    if balance:
        balance["history"] = [
            {"step": entry["step"], "max_violation": entry["max_violation"]}
            for entry in read_metrics(runs["moe"].folder / "metrics.jsonl", "train")
        ]
    notes = [source.note for source in data.sources if source.note]
    return {
        "schema": SCHEMA,
        "moekit_version": __version__,
        "command": "",
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": {
            "cpu": cpu_name(), "cores": cores().usable, "memory_bytes": memory().total, "torch": torch.__version__,
            "precision": str(setting.dtype).removeprefix("torch."), "device": str(setting.device),
        },
        "corpus": {
            "name": config.data.path or config.data.corpus,
            "sources": [{k: getattr(s, k) for k in ("name", "origin", "licence", "note")} for s in data.sources],
            "domains": list(data.validation.domains),
            "held_out_domain": data.held_out.domains[0] if data.held_out.n_tokens else None,
            "train_tokens": data.train.n_tokens,
            "validation_tokens": data.validation.n_tokens,
            "bytes": {domain: size["bytes"] for domain, size in data.train.domain_sizes().items()},
            "vocab_size": data.tokenizer.vocab_size,
            "note": "",
        },
        "settings": {
            "steps": train.steps, "batch_size": train.batch_size, "seq_len": config.data.seq_len, "seed": train.seed,
            "schedule": train.schedule.kind, "warmup_steps": train.schedule.warmup_steps,
            "weight_decay": train.optimizer.weight_decay, "gradient_clip": train.gradient_clip,
        },
        "models": models,
        "to_dense_loss": to_dense_loss({name: models[name] for name in models}),
        "balance": balance or None,
        "experts_by_domain": measured["moe"]["experts_by_domain"] if "moe" in measured else None,
        "notes": notes,
    }  # fmt: skip


def describe(config: AnyConfig) -> str:
    """One line about a model's shape."""
    if isinstance(config, TransformerXLConfig):
        return (f"Transformer-XL, {config.n_layers} layers, width {config.d_model}, feed-forward {config.d_ff}, "
                f"memory of {config.memory_length} tokens")  # fmt: skip
    if config.moe is None:
        return f"{config.kind}, {config.n_layers} layers, width {config.d_model}, feed-forward {config.d_ff}"
    moe = config.moe
    by_name: dict[str, list[str]] = {}
    for index in config.moe_layers:
        by_name.setdefault((config.moe_of(index) or moe).router.name, []).append(str(index))
    rules = " and ".join(
        name if len(by_name) == 1 else f"{name} (layers {', '.join(layers)})"
        for name, layers in by_name.items()
    )
    shared = f", {moe.n_shared_experts} shared" if moe.n_shared_experts else ""
    return (f"{config.kind}, {config.n_layers} layers, width {config.d_model}, {moe.n_experts} experts of width "
            f"{moe.d_expert}{shared}, top {moe.top_k} by router {rules}")  # fmt: skip


def summary_line(report: Mapping[str, Any]) -> str:
    """The result in one line, won or lost."""
    bits = {name: model["bits_per_byte"]["mean"] for name, model in report["models"].items()}
    line = ", ".join(f"{name} {value:.3f}" for name, value in sorted(bits.items(), key=lambda item: item[1]))
    share = report["to_dense_loss"]["steps_share"]
    reach = (
        "never reached the dense twin's final loss"
        if share is None
        else f"reached it after {share:.0%} of the steps"
    )
    return f"Bits per byte (lower is better): {line}. The MoE {reach}."


def _curve(folder: Path) -> list[dict[str, Any]]:
    points: dict[int, dict[str, Any]] = {}
    for entry in read_metrics(folder / "metrics.jsonl"):
        if entry["kind"] not in ("train", "validation"):  # an alarm
            continue
        point = points.setdefault(
            entry["step"],
            {"step": entry["step"], "tokens": 0, "seconds": None, "loss": None, "validation_loss": None},
        )
        point["tokens"], point["seconds"] = entry["tokens"], entry["seconds"]
        key = "loss" if entry["kind"] == "train" else "validation_loss"
        point[key] = entry[key]
    return [points[step] for step in sorted(points)]


def _last(curve: list[dict[str, Any]], key: str) -> float | None:
    return next((point[key] for point in reversed(curve) if point[key] is not None), None)


def _sample(run: LoadedRun) -> str:
    from moekit.generate.text import generate

    texts = generate(
        run.model,
        run.tokenizer,
        list(PROMPTS.values()),
        max_new_tokens=60,
        temperature=0.7,
        top_p=0.9,
        seed=0,
    )
    return "\n\n".join(prompt + each.text for prompt, each in zip(PROMPTS.values(), texts, strict=True))


def _command(out: Path, steps: int | None, seed: int, short: bool, offline: bool) -> str:
    parts = ["moekit quickstart", f"--seed {seed}"]
    parts += [f"--steps {steps}"] if steps else []
    parts += ["--short"] if short else []
    parts += ["--offline"] if offline else []
    return " ".join(parts)


def _merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = _merge(merged[key], value) if both else value
    return merged
