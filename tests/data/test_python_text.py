"""The text of the running Python: source without tests and tables, documentation without running it."""

from __future__ import annotations

import os
import sysconfig
from pathlib import Path

import pytest

from moekit.config.errors import DataError
from moekit.data import python_text
from moekit.data.python_text import documentation, python_signature, standard_library, standard_library_files


def test_the_library_is_read_without_tests_and_installed_packages() -> None:
    names = [relative for relative, _ in standard_library_files()]
    assert len(names) == len(set(names))
    assert names == [relative for relative, _ in standard_library_files()]
    assert {"os.py", "json/decoder.py", "unittest/mock.py"} <= set(names)
    for folder in ("test", "tests", "idle_test", "site-packages", "__pycache__"):
        assert not [name for name in names if f"/{folder}/" in f"/{name}"]
    assert not [name for name in names if name.startswith(("pydoc_data", "_sysconfigdata", "lib2to3/tests"))]


@pytest.fixture
def library(tmp_path: Path, monkeypatch) -> Path:
    """A standard library of five files."""
    root = tmp_path / "lib"
    files = {
        "a.py": b"x = 1\n",
        "latin.py": "# -*- coding: latin-1 -*-\n# é\n".encode("latin1"),
        "broken.py": b"# -*- coding: nothing-known -*-\n",
        "encodings/cp1.py": b'""" generated from MAPPINGS/CP1.TXT with gencodec.py."""\ntable = 1\n',
        "encodings/utf.py": b"y = 2\n",
        "test/test_a.py": b"no",
        "empty.py": b"\n",
    }
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(root)})
    return root


def test_declared_encodings_are_honoured_and_generated_tables_left_out(library: Path) -> None:
    documents, info = standard_library()
    assert [document.name for document in documents] == [
        "python/a.py",
        "python/latin.py",
        "python/encodings/utf.py",
    ]
    assert "é" in documents[1].text
    assert info.licence == "PSF-2.0"
    assert {document.domain for document in documents} == {"code"}


def test_a_python_without_source_says_so(library: Path) -> None:
    for path in library.rglob("*.py"):
        path.unlink()
    with pytest.raises(DataError, match=r"no source files .* give text with data\.path"):
        standard_library()


def test_the_documentation_is_parsed_and_not_run(library: Path) -> None:
    file = library / "pydoc_data/topics.py"
    file.parent.mkdir()
    file.write_text(
        "# made by sphinx\n"
        "topics = {'assert': 'The \"assert\"\\n' 'statement', 'x': r'''raw'''}\n"
        "raise SystemExit\n"
    )
    documents, _ = documentation()
    assert [(d.name, d.text) for d in documents] == [
        ("topics/assert", 'The "assert"\nstatement'),
        ("topics/x", "raw"),
    ]
    file.write_text("topics = {")
    with pytest.raises(DataError, match="no readable documentation topics"):
        documentation()
    file.write_text("topics = {}")
    with pytest.raises(DataError, match="holds no documentation topics"):
        documentation()


def test_the_real_documentation_is_there() -> None:
    documents, _ = documentation()
    assert len(documents) > 50
    assert sum(document.n_bytes for document in documents) > 200_000


def test_the_signature_follows_the_files(library: Path, monkeypatch) -> None:
    first = python_signature()
    assert python_signature() == first
    os.utime(library / "a.py", ns=(1, 1))
    second = python_signature()
    assert second != first
    monkeypatch.setattr(python_text.sys, "version", "4.0")
    assert python_signature() != second
