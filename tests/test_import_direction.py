"""A module imports only from its own folder and from folders further down the stack.

Every import counts: at the top of a module, inside a function, under TYPE_CHECKING (a type from above is a
dependency on above, for the reader and for the type checker), and `importlib.import_module("moekit....")`.
The package's own `__init__` and `__main__` are the front door: they name everything and no module imports
through them.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

# lowest first; a folder may import from those before it
ORDER = (
    "config", "kernels", "layers", "models", "parallel", "observe", "data", "train", "evaluate", "explain", "generate",
    "convert", "compress", "keras", "design", "serve", "recipes", "cli",
)  # fmt: skip
FRONT_DOOR = {"__init__.py", "__main__.py"}


def imported_modules(source: str, package: str) -> Iterator[tuple[int, str]]:
    """(line, dotted module) of each import; `package` is what relative imports start from."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            parts = package.split(".")
            base = ".".join(parts[: len(parts) - node.level + 1]) if node.level else ""
            module = ".".join(part for part in (base, node.module or "") if part)
            for alias in node.names:  # the name may itself be a module: from moekit import layers
                yield node.lineno, f"{module}.{alias.name}"
        elif (
            isinstance(node, ast.Call)
            and node.args
            and isinstance(node.args[0], ast.Constant | ast.JoinedStr)
        ):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if name in ("import_module", "__import__"):
                first = node.args[0]
                if isinstance(first, ast.JoinedStr):  # f"moekit.cli.{verb}": what stands before the first {
                    first = next(
                        (part for part in first.values if isinstance(part, ast.Constant)), ast.Constant("")
                    )
                yield node.lineno, str(first.value)


def violations(root: Path) -> list[str]:
    """One line for each import that points the wrong way in the package at `root`."""
    found = []
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if len(relative.parts) == 1:
            if relative.name not in FRONT_DOOR:
                found.append(f"{relative}: a module stands in a folder of {', '.join(ORDER)}")
            continue
        folder = relative.parts[0]
        if folder not in ORDER:
            found.append(f"{relative}: folder {folder!r} has no place in the order; see docs/index.md")
            continue
        package = ".".join(("moekit", *relative.parts[:-1]))
        for line, module in imported_modules(path.read_text(encoding="utf-8"), package):
            parts = module.split(".")
            if parts[0] != "moekit" or parts[1:] == ["__version__"] or len(parts) == 1:
                continue
            if parts[1] not in ORDER:
                found.append(f"{relative}:{line}: imports {module} through the front door; name its module")
            elif ORDER.index(parts[1]) > ORDER.index(folder):
                found.append(f"{relative}:{line}: {folder} must not import {parts[1]} ({module})")
    return found


def test_imports_point_down_only(repository):
    found = violations(repository / "src" / "moekit")
    assert not found, "\n" + "\n".join(found)


BAD = {
    "at the top": "from moekit.train.run import train_run",
    "plain import": "import moekit.train.run",
    "a package": "from moekit import train",
    "relative": "from ..train import run",
    "relative to the root": "from .. import train",
    "inside a function": "def f():\n    from moekit.train.run import train_run\n",
    "for a type": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import moekit.train.run\n",
    "by name": "import importlib\nimportlib.import_module('moekit.train.run')",
    "by a built name": "import importlib\nx = 'run'\nimportlib.import_module(f'moekit.train.{x}')",
    "through the front door": "from moekit import MoE",
}
GOOD = {
    "below": "from moekit.config.errors import ConfigError",
    "own folder": "from .plan import RoutingPlan\nfrom moekit.layers.plan import RoutingPlan",
    "the version": "from moekit import __version__\nimport moekit",
    "others": "import torch\nfrom torch import nn",
    "a text": "text = 'from moekit.train import run'",
}


@pytest.mark.parametrize("source", BAD.values(), ids=BAD)
def test_the_check_sees_every_form_of_a_wrong_import(tmp_path, source):
    (tmp_path / "layers").mkdir()
    (tmp_path / "layers" / "moe.py").write_text(source)
    assert len(violations(tmp_path)) == 1


@pytest.mark.parametrize("source", GOOD.values(), ids=GOOD)
def test_the_check_lets_right_imports_pass(tmp_path, source):
    (tmp_path / "layers").mkdir()
    (tmp_path / "layers" / "moe.py").write_text(source)
    assert violations(tmp_path) == []


def test_the_check_refuses_unknown_folders_and_loose_modules(tmp_path):
    (tmp_path / "utils").mkdir()
    (tmp_path / "utils" / "misc.py").write_text("")
    (tmp_path / "helpers.py").write_text("")
    assert len(violations(tmp_path)) == 2
