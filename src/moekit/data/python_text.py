"""Text that every machine has: the standard library of the running Python, and its documentation."""

from __future__ import annotations

import ast
import hashlib
import os
import platform
import sys
import sysconfig
import tokenize
from collections.abc import Iterator
from pathlib import Path

from moekit.config.errors import DataError
from moekit.data.documents import Document, SourceInfo

_SKIPPED_FOLDERS = {
    "test",
    "tests",
    "idle_test",
    "site-packages",
    "dist-packages",
    "__pycache__",
    "pydoc_data",
}


def standard_library_files() -> Iterator[tuple[str, Path]]:
    """(relative path with slashes, path) of the library's source files, sorted.

    Left out: tests, installed packages, links, and files that a program wrote (tables of character sets, the
    build's settings, the documentation topics).
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    for folder, folders, files in os.walk(root):
        folders[:] = sorted(
            name for name in folders if name not in _SKIPPED_FOLDERS and not name.startswith("config-")
        )
        for name in sorted(files):
            path = Path(folder, name)
            if name.endswith(".py") and not name.startswith("_sysconfigdata") and not path.is_symlink():
                yield path.relative_to(root).as_posix(), path


def standard_library(domain: str = "code") -> tuple[list[Document], SourceInfo]:
    """The library's source files as documents `python/<path>`.

    Raises:
        DataError: where Python came without its source.
    """
    documents = []
    for relative, path in standard_library_files():
        try:
            with tokenize.open(path) as file:  # honours the encoding that a file declares
                text = file.read()
        except (SyntaxError, UnicodeDecodeError, OSError):
            continue
        generated = relative.startswith("encodings/") and "gencodec" in text[:500]
        if text.strip() and not generated:
            documents.append(Document(text, domain, f"python/{relative}"))
    if not documents:
        raise DataError(
            f"this Python has no source files in {sysconfig.get_paths()['stdlib']}; give text with data.path"
        )
    version = f"{platform.python_implementation()} {platform.python_version()}"
    info = SourceInfo(
        name="python-standard-library",
        origin=f"the running {version}, {len(documents)} source files without tests and generated tables",
        licence="PSF-2.0",
        sha256=None,
        note="differs between versions of Python; compare runs on one version",
    )
    return documents, info


def _topics_file() -> Path:
    return Path(sysconfig.get_paths()["stdlib"]) / "pydoc_data" / "topics.py"


def documentation(domain: str = "documentation") -> tuple[list[Document], SourceInfo]:
    """The texts behind `help("topic")` as documents `topics/<topic>`; the file is parsed, not run.

    Raises:
        DataError: where Python came without them.
    """
    path = _topics_file()
    try:
        tree = ast.parse(path.read_bytes())
    except (OSError, SyntaxError, ValueError) as error:
        raise DataError(f"this Python has no readable documentation topics ({path}): {error}") from None
    documents = []
    for node in tree.body:
        if not isinstance(node, ast.Assign) or not isinstance(node.value, ast.Dict):
            continue
        for key, value in zip(node.value.keys, node.value.values, strict=True):
            pair = (key, value)
            if all(isinstance(item, ast.Constant) and isinstance(item.value, str) for item in pair):
                documents.append(Document(value.value, domain, f"topics/{key.value}"))  # type: ignore[attr-defined,union-attr]
    if not documents:
        raise DataError(f"{path} holds no documentation topics")
    info = SourceInfo(
        name="python-documentation",
        origin=f"the running Python {platform.python_version()}: {len(documents)} topics of its reference",
        licence="PSF-2.0",
        sha256=None,
    )
    return documents, info


def python_signature() -> str:
    """A hash that changes with the Python version and with any of the files above; costs no reading."""
    hasher = hashlib.sha256(sys.version.encode())
    files = [*standard_library_files(), ("topics", _topics_file())]
    for relative, path in files:
        try:
            status = path.stat()
        except OSError:
            continue
        hasher.update(f"{relative}\0{status.st_size}\0{status.st_mtime_ns}\n".encode())
    return hasher.hexdigest()
