"""YAML as a configuration needs it: YAML 1.2 scalars, no key given twice, and a line for every key.

Plain PyYAML follows YAML 1.1, where `3e-3` is text, `no` is false, `12:30` is 750 and `010` is 8. Here
numbers, booleans and null follow the core schema of YAML 1.2 (with underscores allowed in numbers: `4_096`),
so a learning rate is a number and everything else is the text that was typed.
"""

from __future__ import annotations

import re
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

from moekit.config.errors import ConfigError

_SCALARS = (
    # a plain scalar is null, boolean, integer or float where it matches, and text otherwise
    ("null", r"~|null|Null|NULL|", "~nN"),
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?[0-9](_?[0-9])*|0o[0-7]+|0x[0-9a-fA-F]+", "-+0123456789"),
    (
        "float",
        r"[-+]?(\.[0-9](_?[0-9])*|[0-9](_?[0-9])*(\.([0-9](_?[0-9])*)?)?)([eE][-+]?[0-9]+)?"
        r"|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        "-+.0123456789",
    ),
    ("merge", r"<<", "<"),
)


def _resolvers() -> dict[str, list[tuple[str, re.Pattern[str]]]]:
    table: dict[str, list[tuple[str, re.Pattern[str]]]] = {}
    for name, pattern, first_characters in _SCALARS:
        entry = (f"tag:yaml.org,2002:{name}", re.compile(rf"(?:{pattern})\Z"))
        for character in first_characters:
            table.setdefault(character, []).append(entry)
    table[""] = [table["~"][0]]
    return table


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers = _resolvers()

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: dict[str, int] = {}
        for key_node, _ in node.value:
            if key_node.tag.endswith(":merge"):
                continue
            mark = key_node.start_mark
            if not isinstance(key_node, yaml.ScalarNode) or not key_node.tag.endswith(":str"):
                shown = key_node.value if isinstance(key_node, yaml.ScalarNode) else f"a {key_node.id}"
                raise _Refused(mark, f"keys must be text; got {shown}. Put it in quotes")
            if key_node.value in seen:
                first = seen[key_node.value]
                raise _Refused(
                    mark, f"key {key_node.value!r} is given twice (first on line {first}). Remove one"
                )
            seen[key_node.value] = mark.line + 1
        return super().construct_mapping(node, deep)


class _Refused(yaml.MarkedYAMLError):
    def __init__(self, mark: yaml.Mark, problem: str) -> None:
        super().__init__(problem=problem, problem_mark=mark)


def _construct_int(loader: _Loader, node: yaml.ScalarNode) -> int:
    text = node.value.replace("_", "")
    base = {"0o": 8, "0x": 16}.get(text[:2], 10)
    return int(text, base)


def _construct_float(loader: _Loader, node: yaml.ScalarNode) -> float:
    text = node.value.replace("_", "").lower()
    return float(text.replace(".inf", "inf").replace(".nan", "nan"))


_Loader.add_constructor("tag:yaml.org,2002:int", _construct_int)
_Loader.add_constructor("tag:yaml.org,2002:float", _construct_float)


class _Dumper(yaml.SafeDumper):
    # the same table as the loader, so that text that looks like a number is written in quotes
    yaml_implicit_resolvers = _resolvers()

    def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:
        super().increase_indent(flow, False)

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _represent_list(dumper: _Dumper, value: list[Any]) -> yaml.SequenceNode:
    short = not any(isinstance(item, list | dict) for item in value)
    return dumper.represent_sequence("tag:yaml.org,2002:seq", value, flow_style=short)


def _represent_float(dumper: _Dumper, value: float) -> yaml.ScalarNode:
    text = {"inf": ".inf", "-inf": "-.inf", "nan": ".nan"}.get(repr(value), repr(value))
    return dumper.represent_scalar("tag:yaml.org,2002:float", text)


_Dumper.add_representer(float, _represent_float)
_Dumper.add_representer(list, _represent_list)


def parse_yaml(text: str, source: str) -> Any:
    """Plain data from YAML text; `source` names it in errors.

    Raises:
        ConfigError: broken YAML, a key given twice or a key that is not text, with source, line and column.

    >>> parse_yaml("lr: 3e-3\\nname: no", "example")
    {'lr': 0.003, 'name': 'no'}
    """
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"{source}:{mark.line + 1}:{mark.column + 1}" if mark is not None else source
        problem = " ".join(part for part in (error.context, error.problem) if part)
        raise ConfigError(f"{place}: {problem}{_hint(error)}") from None
    except yaml.reader.ReaderError as error:
        problem = f"character {error.character!r} at position {error.position}: {error.reason}"
        raise ConfigError(f"{source}: {problem}") from None
    except RecursionError:
        raise ConfigError(f"{source}: nested too deeply") from None


def _hint(error: yaml.MarkedYAMLError) -> str:
    problem = error.problem or ""
    if "'\\t'" in problem:
        return ". YAML is indented with spaces, not tabs"
    if "mapping values are not allowed" in problem:
        return ". Indent the keys of one group alike, and put text with a colon in quotes"
    return ""


def read_yaml(path: Path) -> tuple[Any, dict[str, int]]:
    """Plain data of a YAML file, and the line of each dotted key in it.

    Raises:
        ConfigError: the file is missing, unreadable or broken, with file, line and column.
    """
    if path.is_dir():
        raise ConfigError(f"{path} is a folder, a YAML file is needed")
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist; give the path of a YAML configuration") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 text (byte {error.start}); save it as UTF-8") from None
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from None
    data = parse_yaml(text, str(path))
    lines: dict[str, int] = {}
    _collect_lines(yaml.compose(text, Loader=_Loader), "", lines, set())
    return data, lines


def _collect_lines(node: yaml.Node | None, prefix: str, lines: dict[str, int], seen: set[int]) -> None:
    if (
        not isinstance(node, yaml.MappingNode) or id(node) in seen
    ):  # an alias is looked at where its anchor stands
        return
    seen.add(id(node))
    for key_node, value_node in node.value:
        key = f"{prefix}{key_node.value}"
        lines[key] = key_node.start_mark.line + 1
        _collect_lines(value_node, f"{key}.", lines, seen)


def dump_yaml(data: Any) -> str:
    """YAML text that `parse_yaml` reads back as equal data.

    >>> dump_yaml({"lr": 3e-05, "name": "1e5", "betas": [0.9, 0.95]})
    "lr: 3e-05\\nname: '1e5'\\nbetas: [0.9, 0.95]\\n"
    """
    return yaml.dump(
        data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, default_flow_style=False, width=110
    )
