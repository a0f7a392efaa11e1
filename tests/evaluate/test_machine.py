"""Facts about the machine, read from made-up system files of containers and processors."""

from __future__ import annotations

import os

import pytest

from moekit.evaluate.machine import cores, cpu_features, cpu_name, gpus, memory

GIB = 2**30


def lay(folder, files):
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


@pytest.mark.parametrize(
    ("membership", "files", "limit"),
    [
        ("0::/", {"cpu.max": "100000 100000"}, 1),
        ("0::/", {"cpu.max": "max 100000"}, None),
        ("0::/", {"cpu.max": "50000 100000"}, 1),
        (
            "0::/a/b",
            {"cpu.max": "600000 100000", "a/cpu.max": "250000 100000", "a/b/cpu.max": "500000 100000"},
            3,
        ),
        ("0::/a/b", {"cpu.max": "max 100000", "a/cpu.max": "100000 100000", "a/b/cpu.max": "max 100000"}, 1),
        (
            "4:cpu,cpuacct:/x",
            {"cpu,cpuacct/x/cpu.cfs_quota_us": "100000", "cpu,cpuacct/x/cpu.cfs_period_us": "100000"},
            1,
        ),
        ("4:cpu:/x", {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, None),
        ("4:memory:/", {"memory/cpu.max": "100000 100000"}, None),
        ("", {}, None),
    ],
)
def test_cores_respect_control_groups(tmp_path, monkeypatch, membership, files, limit):
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    lay(
        tmp_path,
        {
            "groups/none": "",
            "membership": membership,
            **{f"groups/{name}": text for name, text in files.items()},
        },
    )
    found = cores(tmp_path / "groups", tmp_path / "membership")
    assert (found.logical, found.usable, found.limit) == (
        (8, limit, "cgroup") if limit else (8, 8, "machine")
    )


def test_cores_respect_affinity(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 3}, raising=False)
    found = cores(tmp_path, tmp_path / "none")
    assert (found.usable, found.limit) == (2, "affinity")


def test_memory_of_a_container(tmp_path):
    lay(tmp_path, {
        "meminfo": f"MemTotal:       {16 * GIB // 1024} kB\nMemAvailable:   {12 * GIB // 1024} kB\n",
        "membership": "0::/box", "groups/box/memory.max": str(4 * GIB), "groups/box/memory.current": str(GIB),
    })  # fmt: skip
    found = memory(tmp_path / "groups", tmp_path / "membership", tmp_path / "meminfo")
    assert (found.total, found.available, found.limit) == (4 * GIB, 3 * GIB, "cgroup")


def test_memory_of_a_machine(tmp_path):
    # version 1 writes a number beyond all memory where there is no limit
    lay(tmp_path, {
        "meminfo": f"MemTotal:       {16 * GIB // 1024} kB\nMemAvailable:   {12 * GIB // 1024} kB\n",
        "membership": "3:memory:/", "groups/memory/memory.limit_in_bytes": "9223372036854771712",
        "groups/memory/memory.usage_in_bytes": str(GIB),
    })  # fmt: skip
    found = memory(tmp_path / "groups", tmp_path / "membership", tmp_path / "meminfo")
    assert (found.total, found.available, found.limit) == (16 * GIB, 12 * GIB, "machine")


def test_processor(tmp_path, monkeypatch):
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    cpuinfo = (
        lay(tmp_path, {"cpuinfo": "model name\t: Some CPU @ 2GHz\nflags\t\t: fpu avx2 avx512f amx_bf16\n"})
        / "cpuinfo"
    )
    features = cpu_features(cpuinfo)
    assert [name for name, has in features.items() if has] == ["AVX2", "AVX-512", "AMX bfloat16"]
    assert cpu_name(cpuinfo) == "Some CPU @ 2GHz"


def test_arm_processor(tmp_path, monkeypatch):
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    cpuinfo = lay(tmp_path, {"cpuinfo": "Features\t: fp asimd bf16\n"}) / "cpuinfo"
    assert cpu_features(cpuinfo) == {"NEON": True, "SVE": False, "bfloat16": True, "i8mm": False}


def test_this_machine_says_something():
    assert cores().usable >= 1
    assert memory().total > GIB
    assert cpu_name()
    assert isinstance(gpus(), list)
