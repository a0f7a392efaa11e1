"""moekit plan: the answer for programs and the table for people."""

from __future__ import annotations

import json

import pytest

SMALL = [
    "model.d_model=32",
    "model.n_layers=2",
    "model.n_heads=2",
    "model.vocab_size=300",
    "model.moe.n_experts=4",
    "model.moe.d_expert=16",
    "data.seq_len=16",
    "train.batch_size=4",
]
TABLE_WORDS = (
    "parameters, total",
    "parameters, active",
    "memory, optimizer",
    "FLOPs, the run",
    "time, the run",
    "fills all train.steps",
)


@pytest.fixture
def config_file(tmp_path) -> str:
    path = tmp_path / "run.yaml"
    path.write_text("name: planned\ntrain: {steps: 5}\n")
    return str(path)


def test_json(moekit_command, config_file):
    plan = json.loads(moekit_command("plan", config_file, *SMALL, "--json").out)
    assert plan["name"] == "planned"
    assert plan["parameters"]["active"] < plan["parameters"]["total"]
    assert plan["time"]["seconds"] > 0


def test_table(moekit_command, config_file):
    out = moekit_command("plan", config_file, *SMALL).out
    for words in TABLE_WORDS:
        assert words in " ".join(out.split())


def test_the_model_is_refused_before_anything_runs(moekit_command, config_file):
    result = moekit_command("plan", config_file, "model.moe.router=sigmiod")
    assert result.code == 2
    assert "did you mean 'sigmoid'?" in result.err
