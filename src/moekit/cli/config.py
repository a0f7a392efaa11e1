"""moekit config explain, moekit config show"""

from __future__ import annotations

from pathlib import Path

import click

from moekit.cli.output import json_option, overrides_argument, print_json


@click.group("config", no_args_is_help=True)
def command() -> None:
    """Explain a configuration key, or show a whole configuration."""


@command.command("explain")
@click.argument("key", default="")
@json_option
def explain(key: str, as_json: bool) -> None:
    """What KEY means: type, default, allowed range and, for a group, its keys.

    Without KEY, the top of the configuration.

    \b
        moekit config explain model.moe.top_k
        moekit config explain train.optimizer
    """
    from dataclasses import asdict

    from moekit.config.explain import describe_key, explain_key

    if as_json:
        print_json([asdict(info) for info in describe_key(key)])
    else:
        click.echo(explain_key(key))
        if key in ("model.moe.router", "model.moe.router.name", "model.moe.router.options"):
            _show_routers()


@command.command("show")
@click.argument("config", type=click.Path(path_type=Path), required=False)
@overrides_argument
@json_option
def show(config: Path | None, overrides: tuple[str, ...], as_json: bool) -> None:
    """The whole configuration that CONFIG and KEY=VALUE give, defaults included.

    Without CONFIG, the defaults. The answer is a YAML file that `moekit train` takes.
    """
    from moekit.config.loading import load_run_config
    from moekit.config.yamlio import dump_yaml

    if config is not None and "=" in str(config) and not config.exists():
        config, overrides = None, (str(config), *overrides)
    run_config = load_run_config(config, overrides)
    if as_json:
        print_json(run_config.to_dict())
    else:
        click.echo(dump_yaml(run_config.to_dict()), nl=False)


def _show_routers() -> None:
    """Each registered router with its options, which are keys beside its name."""
    from moekit.config.explain import describe_key
    from moekit.layers.routing import ROUTERS

    click.echo("\nrouters (their options stand beside the name, {name: softmax, normalize: before})")
    for name, router in sorted(ROUTERS.items()):
        summary = " ".join((router.__doc__ or "").strip().split("\n\n")[0].split())
        click.echo(f"  {name}: {summary}")
        for option in router.Options.model_fields:
            for info in describe_key(option, router.Options):
                facts = [f"default {info.default}" if info.default is not None else "required", info.allowed]
                inside = "; ".join(part for part in (info.type, *facts) if part)
                click.echo(f"      {option}: {info.description} ({inside})")
