"""The base of every configuration class: frozen, typed, and strict about unknown keys."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from moekit.config.errors import ConfigError, nearest

C = TypeVar("C", bound="StrictConfig")


class StrictConfig(BaseModel):
    """Frozen pydantic model whose unknown keys are errors that name the nearest known key.

    Build from plain data with `from_dict(data, where="model.moe")`, which turns every pydantic error into a
    `ConfigError` that names the dotted field, the value and the rule.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, protected_namespaces=())

    @classmethod
    def from_dict(cls: type[C], data: Mapping[str, Any], where: str = "") -> C:
        """Validate plain data. `where` is the dotted prefix of the field names in errors."""
        try:
            return cls.model_validate(dict(data))
        except ValidationError as error:
            raise ConfigError(_explain(error, cls, where)) from None

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON-ready data; `from_dict(to_dict())` gives an equal configuration."""
        return self.model_dump(mode="json")

    def replace(self: C, **changes: Any) -> C:
        """A validated copy with some fields changed."""
        return type(self).from_dict(
            {**{name: getattr(self, name) for name in type(self).model_fields}, **changes}
        )


def _explain(error: ValidationError, cls: type[BaseModel], where: str) -> str:
    lines = []
    for item in error.errors():
        # an unknown key is the last part of its place, and no field
        path = _without_tags(cls, [str(part) for part in item["loc"]], item["type"] == "extra_forbidden")
        dotted = ".".join(([where] if where else []) + path)
        if item["type"] == "extra_forbidden":
            known = _fields_at(cls, [str(part) for part in item["loc"][:-1]])
            lines.append(f"{dotted} is not a known key: {nearest(path[-1], known)}")
        elif item["type"] == "value_error":
            # our own rules begin with the name of the field, so the dotted prefix completes it
            message = str(item["ctx"]["error"]) if "ctx" in item else item["msg"]
            lines.append(f"{dotted}.{message}" if dotted else message)
        elif item["type"] == "union_tag_invalid":
            key, kinds = (
                item["ctx"]["discriminator"].strip("'"),
                item["ctx"]["expected_tags"].replace("'", ""),
            )
            lines.append(f"{dotted}.{key} must be one of {kinds}; got {item['ctx']['tag']!r}")
        elif item["type"] == "missing":
            lines.append(f"{dotted} is required")
        else:
            rule = item["msg"][:1].lower() + item["msg"][1:]
            lines.append(f"{dotted}: {rule}; got {item['input']!r}")
    return "\n".join(lines)


def _without_tags(cls: type[BaseModel], path: list[str], keep_last: bool) -> list[str]:
    """`path` without the union tags that pydantic puts among the names of fields."""
    kept: list[str] = []
    current: list[type[BaseModel]] = [cls]
    for position, part in enumerate(path):
        fields = [model.model_fields[part] for model in current if part in model.model_fields]
        if fields or not current or (keep_last and position == len(path) - 1):
            kept.append(part)
            current = [model for field in fields for model in _models_in(field.annotation)]
    return kept


def _fields_at(cls: type[BaseModel], path: list[str]) -> list[str]:
    """Field names of the model reached from `cls` along `path`; the tag of a union picks one of its models."""
    current: list[type[BaseModel]] = [cls]
    for part in path:
        if len(current) > 1:
            current = [model for model in current if part in _kinds(model)] or current
        following: list[type[BaseModel]] = []
        for model in current:
            field = model.model_fields.get(part)
            if field is not None:
                following += _models_in(field.annotation)
        if following:
            current = following
    return sorted({name for model in current for name in model.model_fields})


def _kinds(model: type[BaseModel]) -> tuple[Any, ...]:
    kind = model.model_fields.get("kind")
    return getattr(kind.annotation, "__args__", ()) if kind is not None else ()


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    found: list[type[BaseModel]] = []
    for part in getattr(annotation, "__args__", ()):
        found += _models_in(part)
    return found
