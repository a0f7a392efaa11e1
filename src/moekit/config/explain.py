"""What a configuration key means, read from the fields: type, default, allowed range, description."""

from __future__ import annotations

import types
import typing
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from moekit.config.errors import ConfigError, nearest
from moekit.config.moe import RouterConfig
from moekit.config.train import RunConfig
from moekit.config.yamlio import dump_yaml

_PLAIN = {
    int: "integer",
    float: "number",
    str: "text",
    bool: "true or false",
    type(None): "null",
    Any: "any value",
}
_BOUNDS = {"ge": "at least", "gt": "greater than", "le": "at most", "lt": "less than"}


@dataclass(frozen=True)
class KeyInfo:
    """One key of the configuration. A key that two kinds of model share has one `KeyInfo` for each kind.

    Attributes:
        key: dotted, as in the YAML file and in overrides.
        kind: the kind of group that the key belongs to ("decoder"), or "" where there is but one.
        type: in words, "integer or null".
        default: as YAML; None for a group or a key that must be given.
        allowed: the range in words, or "".
        description: what it does.
        children: name and first words of each key of a group.
    """

    key: str
    kind: str
    type: str
    default: str | None
    allowed: str
    description: str
    children: dict[str, str] = field(default_factory=dict)


def describe_key(key: str, root: type[BaseModel] = RunConfig) -> list[KeyInfo]:
    """What `key` means, once for each kind of group that has it; "" gives the top of the configuration.

    Raises:
        ConfigError: no such key; the message names the nearest.
    """
    parts = [part for part in key.split(".") if part]
    models: list[type[BaseModel]] = [root]
    if not parts:
        return [KeyInfo("", "", "group", None, "", _summary(root), _children(root))]
    for position, name in enumerate(parts):
        dotted = ".".join(parts[: position + 1])
        owners = [model for model in models if name in model.model_fields]
        if not owners:
            raise ConfigError(_unknown(parts, position, models))
        models = [inner for owner in owners for inner in _models_in(owner.model_fields[name].annotation)]
        if position < len(parts) - 1 and not models:
            if issubclass(owners[0], RouterConfig):
                raise ConfigError(
                    f"{key}: the options of a router are those of its class; see moekit.layers.routing"
                )
            raise ConfigError(f"{key} is not a known key: {dotted} is one value, not a group")
    found = [_info(dotted, owner, owner.model_fields[parts[-1]]) for owner in owners]
    merged = {(info.type, info.default, info.allowed, info.description): info for info in found}
    if len(merged) == 1 and len(found) > 1:
        return [KeyInfo(**{**asdict(found[0]), "kind": ""})]
    return found


def explain_key(key: str, root: type[BaseModel] = RunConfig) -> str:
    """`describe_key` as text for a terminal.

    >>> print(explain_key("train.schedule.final_scale"))
    train.schedule.final_scale
      learning rate at the end, as a share of the peak
      type:     number
      default:  0.05
      allowed:  at least 0, at most 1
    """
    return "\n\n".join(_as_text(info) for info in describe_key(key, root))


def all_keys(root: type[BaseModel] = RunConfig, prefix: str = "") -> Iterator[str]:
    """Every dotted key, groups before their children, each once.

    >>> list(all_keys())[:3]
    ['name', 'runs_dir', 'model']
    """
    names: dict[str, list[type[BaseModel]]] = {}
    for model in [root] if not prefix else _models_at(prefix, root):
        for name, info in model.model_fields.items():
            names.setdefault(name, []).extend(_models_in(info.annotation))
    for name, inner in names.items():
        dotted = f"{prefix}.{name}" if prefix else name
        yield dotted
        if inner:
            yield from all_keys(root, dotted)


def _models_at(key: str, root: type[BaseModel]) -> list[type[BaseModel]]:
    models = [root]
    for name in key.split("."):
        fields = [model.model_fields[name] for model in models if name in model.model_fields]
        models = [inner for info in fields for inner in _models_in(info.annotation)]
    return models


