"""moekit bench layer, step, decode, model"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from moekit.cli.bench_report import common_options, measured, numbers, read_numbers, sizes, typed, words
from moekit.cli.output import overrides_argument


@click.group("bench", no_args_is_help=True)
def command() -> None:
    """Time moekit against other libraries on this machine, in one run, with every answer checked."""


@command.command("layer")
@click.option(
    "--preset", "presets", multiple=True, help="e16-k2, e32-k4 or e64-k8, may be repeated; else all"
)
@sizes("tokens", "d-model", "d-expert", "experts", "top-k")
@typed
@click.option("--backward/--no-backward", default=None, help="only the one or only the other; else both")
@click.option("--memory", is_flag=True, help="peak memory of each contestant too, in a process of its own")
@common_options("transformers,dense", repeats=9)
def layer(presets: tuple[str, ...], dtype: str, backward: bool | None, memory: bool, **options: Any) -> None:
    """One expert layer: forward, and forward and backward, with the routing given.

    Sizes that are not given are those of the preset e16-k2.
    """
    from moekit.evaluate.bench.layer import layer_shapes, run_layer

    with measured("layer", options) as run:
        shapes = layer_shapes(presets, **run.sizes)
        run.cases = run_layer(
            shapes, dtype=dtype, backward=backward, against=run.against, with_memory=memory, **run.common
        )


@command.command("step")
@overrides_argument
@typed
@common_options("transformers,dense", repeats=9)
def step(overrides: tuple[str, ...], dtype: str, **options: Any) -> None:
    """A whole training step of the quickstart's sparse model, of its dense twin and of OLMoE.

    KEY=VALUE changes single keys of the quickstart's configuration, such as model.moe.n_experts=64.
    """
    from moekit.config.loading import load_run_config
    from moekit.evaluate.bench.step import run_step
    from moekit.recipes.quickstart import quickstart_recipe

    with measured("step", options) as run:
        config = load_run_config(None, overrides, preset=quickstart_recipe()["run"])
        run.cases = run_step(config, dtype=dtype, against=run.against, **run.common)


@command.command("decode")
@numbers("--tokens", "1,4,16", "tokens at once, a case for each number")
@numbers("--bits", "16,8,4", "bits of moekit's weights; 16 is bfloat16")
@click.option("--group-size", type=int, default=64, show_default=True, help="weights that share one scale")
@sizes("d-model", "d-expert", "experts", "top-k", "layers")
@common_options("transformers", repeats=9)
def decode(tokens: str, bits: str, group_size: int, **options: Any) -> None:
    """The experts of a few tokens, in bfloat16 and in fewer bits: gigabytes of weights a second."""
    from moekit.evaluate.bench.decode import DecodeShape, run_decode

    with measured("decode", options) as run:
        run.cases = run_decode(
            DecodeShape(**run.sizes), tokens=read_numbers("--tokens", tokens), bits=read_numbers("--bits", bits),
            group_size=group_size, against=run.against, **run.common,
        )  # fmt: skip


@command.command("model")
@sizes("layers", "d-model", "d-expert", "experts", "top-k", "heads", "vocab-size", "prompt", "new-tokens")
@click.option("--formats", default="bf16,Q8_0,Q4_0", show_default=True, help="GGUF types for llama-cpp")
@click.option(
    "--gguf", type=click.Path(path_type=Path, file_okay=False), help="folder that keeps the GGUF files"
)
@common_options("transformers", repeats=5, warmup=1)
def model(formats: str, gguf: Path | None, **options: Any) -> None:
    """A whole OLMoE-shaped model: prefill of a prompt, and decoding behind it with the key/value cache."""
    from moekit.convert.transformers import undo, use_in_transformers
    from moekit.evaluate.bench.model import ModelShape, run_model

    with measured("model", options) as run:
        run.cases = run_model(
            ModelShape(**run.sizes), use_moekit=use_in_transformers, undo_moekit=undo,
            against=run.against, formats=words(formats), folder=gguf, threads=run.threads,
            **run.common,
        )  # fmt: skip
