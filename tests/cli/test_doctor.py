"""The diagnosis: complete, machine-readable, with a remedy for each finding."""

from __future__ import annotations

import importlib.metadata
import json

import pytest

from moekit.cli import diagnosis
from moekit.cli.diagnosis import diagnose

SUBJECTS = {
    "moekit", "python", "packages", "torch", "cpu", "memory", "gpu", "precision", "kernels", "extras",
    "clients", "cache", "remedies", "healthy",
}  # fmt: skip


def finding(facts, subject):
    return next(remedy for remedy in facts["remedies"] if remedy["subject"] == subject)


def test_json(moekit_command):
    result = moekit_command("doctor", "--json")
    facts = json.loads(result.out)
    assert set(facts) == SUBJECTS
    assert result.code == (0 if facts["healthy"] else 1)
    assert all(facts[subject] is not None for subject in SUBJECTS), facts["remedies"]
    assert facts["packages"]["torch"] == importlib.metadata.version("torch")


def test_for_people(moekit_command):
    out = moekit_command("doctor").out
    for words in ("AVX2", "grouped_mm", "reference", "extras", "cache", "precision"):
        assert words in out


def test_one_kernel_is_picked_for_each_case():
    for case, rows in diagnose()["kernels"].items():
        usable = [row["name"] for row in rows if row["usable"]]
        assert [row["name"] for row in rows if row["picked"]] == usable[:1]
        # without a kernel the smaller operations run, or plain PyTorch; the experts' own products always have one
        assert usable or not case.startswith("expert_mlp")
        assert all(row["reason"] for row in rows)


def test_a_missing_extra_comes_with_its_command(monkeypatch):
    monkeypatch.setattr(
        diagnosis, "_installed", lambda name: None if name in ("wandb", "datasets") else "1.0"
    )
    extras = diagnose()["extras"]
    assert extras["wandb"] == {"installed": False, "missing": ["wandb"], "install": "pip install wandb"}
    assert extras["hf"]["install"] == "pip install datasets"
    assert extras["tensorboard"] == {"installed": True, "missing": [], "install": None}


def test_a_missing_core_package_is_a_problem(monkeypatch):
    monkeypatch.setattr(diagnosis, "_installed", lambda name: None if name == "tokenizers" else "1.0")
    facts = diagnose()
    assert not facts["healthy"]
    assert finding(facts, "packages")["remedy"] == "pip install tokenizers"


def test_a_cache_that_cannot_be_written_is_a_problem(monkeypatch, tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setenv("MOEKIT_CACHE", str(blocked / "cache"))
    facts = diagnose()
    assert not facts["healthy"]
    assert "MOEKIT_CACHE" in finding(facts, "cache")["remedy"]


def test_the_cache_is_measured(monkeypatch, tmp_path):
    monkeypatch.setenv("MOEKIT_CACHE", str(tmp_path))
    (tmp_path / "a").write_bytes(b"x" * 1234)
    assert diagnose()["cache"]["used_bytes"] == 1234


def test_threads_that_do_not_fit_the_cores(monkeypatch):
    import torch

    from moekit.evaluate import machine

    monkeypatch.setattr(torch, "get_num_threads", lambda: 64)
    monkeypatch.setattr(machine, "cores", lambda: machine.Cores(64, 4, "cgroup"))
    assert finding(diagnose(), "torch")["remedy"] == "export OMP_NUM_THREADS=4"


def test_one_broken_subject_does_not_hide_the_others(monkeypatch):
    def broken(remedies):
        raise RuntimeError("no such device")

    monkeypatch.setattr(diagnosis, "_gpu", broken)
    facts = diagnose()
    assert facts["gpu"] is None
    assert facts["cpu"] is not None
    assert finding(facts, "gpu")["finding"] == "RuntimeError: no such device"


def test_problems_end_with_1(moekit_command, monkeypatch):
    monkeypatch.setattr(diagnosis, "_installed", lambda name: None)
    result = moekit_command("doctor")
    assert result.code == 1
    assert "problem:" in result.out


@pytest.mark.parametrize("missing", ["npm", "pip"])
def test_a_missing_client_is_a_note(monkeypatch, missing):
    monkeypatch.setattr(diagnosis, "_version_of", lambda command: None if missing in command else "1.0")
    facts = diagnose()
    assert facts["clients"][missing] is None
    assert any(missing in remedy["finding"] and remedy["level"] == "note" for remedy in facts["remedies"])
