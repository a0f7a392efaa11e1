"""A run's configuration from a YAML file and `key.sub=value` overrides, and back to a file.

Three layers, later ones winning: a preset (plain data from a recipe), the file, the overrides. Groups merge
key by key. A group of another kind (`model.kind`, or the name of a router) replaces the whole group, because
the keys of the old kind mean nothing to the new one.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import moekit
from moekit.config.atomic import write_text
from moekit.config.errors import ConfigError
from moekit.config.task_run import TaskRunConfig
from moekit.config.train import RunConfig
from moekit.config.yamlio import dump_yaml, parse_yaml, read_yaml

_EXAMPLE = "Write key=value with a dotted key, for example train.steps=500 or model.moe.router=sigmoid"
_KEY = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*\Z")


def load_run_config(
    path: Path | str | None,
    overrides: Sequence[str] = (),
    preset: Mapping[str, Any] | None = None,
    model: Mapping[str, Any] | None = None,
) -> RunConfig:
    """The configuration of a language model's run: `preset`, then the YAML file at `path`, then overrides.

    Where `model` is given, it replaces the file's whole group of that name (it is what existing weights need).

    Values of overrides are YAML: numbers (`3e-3`), `true`, `null`, lists (`train.betas=[0.9,0.99]`), text.

    Raises:
        ConfigError: an unreadable file, broken YAML, a malformed override, an unknown key (the nearest known
            one is named) or a value that breaks a rule. Errors about a key of the file begin with file:line.

    >>> load_run_config(None, ["train.steps=20", "train.optimizer.lr=3e-3"]).train.optimizer.lr
    0.003
    """
    config = load_any_config(path, overrides, preset, model)
    if not isinstance(config, RunConfig):
        raise ConfigError(
            f"{path} describes a task (it has inputs and targets), but a language model is wanted here"
        )
    return config


def load_any_config(
    path: Path | str | None,
    overrides: Sequence[str] = (),
    preset: Mapping[str, Any] | None = None,
    model: Mapping[str, Any] | None = None,
) -> RunConfig | TaskRunConfig:
    """As `load_run_config`, for a language model, or for a task where there are `inputs` or `targets`."""
    data: dict[str, Any] = dict(preset or {})
    lines: dict[str, int] = {}
    if path is not None:
        path = Path(path)
        read, lines = read_yaml(path)
        if read is not None and not isinstance(read, Mapping):
            raise ConfigError(f"{path} must hold keys and values such as `train:`; got {type(read).__name__}")
        data = _merged(data, read or {}, top=True)
    if model is not None:
        data["model"] = dict(model)
    changed = apply_overrides(data, overrides)
    kind: type[RunConfig] | type[TaskRunConfig] = RunConfig
    if "inputs" in data or "targets" in data:
        kind = TaskRunConfig
    try:
        return kind.from_dict(data)
    except ConfigError as error:
        raise ConfigError(_with_lines(str(error), path, lines, changed)) from None


def apply_overrides(data: dict[str, Any], overrides: Iterable[str]) -> list[str]:
    """Set each `key.sub=value` in plain data, and return the dotted keys.

    >>> data = {"moe": {"router": "softmax"}}
    >>> apply_overrides(data, ["moe.router.normalize=before", "seed=3"]), data
    (['moe.router.normalize', 'seed'], {'moe': {'router': {'name': 'softmax', 'normalize': 'before'}}, 'seed': 3})
    """
    changed = []
    for override in overrides:
        key, value = parse_override(override)
        _set(data, key, value)
        changed.append(key)
    return changed


def parse_override(text: str) -> tuple[str, Any]:
    """The dotted key and the value of one override.

    >>> parse_override("train.trackers=[tensorboard]")
    ('train.trackers', ['tensorboard'])
    """
    key, equals, value = text.partition("=")
    key = key.strip()
    if not equals:
        raise ConfigError(f"override {text!r} has no '='. {_EXAMPLE}")
    if not _KEY.match(key):
        raise ConfigError(f"override {text!r} has no valid key before '='; got {key!r}. {_EXAMPLE}")
    if not value.strip():
        raise ConfigError(
            f"override {text!r} has no value. Write {key}=null for none, or {key}=\"''\" for empty text"
        )
    try:
        return key, parse_yaml(value, "value")
    except ConfigError as error:
        quoted = f"{key}='\"...\"'"
        raise ConfigError(
            f"override {text!r}: {error}. Put text with special characters in quotes: {quoted}"
        ) from None


def save_run_config(config: RunConfig | TaskRunConfig, path: Path | str) -> None:
    """Write `config` as YAML, atomically; `load_run_config(path)` gives an equal configuration."""
    write_text(Path(path), f"# moekit {moekit.__version__}\n{dump_yaml(config.to_dict())}")


def _merged(base: Mapping[str, Any], over: Mapping[str, Any], top: bool = False) -> dict[str, Any]:
    """`over` laid upon `base`, group by group."""
    if not top and any(
        name in base and name in over and base[name] != over[name] for name in ("kind", "name")
    ):
        return dict(over)
    result = dict(base)
    for key, value in over.items():
        below = result.get(key)
        if isinstance(value, Mapping) and isinstance(below, Mapping):
            result[key] = _merged(below, value)
        elif isinstance(value, Mapping) and isinstance(below, str):
            result[key] = _merged({"name": below}, value)  # `router: softmax` is short for its name
        else:
            result[key] = value
    return result


def _set(data: dict[str, Any], key: str, value: Any) -> None:
    *groups, leaf = key.split(".")
    group = data
    for position, name in enumerate(groups):
        below = group.get(name)
        if below is None:
            below = {}
        elif isinstance(below, str) and name == "router":
            below = {"name": below}
        elif not isinstance(below, Mapping):
            dotted = ".".join(groups[: position + 1])
            raise ConfigError(
                f"{key} cannot be set: {dotted} is one value ({below!r}), not a group. Set {dotted}=..."
            )
        group[name] = dict(below)
        group = group[name]
    if groups[-1:] == ["router"] and "options" in group and leaf not in ("name", "options"):
        group["options"] = {**group["options"], leaf: value}  # a saved configuration spells options out
    else:
        group[leaf] = value


def _with_lines(message: str, path: Path | None, lines: Mapping[str, int], changed: Iterable[str]) -> str:
    """`message` with `file:line` before each line that is about a key of the file."""
    overridden = set(changed)
    result = []
    for line in message.splitlines():
        key = re.split(r"[\s:]", line, maxsplit=1)[0]
        while key and key not in lines and key not in overridden:
            key = key.rpartition(".")[0]
        result.append(f"{path}:{lines[key]}: {line}" if key in lines and key not in overridden else line)
    return "\n".join(result)