def _unknown(parts: list[str], position: int, models: list[type[BaseModel]]) -> str:
    prefix = ".".join(parts[:position])
    known = sorted({name for model in models for name in model.model_fields})
    elsewhere = [key for key in all_keys() if key.split(".")[-1] == parts[-1]]
    hint = f". A key of that name stands at: {', '.join(elsewhere)}" if elsewhere else ""
    dotted = f"{prefix}.{parts[position]}" if prefix else parts[position]
    return f"{dotted} is not a known key: {nearest(parts[position], known)}{hint}"


def _info(key: str, owner: type[BaseModel], info: FieldInfo) -> KeyInfo:
    models = _models_in(info.annotation)
    children = _children(*models)
    description = info.description or (_summary(models[0]) if len(models) == 1 else "")
    default = (
        info.get_default(call_default_factory=True, validated_data={}) if not info.is_required() else None
    )
    default = list(default) if isinstance(default, tuple) else default
    shown = (
        None
        if info.is_required() or isinstance(default, BaseModel)
        else dump_yaml({"v": default})[3:].strip()
    )
    return KeyInfo(
        key, _kind_of(owner), type_in_words(info.annotation), shown, _allowed(info), description, children
    )


def _kind_of(model: type[BaseModel]) -> str:
    kind = model.model_fields.get("kind")
    options = typing.get_args(kind.annotation) if kind is not None else ()
    return str(options[0]) if len(options) == 1 else ""


def _summary(model: type[BaseModel]) -> str:
    return (model.__doc__ or "").strip().split("\n\n")[0].replace("\n", " ").replace("    ", "")


def _children(*models: type[BaseModel]) -> dict[str, str]:
    """Name and description of each key; a key that only some of the models have says which."""
    result: dict[str, str] = {}
    for model in models:
        for name, info in model.model_fields.items():
            if name in result:
                continue
            inner = _models_in(info.annotation)
            words = info.description or (
                _summary(inner[0]) if len(inner) == 1 else type_in_words(info.annotation)
            )
            owners = [owner for owner in models if name in owner.model_fields]
            if len(owners) < len(models):
                words += f" ({', '.join(_kind_of(owner) for owner in owners)} only)"
            elif name == "kind" and len(models) > 1:
                words = f"one of: {', '.join(_kind_of(owner) for owner in models)}"
            result[name] = words
    return result


def type_in_words(annotation: Any) -> str:
    """A type annotation for readers who do not write Python.

    >>> type_in_words(int | None), type_in_words(typing.Literal["a", "b"]), type_in_words(tuple[float, float])
    ('integer or null', 'one of: a, b', 'list of 2: number, number')
    """
    if annotation in _PLAIN:
        return _PLAIN[annotation]
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return type_in_words(arguments[0])
    if origin is typing.Literal:
        return (
            f"one of: {', '.join(str(item) for item in arguments)}"
            if len(arguments) > 1
            else f"{arguments[0]}"
        )
    if origin in (typing.Union, types.UnionType):
        return " or ".join(dict.fromkeys(type_in_words(part) for part in arguments))
    if origin in (tuple, list):
        if origin is list or arguments[-1] is Ellipsis:
            return f"list, each {type_in_words(arguments[0])}"
        return f"list of {len(arguments)}: {', '.join(type_in_words(part) for part in arguments)}"
    if origin is dict:
        return "keys and values"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        kind = _kind_of(annotation)
        return f"group of kind {kind}" if kind else "group"
    return getattr(annotation, "__name__", str(annotation))


def _allowed(info: FieldInfo) -> str:
    found = []
    for item in info.metadata:
        for name, words in _BOUNDS.items():
            limit = getattr(item, name, None)
            if limit is not None:
                found.append(f"{words} {limit}")
    return ", ".join(found)


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in typing.get_args(annotation) for model in _models_in(part)]


def _as_text(info: KeyInfo) -> str:
    lines = [f"{info.key or 'configuration of a run'}{f'  (kind: {info.kind})' if info.kind else ''}"]
    if info.description:
        lines.append(f"  {info.description}")
    if info.key:
        lines.append(f"  type:     {info.type}")
    if info.default is not None:
        lines.append(f"  default:  {info.default}")
    if info.allowed:
        lines.append(f"  allowed:  {info.allowed}")
    if info.children:
        width = max(len(name) for name in info.children)
        lines.append("  keys:")
        lines += [f"    {name:<{width}}  {words}".rstrip() for name, words in info.children.items()]
    return "\n".join(lines)
