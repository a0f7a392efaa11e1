"""moekit does without Keras, moekit.keras without torch, and what is missing is named."""

from __future__ import annotations

import ast
import os
import subprocess
import sys

import pytest

from moekit.config.errors import MissingExtraError

REPORT = "try:\n    import moekit.keras\nexcept ImportError as error:\n    print(type(error).__name__, error)"


def python(code: str, *options: str, **environment: str) -> str:
    """What a fresh interpreter prints."""
    done = subprocess.run(
        [sys.executable, *options, "-c", code],
        env={**os.environ, **environment},
        check=True,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
    )
    return done.stdout.strip()


def test_moekit_does_not_import_keras():
    assert python("import sys, moekit, moekit.cli.main; moekit.MoE; print('keras' in sys.modules)") == "False"


def test_missing_keras_names_the_extra():
    hidden = "import sys; sys.modules['keras'] = sys.modules['keras.ops'] = None"
    printed = python(f"{hidden}\n{REPORT}")
    assert printed.startswith(MissingExtraError.__name__)
    assert "pip install 'moekit[keras]'" in printed


def test_a_folder_called_keras_is_not_keras(tmp_path, repository):
    """Python takes any folder for a package; that of these tests is one."""
    (tmp_path / "keras").mkdir()
    code = f"import sys; sys.path += [{str(repository / 'src')!r}, {str(tmp_path)!r}]\nimport keras\n{REPORT}"
    assert "pip install 'moekit[keras]'" in python(code, "-S", PYTHONPATH="")  # without installed packages


def test_a_missing_backend_names_the_way_out():
    pytest.importorskip("keras.ops", reason="Keras 3 is not installed")
    hidden = "import sys; sys.modules['tensorflow'] = None"
    printed = python(f"{hidden}\n{REPORT}", KERAS_BACKEND="tensorflow")
    assert printed.startswith(MissingExtraError.__name__)
    assert "Set KERAS_BACKEND=torch" in printed


def test_it_imports_keras_and_moekits_errors_alone(repository):
    allowed = ("__future__", "collections", "dataclasses", "math", "typing", "warnings", "keras")
    for path in (repository / "src" / "moekit" / "keras").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) else []
            for name in names:
                fine = name.split(".")[0] in allowed or name == "moekit.config.errors"
                assert fine or name.startswith("moekit.keras."), f"{path.name} imports {name}"
