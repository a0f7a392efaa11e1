"""Experts on disk against all in memory: tokens per second, hit rates, equal answers, by the memory that is allowed.

    python benchmarks/disk_experts.py RUN [--made FOLDER] [--rounds 3] [--tokens 16] [--shares 100,50,25,10] [--write]

Two models: RUN, which was trained, and one of random bfloat16 weights that is written into FOLDER and removed at the
end (as large as --made-layers, --made-experts and --made-width say). Each setting and a model that is wholly in memory
write the same texts in turns, in one process, on one thread for the products (and one that reads); every token is
compared, and logits bit for bit. Reported are medians over the rounds of the ratio of their seconds. "Dropped" settings
have the system forget each page of the file that was read, so that every miss comes from the disk.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from common import write_result

from moekit.config.model import ModelConfig
from moekit.convert.formats.folder import write_model_folder
from moekit.generate.text import generate
from moekit.models import build_model
from moekit.serve.eviction import belady_hits, hits_of, make_policy
from moekit.serve.fitting import FittedModel, fit_to_memory
from moekit.serve.memory_plan import MemoryPlan

WAYS: dict[str, dict[str, Any]] = {
    "as it comes": {},
    "aged, ahead": {"policy": "aged", "read_ahead": True},
    "lru": {"policy": "lru"},
    "aged, dropped": {"policy": "aged", "read_ahead": False, "keep_pages": False},
    "aged, ahead, dropped": {"policy": "aged", "read_ahead": True, "keep_pages": False},
}
# of the larger model, which is slow
FEW = ("as it comes", "aged, dropped", "aged, ahead, dropped")
TEXTS = (
    "def read(path):\n", "To be, or not to be", "Fellow citizens of the Senate and House of Representatives",
    "The following operators have the same precedence", "本报北京",
)  # fmt: skip


class Ids:
    """Tokens without texts."""

    end_id = 0

    def encode(self, text: str) -> list[int]:
        return []

    def decode(self, ids: Sequence[int]) -> str:
        return ""


class Bench:
    """One model, wholly in memory and within some memory, on the same texts."""

    def __init__(self, source: Path, tokens: int, rounds: int, context: int) -> None:
        self.source, self.tokens, self.rounds, self.context = source, tokens, rounds, context
        self.whole = fit_to_memory(source, None, context=context)
        self.plan: MemoryPlan = self.whole.plan
        size = self.whole.model.config.vocab_size
        torch.manual_seed(0)
        self.long = torch.randint(1, size, (1, min(context, 256)))
        tokenizer = self.whole.opened.tokenizer
        self.tokenizer: Any = tokenizer or Ids()
        texts = [[0, *tokenizer.encode(text)] for text in TEXTS] if tokenizer else []
        self.prompts = texts or [torch.randint(1, size, (12,)).tolist() for _ in TEXTS]

    def write(self, model: torch.nn.Module, number: int) -> tuple[float, float, tuple[int, ...]]:
        """Seconds, processor seconds of all threads, tokens."""
        began, worked = time.perf_counter(), time.process_time()
        (answer,) = generate(
            model, self.tokenizer, [self.prompts[number % len(self.prompts)]], max_new_tokens=self.tokens,
            temperature=0.8, seed=number, stop_at_end=False,
        )  # fmt: skip
        return time.perf_counter() - began, time.process_time() - worked, answer.token_ids

    @torch.no_grad()
    def prefill(self, model: torch.nn.Module) -> tuple[float, torch.Tensor]:
        began = time.perf_counter()
        logits = model(self.long).logits
        return time.perf_counter() - began, logits

    @contextmanager
    def within(self, share: float, **way: Any) -> Iterator[FittedModel]:
        memory = self.plan.memory_for(share)
        with fit_to_memory(self.source, memory, context=self.context, **way) as fitted:
            yield fitted

    def compare(self, share: float, **way: Any) -> dict[str, Any]:
        """Medians of one setting against the whole model, in turns; stops where an answer differs."""
        with self.within(share, **way) as fitted:
            if not way.get("keep_pages", True) and fitted.store is not None:
                fitted.source.files.drop_pages()
            self.write(fitted.model, 0)  # fills the slots
            if fitted.store is not None:
                fitted.store.reset()
            ratios, worked, rates, whole_rates = [], [], [], []
            for number in range(1, self.rounds + 1):
                turns = [self.whole.model, fitted.model]
                measured = {}
                for place in (0, 1) if number % 2 else (1, 0):
                    measured[place] = self.write(turns[place], number)
                if measured[0][2] != measured[1][2]:
                    raise SystemExit(f"other tokens at {share:.0%} with {way}")
                ratios.append(measured[1][0] / measured[0][0])
                worked.append(measured[1][1] / measured[0][1])
                rates.append(self.tokens / measured[1][0])
                whole_rates.append(self.tokens / measured[0][0])
            counts = None if fitted.store is None else fitted.store.counts.report()
            prompt = []
            for _ in range(max(self.rounds // 2, 1)):
                seconds, logits = self.prefill(self.whole.model)
                ours, our_logits = self.prefill(fitted.model)
                if not torch.equal(logits, our_logits):
                    raise SystemExit(f"other logits at {share:.0%} with {way}")
                prompt.append(ours / seconds)
            return {
                "share": share, "memory": fitted.plan.memory, "experts_in_memory": fitted.plan.share_in_memory,
                "times_slower": statistics.median(ratios), "lowest": min(ratios), "highest": max(ratios),
                "processor_times": statistics.median(worked),
                "tokens_per_second": statistics.median(rates),
                "whole_tokens_per_second": statistics.median(whole_rates),
                "prompt_times_slower": statistics.median(prompt), "store": counts,
            }  # fmt: skip

    def policies(self, shares: Sequence[float]) -> list[dict[str, Any]]:
        """Hit rates of the policies and of Belady's rule on what the texts asked for."""
        with self.within(min(shares), read_ahead=False, trace=True) as fitted:
            if fitted.store is None:
                return []
            for number in range(self.rounds + 1):
                self.write(fitted.model, number)
            trace = fitted.store.trace or []
        (form,) = self.plan.forms
        found = []
        for share in shares:
            slots = max(form.top_k, -int(-share * form.n_experts // 1))
            rates: dict[str, Any] = {"share": share}
            for name in ("lru", "aged"):
                hits, needed = hits_of(trace, slots, make_policy(name, form.top_k * len(form.layers)))
                rates[name] = hits / needed
            hits, needed = belady_hits(trace, slots)
            found.append({**rates, "belady": hits / needed, "needed": needed})
        return found


def made_model(folder: Path, layers: int, experts: int, width: int) -> None:
    """A folder with a decoder of random bfloat16 weights."""
    config = ModelConfig.from_dict({
        "vocab_size": 8192, "d_model": width, "n_layers": layers, "n_heads": width // 64, "max_seq_len": 1024,
        "d_ff": width, "init_std": 0.02, "embedding_scale": 11.3, "embedding_std": 0.06,
        "moe": {"n_experts": experts, "top_k": 4, "d_expert": width + width // 4},
    })  # fmt: skip
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    try:
        model = build_model(config)
    finally:
        torch.set_default_dtype(torch.float32)
    folder.mkdir(parents=True)
    write_model_folder(model, folder, [{"step": "random weights"}], {})


def disk_rate(bench: Bench, share: float) -> float | None:
    """Bytes per second of reading experts one after the other with no page kept."""
    with bench.within(share, read_ahead=False, keep_pages=False) as fitted:
        store = fitted.store
        if store is None:
            return None
        fitted.source.files.drop_pages()
        shelf = store.shelves[0]
        keys = [(layer, expert) for layer, n in shelf.layers.items() for expert in range(n)][
            :: 1 + len(shelf.layers)
        ]
        began = time.perf_counter()
        for key in keys[:40]:
            with store.held([key]):
                pass
        return store.counts.bytes_read / (time.perf_counter() - began)


def measure(
    name: str,
    source: Path,
    shares: Sequence[float],
    given: argparse.Namespace,
    context: int,
    ways: Sequence[str] = tuple(WAYS),
) -> dict[str, Any]:
    bench = Bench(source, given.tokens, given.rounds, context)
    plan = bench.plan
    (form,) = plan.forms
    print(
        f"{name}: {plan.expert_bytes / 1e6:,.0f} MB of experts, {form.n_experts} of {form.expert_bytes / 1e6:.2f} MB"
    )
    rows = []
    for share in shares:
        for way in ways:
            options = WAYS[way]
            if share >= 1 and way != "as it comes":
                continue
            row = {
                "model": name,
                "way": way if share < 1 else "all in memory",
                **bench.compare(share, **options),
            }
            rows.append(row)
            store = row["store"] or {"hit_rate": 1.0, "bytes_read": 0}
            print(f"  {share:4.0%} {row['way']:22} hits {store['hit_rate']:6.1%} {row['times_slower']:6.2f} times "
                  f"[{row['lowest']:.2f}, {row['highest']:.2f}] work {row['processor_times']:.2f} "
                  f"prompt {row['prompt_times_slower']:.2f} {row['tokens_per_second']:.1f} tokens/s",
                  flush=True)  # fmt: skip
    below = [share for share in shares if share < 1]
    return {
        "model": name, "expert_bytes": plan.expert_bytes, "dense_bytes": plan.dense_bytes,
        "experts": plan.forms[0].n_experts, "bytes_of_an_expert": plan.forms[0].expert_bytes,
        "experts_of_a_token": plan.forms[0].top_k * len(plan.forms[0].layers),
        "precision": plan.precision, "disk_bytes_per_second": disk_rate(bench, min(below)),
        "rows": rows, "policies": bench.policies(below),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--made", type=Path, help="a folder for the larger model; it must not exist")
    sizes = {"rounds": 3, "tokens": 16, "made-layers": 4, "made-experts": 64, "made-width": 1024}
    for name, default in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--shares", default="100,50,25,10")
    parser.add_argument("--write", action="store_true", help="write docs/results/disk-experts.json")
    given = parser.parse_args()
    torch.set_num_threads(1)
    shares = [float(share) / 100 for share in given.shares.split(",")]
    found = [measure("quickstart", given.run, shares, given, 256)]
    if given.write:
        _write(found, given)
    if given.made is not None:
        try:
            made_model(given.made, given.made_layers, given.made_experts, given.made_width)
            found.append(measure("made", given.made, shares, given, 512, FEW))
        finally:
            shutil.rmtree(given.made, ignore_errors=True)
        if given.write:
            _write(found, given)


def _write(found: list[dict[str, Any]], given: argparse.Namespace) -> None:
    columns = [
        "model",
        "experts in memory",
        "setting",
        "hit rate",
        "MB read a token",
        "times slower",
        "processor time",
    ]
    columns.append("prompt, times slower")
    rows = []
    for model in found:
        size = f"{model['model']}, {model['expert_bytes'] / 1e6:,.0f} MB of experts"
        for row in model["rows"]:
            store, n = row["store"], given.tokens * given.rounds
            rows.append([
                size, f"{row['experts_in_memory']:.0%}", row["way"],
                "-" if store is None else f"{store['hit_rate']:.1%}",
                "0" if store is None else f"{store['bytes_read'] / n / 1e6:.2f}",
                f"{row['times_slower']:.2f}", f"{row['processor_times']:.2f}", f"{row['prompt_times_slower']:.2f}",
            ])  # fmt: skip
    command = (
        f"python benchmarks/disk_experts.py RUN --made FOLDER --rounds {given.rounds} --tokens {given.tokens} "
        f"--made-layers {given.made_layers} --made-experts {given.made_experts} --made-width {given.made_width} --write"
    )
    note = (
        "Each setting and a model that is wholly in memory write the same sampled texts in turns; every token was "
        "equal, and the logits of a long prompt bit for bit. Times slower: medians of the ratio of seconds, one thread "
        "for products; processor time: the same of all threads' work, which other programs on the machine disturb "
        "less. Hit rate: experts that were in memory when needed. Dropped: no page of the file is kept, every miss "
        "comes from the disk."
    )
    write_result("disk-experts", "Experts on disk", command, note, columns, rows, models=found)


if __name__ == "__main__":
    main()
