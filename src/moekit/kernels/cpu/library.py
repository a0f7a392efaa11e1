"""What the C++ kernels of this folder share on the Python side: when they can run, and how they are called."""

from __future__ import annotations

import ctypes
import functools
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moekit.kernels.cpu import has_bf16_products
from moekit.kernels.cpu.build import BuildError, cannot_build, load
from moekit.kernels.registry import Usable

SWITCH = "MOEKIT_CPU_KERNELS"
SIZE, POINTER, FLOAT = ctypes.c_int64, ctypes.c_void_p, ctypes.c_float


def at(tensor: Tensor | None) -> int | None:
    """The address of a contiguous tensor's numbers."""
    return None if tensor is None else tensor.data_ptr()


class Library:
    """A C++ file beside this one, compiled when it is first needed.

    Args:
        name: of the file, without its suffix.
        functions: the types of each exported function's arguments.
        features: of the CPU that are needed beside bfloat16 products, by their names in `torch.cpu.get_capabilities`.
        result: the type that the functions return.
    """

    def __init__(
        self, name: str, functions: dict[str, list[Any]], features: tuple[str, ...] = (), result: Any = None
    ) -> None:
        self._source, self._functions = Path(__file__).with_name(f"{name}.cpp"), functions
        self._features, self._result = features, result
        self._loaded: ctypes.CDLL | None = None

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if self._loaded is None:
            library = load(self._source)
            for function, arguments in self._functions.items():
                getattr(library, function).argtypes = arguments
                getattr(library, function).restype = self._result
            self._loaded = library
        function = getattr(self._loaded, name)
        setattr(self, name, function)  # from now on without this detour
        return function

    def usable(self, what: str, *needs: torch.dtype) -> Callable[[torch.device, torch.dtype], Usable]:
        """The registry's question for a kernel of these data types; `what` is the answer where it can run."""
        names = " or ".join(str(dtype).replace("torch.", "") for dtype in needs)

        def answer(device: torch.device, dtype: torch.dtype) -> Usable:
            if device.type != "cpu":
                return False, "for CPUs"
            if dtype not in needs:
                return False, f"needs {names}, got {dtype}"
            if os.environ.get(SWITCH, "1") == "0":
                return False, f"switched off by {SWITCH}=0"
            reason = _cannot_run(self._source, self._features)
            return not reason, reason or what

        return answer


@functools.cache
def _cannot_run(source: Path, features: tuple[str, ...]) -> str:
    if not has_bf16_products():
        return "this CPU has no bfloat16 products (AVX-512 bf16 or AMX)"
    has = torch.cpu.get_capabilities()
    if missing := [name for name in features if not has.get(name, False)]:
        return f"this CPU lacks {', '.join(missing)}"
    if reason := cannot_build():
        return reason
    try:
        load(source)
    except BuildError as error:
        warnings.warn(
            f"moekit's CPU kernels could not be compiled, plain ones are used: {error}", stacklevel=2
        )
        return str(error)
    return ""
