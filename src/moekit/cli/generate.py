"""moekit generate"""

from __future__ import annotations

import sys
from pathlib import Path

import click

from moekit.cli.output import json_option, print_json, progress_to_stderr


@click.command("generate")
@click.argument("run", type=click.Path(path_type=Path))
@click.argument("prompt")
@click.option(
    "--max-tokens", type=click.IntRange(min=1), default=200, show_default=True, help="stop after these"
)
@click.option(
    "--temperature", type=click.FloatRange(min=0), default=0.8, show_default=True, help="0 takes the best"
)
@click.option("--top-k", type=click.IntRange(min=1), help="draw from the k most probable tokens only")
@click.option(
    "--top-p", type=click.FloatRange(0, 1, min_open=True), help="draw from the tokens that reach p only"
)
@click.option(
    "--seed", type=click.IntRange(min=0), default=0, show_default=True, help="the same text each time"
)
@json_option
def command(
    run: Path,
    prompt: str,
    max_tokens: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    seed: int,
    as_json: bool,
) -> None:
    """Continue a prompt with the model of a run.

    RUN is the folder of a run; PROMPT is text, or - to read it from standard input.

    \b
        moekit generate runs/quickstart/moe "def main():"
    """
    if prompt == "-":
        prompt = sys.stdin.read()
    with progress_to_stderr(as_json):
        from moekit.generate.text import generate_text
        from moekit.train.run import load_run

        loaded = load_run(run)
        text = generate_text(
            loaded.model, loaded.tokenizer, prompt, max_tokens=max_tokens, temperature=temperature,
            top_k=top_k, top_p=top_p, seed=seed,
        )  # fmt: skip
    if as_json:
        print_json({"prompt": prompt, "text": text, "run": run, "step": loaded.step})
    else:
        click.echo(prompt + text)
