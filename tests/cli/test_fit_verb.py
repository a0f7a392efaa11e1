"""moekit fit, and moekit generate within a memory."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from moekit.config.model import ModelConfig
from moekit.convert.formats.folder import write_model_folder
from moekit.data.documents import Document
from moekit.data.tokenizer import train_tokenizer
from moekit.models.language_model import LanguageModel

TEXT = "the experts that a token needs are read from the disk and kept for the next one " * 20


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("models") / "small"
    path.mkdir()
    tokenizer = train_tokenizer([Document("a", "english", TEXT)], vocab_size=280)
    tokenizer.save(path.parent / "tokenizer.json")
    config = ModelConfig.from_dict({
        "vocab_size": tokenizer.vocab_size, "d_model": 64, "n_layers": 2, "n_heads": 2, "max_seq_len": 128,
        "d_ff": 64, "moe": {"n_experts": 8, "top_k": 2, "d_expert": 64},
    })  # fmt: skip
    torch.manual_seed(0)
    files = {"tokenizer.json": path.parent / "tokenizer.json"}
    write_model_folder(LanguageModel(config), path, [{"step": "random"}], files)
    return path


@pytest.fixture
def little(moekit_command, folder) -> str:
    """Room for five of the 16 experts, and for 32 tokens."""
    done = moekit_command("fit", str(folder), "--memory", "1GB", "--context", "32", "--json")
    plan = json.loads(done.out)
    return str(plan["least_bytes"] + 3 * plan["expert_bytes"] // 16)


def test_the_plan_as_json_adds_up(moekit_command, folder):
    done = moekit_command("fit", str(folder), "--memory", "700KB", "--context", "40", "--json")
    plan = json.loads(done.out)
    parts = plan["bytes"]
    assert parts["total"] == sum(parts[name] for name in parts if name != "total") <= 700_000
    assert plan["experts"] == 16
    assert plan["context"] == 40
    assert [one["precision"] for one in plan["precisions"]] == ["float32", "bfloat16", "int8", "int4"]
    assert sum(one["chosen"] for one in plan["precisions"]) == 1


def test_the_tables_name_what_stays_and_what_to_do(moekit_command, folder):
    done = moekit_command("fit", str(folder), "--memory", "600KB", "--precision", "stored", "--context", "40")
    assert "experts that stay" in done.out
    assert "the others are read when needed" in done.out
    done = moekit_command("fit", str(folder), "--memory", "1GB")
    assert "Everything stays in memory, as it is stored" in done.out


def test_too_little_memory_is_an_error_of_usage(moekit_command, folder):
    done = moekit_command("fit", str(folder), "--memory", "1KB")
    assert done.code == 2
    assert "memory must be at least" in done.err
    assert "got 1,000. Allow more" in done.err


def test_generate_within_a_memory_writes_the_same_and_reports(moekit_command, folder, little, tmp_path):
    options = ["--max-tokens", "20", "--seed", "3", "--json"]
    whole = json.loads(moekit_command("generate", str(folder), "the experts", *options).out)
    assert "memory" not in whole
    record = ["--record", str(tmp_path / "routing")]
    within = json.loads(
        moekit_command("generate", str(folder), "the experts", "--memory", little, *record, *options).out
    )
    assert within["text"] == whole["text"]
    assert within["token_ids"] == whole["token_ids"]
    store, plan = within["memory"]["store"], within["memory"]["plan"]
    assert plan["experts_in_memory"] == 5
    assert store["needed"] == store["hits"] + store["late"] + store["misses"] > 0
    assert store["bytes_read"] > 0

    # the record tells what to expect, and what to read first
    known = json.loads(
        moekit_command("fit", str(folder), "--memory", little, "--precision", "stored", "--context", "32",
                       "--record", str(tmp_path / "routing"), "--json").out
    )  # fmt: skip
    rates = known["expected"]["hit_rate"]
    assert 0 < rates["lru"] <= rates["belady"] <= 1
    assert 0 < rates["aged"] <= rates["belady"]
    warm = json.loads(
        moekit_command("generate", str(folder), "the experts", "--memory", little, "--read-ahead", "off",
                       "--routing", str(tmp_path / "routing"), *options).out
    )  # fmt: skip
    assert warm["token_ids"] == whole["token_ids"]


def test_generate_says_in_words_what_was_read(moekit_command, folder, little):
    done = moekit_command("generate", str(folder), "a", "--max-tokens", "5", "--memory", little)
    assert "of their bytes in memory" in done.err
    assert "were there when needed" in done.err
    done = moekit_command("generate", str(folder), "a", "--max-tokens", "5", "--memory", "1GB")
    assert "all of them in memory" in done.err


def test_options_that_go_with_memory_alone(moekit_command, folder):
    done = moekit_command("generate", str(folder), "a", "--precision", "int8")
    assert done.code == 2
    assert "go with --memory" in done.err
