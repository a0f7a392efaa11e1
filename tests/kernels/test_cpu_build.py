"""Compiled kernels: built once, found again, rebuilt where damaged; every obstacle has its reason."""

from __future__ import annotations

import ctypes
import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from moekit.kernels.cpu import build, has_bf16_products

needs_compiler = pytest.mark.skipif(bool(build.cannot_build()), reason=build.cannot_build() or "can build")
SOURCE = 'extern "C" int answer() { return 42; }\n'


@pytest.fixture
def source(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("MOEKIT_CACHE", str(tmp_path / "cache"))
    build.load.cache_clear()
    file = tmp_path / "little.cpp"
    file.write_text(SOURCE)
    yield file
    build.load.cache_clear()


@pytest.fixture
def compilations(monkeypatch) -> list[Path]:
    """The folders that something was compiled into."""
    seen: list[Path] = []
    real = build._compile

    def compile_and_note(source, path, folder):
        seen.append(folder)
        real(source, path, folder)

    monkeypatch.setattr(build, "_compile", compile_and_note)
    return seen


def load_anew(source: Path) -> ctypes.CDLL:
    """As a new process would: this one remembers what it loaded."""
    build.load.cache_clear()
    return build.load(source)


def folders(source: Path) -> list[Path]:
    return sorted((source.parent / "cache" / "kernels").iterdir())


@needs_compiler
def test_built_once_and_found_again(source, compilations) -> None:
    assert build.load(source).answer() == 42
    assert load_anew(source).answer() == 42
    assert len(compilations) == 1
    (folder,) = folders(source)
    assert folder.name.startswith("little-")
    assert json.loads((folder / "manifest.json").read_text())["command"][-1].startswith("-Wl,-rpath")


@needs_compiler
def test_another_source_or_torch_is_another_library(source, compilations, monkeypatch) -> None:
    build.load(source)
    source.write_text(SOURCE.replace("42", "43"))
    assert load_anew(source).answer() == 43
    monkeypatch.setattr(build.torch, "__version__", "0.0.1")
    load_anew(source)
    assert len(compilations) == len(folders(source)) == 3


@needs_compiler
@pytest.mark.parametrize("damage", ["truncate", "no manifest", "no library", "wrong manifest"])
def test_a_damaged_library_is_built_again(source, compilations, damage) -> None:
    build.load(source)
    (folder,) = folders(source)
    library, manifest = folder / "kernels.so", folder / "manifest.json"
    if damage == "truncate":
        content = library.read_bytes()
        library.unlink()  # the mapped file of this process must stay whole
        library.write_bytes(content[: len(content) // 2])
    elif damage == "no library":
        library.unlink()
    elif damage == "no manifest":
        manifest.unlink()
    else:
        manifest.write_text("{")
    assert load_anew(source).answer() == 42
    assert len(compilations) == 2
    assert build._is_whole(folder)


@needs_compiler
def test_a_cache_that_cannot_be_written(source, compilations, monkeypatch) -> None:
    """Root may write anywhere, so the cache is below a file instead of in a read-only folder."""
    blocked = source.parent / "file"
    blocked.write_text("")
    monkeypatch.setenv("MOEKIT_CACHE", str(blocked / "cache"))
    assert build.load(source).answer() == 42
    (folder,) = compilations
    assert blocked not in folder.parents
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700  # nobody else may put a library there


@needs_compiler
def test_two_processes_at_once(source) -> None:
    code = (
        "import sys; from pathlib import Path; from moekit.kernels.cpu import build;"
        "print(build.load(Path(sys.argv[1])).answer())"
    )
    processes = [
        subprocess.Popen([sys.executable, "-c", code, str(source)], stdout=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    assert [process.communicate(timeout=300)[0].strip() for process in processes] == ["42"] * 3
    (folder,) = folders(source)
    assert build._is_whole(folder)


@needs_compiler
def test_a_broken_source_gives_the_compilers_words_and_leaves_nothing(source) -> None:
    source.write_text("int main( {")
    with pytest.raises(build.BuildError, match=r"failed with exit code 1: .*error:"):
        build.load(source)
    assert folders(source) == []


def test_no_compiler(source, monkeypatch) -> None:
    monkeypatch.setenv("PATH", str(source.parent))
    monkeypatch.setenv("CXX", "")
    if sys.platform == "linux":
        assert "no C++ compiler was found; install one" in build.cannot_build()
    with pytest.raises(build.BuildError):
        build.load(source)


def test_the_chosen_compiler_goes_first(source, monkeypatch) -> None:
    mine = source.parent / "mycc"
    mine.write_text("#!/bin/sh\nexit 3\n")
    mine.chmod(0o755)
    monkeypatch.setenv("CXX", str(mine))
    assert build.compiler() == str(mine)
    if not build.cannot_build():
        with pytest.raises(build.BuildError, match="exit code 3"):
            build.load(source)


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [("platform", "darwin", "written for Linux"), ("platform", "win32", "written for Linux")],
)
def test_other_systems(name, value, reason, monkeypatch) -> None:
    monkeypatch.setattr(build.sys, name, value)
    assert reason in build.cannot_build()


@needs_compiler
@pytest.mark.skipif(not has_bf16_products(), reason="the fused layer needs bfloat16 products of the CPU")
def test_one_pool_of_threads() -> None:
    """The compiled code must use torch's OpenMP, not bring a second one whose threads would fight for the cores."""
    code = (
        "import torch, os; from moekit.kernels.registry import available; torch.set_num_threads(2);"
        "import moekit; layer = moekit.MoE(d_model=64, d_expert=64, n_experts=4).to(torch.bfloat16);"
        "x = torch.randn(512, 64, dtype=torch.bfloat16); torch.mm(x, x.T); before = len(os.listdir('/proc/self/task'));"
        "layer(x); print(before, len(os.listdir('/proc/self/task')), available('expert_layer')[0][1])"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "2"}
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True
    )
    before, after, can_run = result.stdout.split()
    assert can_run == "True"
    assert after == before
