"""Files that are on the disk when a function returns: written, hashed and flushed in one pass.

Tensors go into the safetensors format straight from memory. The library reads the files back; its layout
(https://github.com/huggingface/safetensors#format) is written here because the library first copies all
tensors, refuses tied ones, and neither hashes nor flushes.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import itertools
import json
import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moekit.config.errors import CheckpointError

_CHUNK = 8 << 20  # bytes hashed and written at once: small beside any model, large beside a system call

_DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8",
    torch.uint64: "U64", torch.uint32: "U32", torch.uint16: "U16", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


def write_file(path: Path, parts: Iterable[memoryview]) -> dict[str, Any]:
    """Write a file that does not exist yet and flush it to the disk.

    Returns its size and hash, `{"bytes": …, "sha256": …}`. Errors: those of the operating system (`OSError`).
    """
    digest, n_bytes = hashlib.sha256(), 0
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666)
    try:
        for part in parts:
            for start in range(0, len(part), _CHUNK):
                chunk = part[start : start + _CHUNK]
                digest.update(chunk)
                n_bytes += len(chunk)
                while len(chunk):  # a write may take only a part, on a disk that is nearly full for one
                    chunk = chunk[os.write(file, chunk) :]
            # the next part may be a copy of a tensor: let go of this one before
            part = chunk = memoryview(b"")
        os.fsync(file)
    finally:
        os.close(file)
    return {"bytes": n_bytes, "sha256": digest.hexdigest()}


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, read in pieces."""
    digest = hashlib.sha256()
    with open(path, "rb", buffering=0) as file:
        buffer = memoryview(bytearray(min(_CHUNK, max(1, os.fstat(file.fileno()).st_size))))
        while n_read := file.readinto(buffer):
            digest.update(buffer[:n_read])
    return digest.hexdigest()


def make_folder(folder: Path) -> None:
    """Create a folder and its parents so that they survive a power failure."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    for path in reversed(missing):
        with contextlib.suppress(FileExistsError):
            os.mkdir(path)
        sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Flush the names in a folder to the disk, where the system can (Windows has no such call)."""
    if sys.platform == "win32":
        return
    file = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(file)
    except OSError as error:
        # some network file systems refuse it for folders
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(file)


def tensor_parts(tensors: Mapping[str, Tensor]) -> tuple[int, Iterator[memoryview]]:
    """Size and content of the safetensors file of some tensors.

    Only one tensor at a time is copied, and none that is contiguous on the CPU. A tensor with several names
    is stored under the first; the others stand in the metadata as `aliases`. Errors: `CheckpointError` that
    names a tensor which the format cannot hold.
    """
    names: dict[tuple[Any, ...], str] = {}
    aliases: dict[str, str] = {}
    kept: list[tuple[str, Tensor]] = []
    for name, given in tensors.items():
        tensor = given.detach()
        plain = type(tensor) is Tensor and tensor.layout == torch.strided and tensor.device.type != "meta"
        if not plain or tensor.dtype not in _DTYPES or name == "__metadata__":
            raise CheckpointError(
                f"tensor {name!r} cannot be saved: {type(tensor).__name__}, {tensor.layout}, "
                f"{tensor.dtype}, on {tensor.device}. It must be a dense torch.Tensor of one of the types "
                f"{', '.join(map(str, _DTYPES))}, and not be named '__metadata__'"
            )
        layout = tensor.shape, tensor.stride(), tensor.dtype, tensor.is_neg()
        memory = tensor.device, tensor.data_ptr(), layout
        if tensor.numel() and names.setdefault(memory, name) != name:
            aliases[name] = names[memory]
        else:
            kept.append((name, tensor))
    # wide types first: every tensor then starts at a multiple of its width
    kept.sort(key=lambda item: (-item[1].element_size(), item[0]))
    entries: dict[str, Any] = {"__metadata__": {"format": "pt", "aliases": json.dumps(aliases)}}
    end = 0
    for name, tensor in kept:
        start, end = end, end + tensor.nbytes
        entries[name] = {
            "dtype": _DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    header = json.dumps(entries, separators=(",", ":")).encode()
    header += b" " * (-(len(header) + 8) % 64)
    header = len(header).to_bytes(8, "little") + header
    parts = itertools.chain([memoryview(header)], (_bytes_of(tensor) for _, tensor in kept))
    return len(header) + end, parts


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Tensors of a file whose content is `tensor_parts`, mapped from the disk; aliases are one tensor again.

    Errors: `CheckpointError` with the reason where it is not such a file.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no dict)
            aliases = json.loads((file.metadata() or {}).get("aliases", "{}"))
        tensors.update({alias: tensors[name] for alias, name in aliases.items()})
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        raise CheckpointError(f"{path.name} cannot be read ({error})") from error
    return tensors


def _bytes_of(tensor: Tensor) -> memoryview:
    flat = tensor.resolve_neg().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data if flat.numel() else memoryview(b"")
