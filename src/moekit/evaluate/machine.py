"""Facts about this machine that measurements, plans and diagnoses need: cores, memory, instructions, GPUs.

Containers hide their limits from `os.cpu_count()`; here the control groups of Linux are read as well, so that
a plan made inside a container with two cores of a large machine speaks of two cores.
"""

from __future__ import annotations

import math
import os
import platform
import re
import sys
from dataclasses import dataclass
from pathlib import Path

# our name: the flag in Linux's cpuinfo and the key of torch.cpu.get_capabilities()
X86_FEATURES = {
    "AVX2": ("avx2", "avx2"),
    "AVX-512": ("avx512f", "avx512_f"),
    "AVX-512 VNNI": ("avx512_vnni", "avx512_vnni"),
    "AVX-512 bfloat16": ("avx512_bf16", "avx512_bf16"),
    "AMX bfloat16": ("amx_bf16", "amx_bf16"),
    "AMX int8": ("amx_int8", "amx_int8"),
}
ARM_FEATURES = {
    "NEON": ("asimd", "neon"),
    "SVE": ("sve", "sve"),
    "bfloat16": ("bf16", "bf16"),
    "i8mm": ("i8mm", "i8mm"),
}


@dataclass(frozen=True)
class Cores:
    """How many cores there are, how many this process may use, and what sets the limit.

    Attributes:
        logical: logical cores of the machine.
        usable: whole cores this process may keep busy.
        limit: "machine", "affinity" or "cgroup".
    """

    logical: int
    usable: int
    limit: str


@dataclass(frozen=True)
class Memory:
    """Main memory in bytes; `total` already respects the limit of a container."""

    total: int
    available: int
    limit: str


def cores(cgroups: Path = Path("/sys/fs/cgroup"), membership: Path = Path("/proc/self/cgroup")) -> Cores:
    """Cores of the machine, and those that affinity and control groups leave to this process."""
    logical = os.cpu_count() or 1
    usable, limit = logical, "machine"
    if hasattr(os, "sched_getaffinity"):
        affinity = len(os.sched_getaffinity(0))
        if affinity < usable:
            usable, limit = affinity, "affinity"
    quotas = []
    for folder in _own_groups("cpu", cgroups, membership):
        v2 = _read(folder / "cpu.max").split()
        if len(v2) == 2 and v2[0].isdigit():
            quotas.append(int(v2[0]) / int(v2[1]))
        quota, period = _read(folder / "cpu.cfs_quota_us"), _read(folder / "cpu.cfs_period_us")
        if quota.isdigit() and period.isdigit() and int(period):  # a quota of -1 means none
            quotas.append(int(quota) / int(period))
    if quotas and max(1, math.ceil(min(quotas))) < usable:
        usable, limit = max(1, math.ceil(min(quotas))), "cgroup"
    return Cores(logical, usable, limit)


def memory(
    cgroups: Path = Path("/sys/fs/cgroup"),
    membership: Path = Path("/proc/self/cgroup"),
    meminfo: Path = Path("/proc/meminfo"),
) -> Memory:
    """Main memory, as far as this process may use it; zeros where the system does not say."""
    fields = {
        name: int(value) * 1024
        for name, value in re.findall(r"^(\w+):\s+(\d+) kB", _read(meminfo), re.MULTILINE)
    }
    total = fields.get("MemTotal", 0) or _sysconf_memory()
    available, limit = fields.get("MemAvailable", total), "machine"
    for folder in _own_groups("memory", cgroups, membership):
        for top, used in (
            ("memory.max", "memory.current"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes"),
        ):
            bound = _read(folder / top)
            if bound.isdigit() and 0 < int(bound) < total:
                total, limit = int(bound), "cgroup"
                inside = _read(folder / used)
                # page cache counts as used here although it gives way, so this is a lower bound
                available = (
                    min(available, max(0, total - int(inside))) if inside.isdigit() else min(available, total)
                )
    return Memory(total, available, limit)


def cpu_name(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """The processor as its maker calls it."""
    found = re.search(r"^(?:model name|Model)\s*:\s*(.+)$", _read(cpuinfo), re.MULTILINE)
    return found.group(1).strip() if found else platform.processor() or platform.machine() or "unknown"


def cpu_features(cpuinfo: Path = Path("/proc/cpuinfo")) -> dict[str, bool]:
    """Instructions that matter for speed and precision, by our names, for this kind of processor."""
    import torch

    flags: set[str] = set()
    for line in re.findall(r"^(?:flags|Features)\s*:\s*(.+)$", _read(cpuinfo), re.MULTILINE):
        flags.update(line.split())
    ask = getattr(torch.cpu, "get_capabilities", None)
    capabilities = ask() if ask is not None and not flags else {}
    is_x86 = platform.machine().lower() in ("x86_64", "amd64", "i686")
    wanted = X86_FEATURES if is_x86 else ARM_FEATURES
    return {name: flag in flags or bool(capabilities.get(key)) for name, (flag, key) in wanted.items()}


def gpus() -> list[dict[str, object]]:
    """Name, memory in bytes and compute capability of each GPU that torch can use."""
    import torch

    found: list[dict[str, object]] = []
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            capability = f"{properties.major}.{properties.minor}"
            row = {
                "device": f"cuda:{index}",
                "name": properties.name,
                "memory_bytes": properties.total_memory,
            }
            found.append({**row, "compute_capability": capability})
    if sys.platform == "darwin" and torch.backends.mps.is_available():
        found.append(
            {"device": "mps", "name": "Apple GPU", "memory_bytes": memory().total, "compute_capability": ""}
        )
    return found


def _own_groups(controller: str, cgroups: Path, membership: Path) -> list[Path]:
    """Folders of the control groups that bind this process, innermost first (versions 1 and 2)."""
    folders: list[Path] = []
    for line in _read(membership).splitlines():
        number, controllers, path = [*line.split(":", 2), "", ""][:3]
        if number == "0" and not controllers:
            top = cgroups
        elif controller in controllers.split(","):
            top = cgroups / controllers if (cgroups / controllers).is_dir() else cgroups / controller
        else:
            continue
        parts = [part for part in path.split("/") if part and part != ".."]
        folders += [top.joinpath(*parts[:depth]) for depth in range(len(parts), -1, -1)]
    return list(dict.fromkeys(folders)) or [cgroups]


def _sysconf_memory() -> int:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):  # pragma: no cover  (Windows)
        return 0


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""
