"""moekit generate"""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from moekit.cli.elastic_options import routing_of, routing_options
from moekit.cli.memory_options import in_words, memory_options, opened_within
from moekit.cli.output import json_option, print_json, progress_to_stderr
from moekit.config.errors import ConfigError


@click.command("generate")
@click.argument("source", metavar="MODEL")
@click.argument("prompt", default="")
@click.option("--max-tokens", type=int, default=200, show_default=True, help="write at most this many")
@click.option(
    "--temperature", type=float, default=0.8, show_default=True, help="0 always takes the best token"
)
@click.option("--top-k", type=int, help="draw from the k most probable tokens")
@click.option("--top-p", type=float, help="draw from the most probable tokens that reach p together")
@click.option("--seed", type=int, default=0, show_default=True, help="the same seed gives the same text")
@click.option("--chat", is_flag=True, help="PROMPT is a message to a chat model, put into its template")
@routing_options
@memory_options
@click.option("--record", metavar="FOLDER", type=click.Path(path_type=Path, file_okay=False),
              help="write what routers decided of every token that is read or written")  # fmt: skip
@json_option
def command(
    source: str, prompt: str, max_tokens: int, temperature: float, top_k: int | None, top_p: float | None,
    seed: int, chat: bool, record: Path | None, as_json: bool, **options: Any,
) -> None:  # fmt: skip
    """Continue a prompt with a trained model.

    MODEL is a run, a model folder, a Hugging Face folder or name, or a GGUF file; PROMPT is text, or - to read it from
    standard input. The text appears as it is written.

    \b
        moekit generate runs/moe-small-1 "def read(path):"
        moekit generate smol "Why is the sky blue?" --chat
    """
    if prompt == "-":
        prompt = sys.stdin.read()

    def show(number: int, piece: str) -> None:
        click.echo(piece, nl=False)

    # a token is at least a byte, and a template adds what it likes
    context = None if chat else len(prompt.encode()) + 1 + max_tokens
    with progress_to_stderr(as_json), opened_within(source, options, context) as (opened, fitted):
        from moekit.generate.chat import chat_ids
        from moekit.generate.text import generate
        from moekit.generate.trace import RoutingTrace

        tokenizer = opened.tokenizer
        if tokenizer is None:
            raise ConfigError(f"{source} has no tokenizer that moekit reads")
        start = chat_ids(opened.tokenizer_files, tokenizer, prompt, source) if chat else prompt
        elastic, pace = routing_of(opened.model, options)
        trace = None if record is None else RoutingTrace(opened.model)
        if not as_json and not chat:
            click.echo(prompt, nl=False)
        (answer,) = generate(
            opened.model, tokenizer, [start], max_new_tokens=max_tokens, temperature=temperature, top_k=top_k,
            top_p=top_p, seed=seed, on_token=None if as_json else show, trace=trace, elastic=elastic, pace=pace,
        )  # fmt: skip
        if trace is not None and record is not None:
            trace.record(
                model=source, prompt=prompt, text=answer.text, seed=seed, temperature=temperature
            ).save(record)
    if as_json:
        steps = [entry["steps"] for entry in opened.history if "steps" in entry]
        step = steps[-1] if steps else None
        more: dict[str, Any] = (
            {"routing": str(elastic)} if elastic else {"pace": pace.report()} if pace else {}
        )
        if fitted is not None:
            more["memory"] = fitted.report()
        print_json({"model": source, "step": step, "prompt": prompt, **asdict(answer), **more})
        return
    click.echo()
    click.echo(f"{len(answer.token_ids)} tokens, {answer.tokens_per_second:.0f} tokens/s", err=True)
    for said in ([] if fitted is None else [in_words(fitted)]) + ([] if pace is None else [pace.in_words()]):
        click.echo(said, err=True)
