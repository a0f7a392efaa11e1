"""Compile a C++ file against the installed torch, once per machine, and load it.

The compiled library lies in the cache under a name that says what it was made from: source, torch, compiler,
instructions. It appears there whole or not at all, so two processes may build at once, and one that was killed leaves
nothing behind that anybody loads. Where the cache cannot be written, the library is built for this process alone.
"""

from __future__ import annotations

import atexit
import ctypes
import functools
import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from moekit.config.atomic import cache_folder, new_folder

_LIBRARY, _MANIFEST = "kernels.so", "manifest.json"
_TIMEOUT = 600  # seconds; about ten are usual
FLAGS = ("-O3", "-std=c++20", "-march=native", "-fPIC", "-shared", "-fopenmp", "-DAT_PARALLEL_OPENMP=1")


class BuildError(Exception):
    """A library cannot be made here; the message says why and what would help."""


def cannot_build() -> str:
    """Why nothing can be compiled here, or "" where it can be tried. Starts no compiler."""
    if sys.platform != "linux":
        return f"written for Linux, this is {sys.platform}"
    if platform.machine() not in ("x86_64", "AMD64"):
        return f"written for x86-64, this is {platform.machine()}"
    if "OpenMP" not in torch.__config__.parallel_info():
        return "this build of torch runs its threads without OpenMP"
    if not (_torch_folder() / "include" / "ATen" / "native" / "CPUBlas.h").is_file():
        return "this build of torch comes without its C++ headers"
    if compiler() is None:
        return "no C++ compiler was found; install one (for example the package g++) or set CXX"
    return ""


def compiler() -> str | None:
    """The C++ compiler: $CXX, g++ or clang++."""
    names = [os.environ.get("CXX"), "g++", "clang++", "c++"]
    return next((found for name in names if name and (found := shutil.which(name))), None)


@functools.cache
def load(source: Path) -> ctypes.CDLL:
    """The library compiled from `source`, from the cache where it is there already.

    Raises:
        BuildError: it cannot be compiled or loaded, with the compiler's own words.
    """
    if reason := cannot_build():
        raise BuildError(reason)
    path = compiler()
    assert path is not None
    folder = cache_folder() / "kernels" / f"{source.stem}-{_key(source, path)}"
    if not _is_whole(folder):
        try:
            with new_folder(folder, lambda: _is_whole(folder)) as fresh:
                _compile(source, path, fresh)
        except OSError:  # a cache that cannot be written: build for this process alone
            folder = Path(tempfile.mkdtemp(prefix="moekit-"))
            atexit.register(shutil.rmtree, folder, ignore_errors=True)
            _compile(source, path, folder)
    try:
        return ctypes.CDLL(str(folder / _LIBRARY))
    except OSError as error:
        raise BuildError(f"{folder / _LIBRARY} cannot be loaded: {error}") from None


def _compile(source: Path, path: str, folder: Path) -> None:
    root, library = _torch_folder(), folder / _LIBRARY
    abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"
    command = [
        path, *FLAGS, abi, f"-I{root / 'include'}", str(source), "-o", str(library),
        f"-L{root / 'lib'}", "-ltorch_cpu", "-lc10", f"-Wl,-rpath,{root / 'lib'}",
    ]  # fmt: skip
    if sys.stderr.isatty():
        print("moekit: compiling CPU kernels, once on this machine", file=sys.stderr, flush=True)
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT, check=False)
    except subprocess.TimeoutExpired:
        raise BuildError(f"{path} did not finish within {_TIMEOUT} s") from None
    if result.returncode != 0 or not library.is_file():
        errors = [
            line for line in result.stderr.splitlines() if "error" in line
        ] or result.stderr.splitlines()
        raise BuildError(f"{path} failed with exit code {result.returncode}: {' | '.join(errors[:3])}")
    manifest = {"sha256": hashlib.sha256(library.read_bytes()).hexdigest(), "command": command}
    (folder / _MANIFEST).write_text(json.dumps(manifest, indent=1))


def _is_whole(folder: Path) -> bool:
    """Whether the folder holds a library with the content that was written; loading half a one would crash."""
    try:
        expected = json.loads((folder / _MANIFEST).read_text())["sha256"]
        return hashlib.sha256((folder / _LIBRARY).read_bytes()).hexdigest() == expected
    except (OSError, ValueError, KeyError, TypeError):
        return False


@functools.cache
def _version(compiler: str) -> str:
    """What the compiler says of itself; asked once, not for each library."""
    return subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False).stdout


def _key(source: Path, compiler: str) -> str:
    has = sorted(name for name, value in torch.cpu.get_capabilities().items() if value is True)
    texts = [path.read_text() for path in (source, *sorted(source.parent.glob("*.h")))]
    parts = [texts, torch.__version__, str(_torch_folder()), compiler, _version(compiler), FLAGS, has]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def _torch_folder() -> Path:
    return Path(torch.__file__).parent
