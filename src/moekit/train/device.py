"""Device and precision: what `auto` means on this machine."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from moekit.config.errors import ConfigError
from moekit.kernels.cpu import has_bf16_products


def resolve_device(name: str) -> torch.device:
    """The device that a configuration names; "auto" takes a GPU where there is one.

    Errors: `ConfigError` where the device does not exist here.
    """
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(
            f"train.device must name a device of this machine; got {name!r} ({str(error).splitlines()[0]}). "
            "Use auto or cpu"
        ) from None
    return device


def resolve_dtype(precision: str, device: torch.device) -> torch.dtype:
    """The autocast type of a precision; "auto" takes bf16 where the hardware multiplies it, else float32."""
    if precision == "float32":
        return torch.float32
    if precision == "bf16":
        return torch.bfloat16
    return torch.bfloat16 if has_fast_bf16(device) else torch.float32


def has_fast_bf16(device: torch.device) -> bool:
    """Whether the device has matrix instructions for bfloat16."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        return has_bf16_products()
    return False


@contextlib.contextmanager
def autocast(device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """Autocast to `dtype`, or nothing for float32. Master weights stay float32."""
    if dtype == torch.float32:
        yield
    else:
        with torch.autocast(device.type, dtype):
            yield
