"""`moekit bench`: table, JSON, exit codes; peers that are missing."""

from __future__ import annotations

import json
import sys

import pytest

from moekit.config.errors import DataError
from moekit.evaluate.bench import layer, limits, peers
from moekit.evaluate.bench.result import check_result

TINY = [
    "--tokens=8",
    "--d-model=32",
    "--d-expert=16",
    "--experts=4",
    "--top-k=2",
    "--repeats=2",
    "--warmup=0",
]


@pytest.fixture(autouse=True)
def _small_gauges(monkeypatch):
    monkeypatch.setattr(limits, "MATRIX", 32)
    monkeypatch.setattr(limits, "BUFFER", 4096)


def test_json_follows_its_schema(moekit_command):
    result = moekit_command("bench", "layer", *TINY, "--against=dense", "--seed=3", "--threads=1", "--json")
    assert result.code == 0
    answer = json.loads(result.out)
    check_result(answer)
    assert answer["subject"] == "layer"
    assert answer["settings"] == {"against": ["dense"], "seed": 3, "repeats": 2, "warmup": 0}
    assert answer["machine"]["threads"] == 1
    assert [case["name"] for case in answer["cases"]] == ["own, forward", "own, forward and backward"]
    assert all(len(row["seconds"]["samples"]) == 2 for case in answer["cases"] for row in case["contestants"])
    assert "own, forward: moekit" in result.err


@pytest.mark.parametrize(
    ("place", "value", "words"),
    [
        (("cases", 0, "contestants", 0, "ratio"), ..., r"moekit must hold .*missing: \['ratio'\]"),
        (("machine", "threads"), "two", "machine.threads must be int; got 'two'"),
        (("cases", 0, "limits", "gflops"), 1.0, r"limits must hold .*unknown: \['gflops'\]"),
        (("schema",), "moekit.bench/0", "must be moekit.bench/1"),
        (("subject",), "speed", "must be one of layer, decode, step, model"),
    ],
)
def test_a_result_that_breaks_the_schema(moekit_command, place, value, words):
    answer = json.loads(
        moekit_command("bench", "layer", *TINY, "--against=none", "--no-backward", "--json").out
    )
    group = answer
    for key in place[:-1]:
        group = group[key]
    if value is ...:
        del group[place[-1]]
    else:
        group[place[-1]] = value
    with pytest.raises(DataError, match=words):
        check_result(answer)


def test_table(moekit_command):
    out = moekit_command("bench", "layer", *TINY, "--against=dense", "--memory", "--no-backward").out
    for words in ("median ms", "quartiles", "x moekit", "GFLOP/s", "of limit", "memory", "dense", "limit:"):
        assert words in out
    assert "forward and backward" not in out


def test_tables_of_the_others(moekit_command):
    pytest.importorskip("transformers", minversion="5.0")
    small = ["model.d_model=32", "model.n_layers=3", "model.vocab_size=64", "data.seq_len=16", "train.batch_size=2",
             "model.moe.n_experts=4", "model.moe.d_expert=16"]  # fmt: skip
    out = moekit_command("bench", "step", *small, "--repeats=1", "--warmup=0").out
    for words in ("training step", "tokens/s", "moekit against the best peer, transformers", "note:"):
        assert words in out
    sizes = ["--layers=1", "--d-model=32", "--d-expert=16", "--experts=4", "--top-k=2", "--heads=2",
             "--vocab-size=64", "--prompt=8", "--new-tokens=2"]  # fmt: skip
    out = moekit_command("bench", "model", *sizes, "--repeats=1", "--warmup=0").out
    for words in ("prefill", "decode", "GB/s", "GFLOP/s", "tokens/s"):
        assert words in out


def test_a_wrong_answer_ends_with_7_and_is_not_reported(moekit_command, monkeypatch):
    monkeypatch.setattr(layer, "dense_swiglu", wrong_from_the_second_call(layer.dense_swiglu))
    result = moekit_command("bench", "layer", *TINY, "--against=dense", "--no-backward", "--json")
    assert result.code == 7
    assert "error: an answer differs from the float32 reference" in result.err
    assert "dense (own, forward): output is off by" in result.err
    case = json.loads(result.out)["cases"][0]
    assert "dense" in case["refused"]
    assert "dense" not in [row["name"] for row in case["contestants"]]
    assert case["contestants"][0]["name"] == "moekit"  # the others stand


def wrong_from_the_second_call(function):
    """Right in bfloat16, the first time; the reference is computed second, and the rest is judged by it."""

    def wrong(tokens, *weights):
        result = function(tokens, *weights)
        return result if str(tokens.dtype) == "torch.float32" else result * 1.1

    return wrong


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["layer", "--against=transformer"], "did you mean 'transformers'?"),
        (["decode", "--against=dense"], "--against must list peers of bench decode"),
        (["layer", "--preset=e16"], "--preset must be a known shape"),
        (["layer", "--against=none", "--repeats=0"], "--repeats must be at least 1; got 0"),
        (["layer", "--against=none", "--top-k=99"], "--top-k must be at most --experts (16); got 99"),
        (["decode", "--against=none", "--tokens=1,x"], "--tokens must be whole numbers with commas"),
        (["step", "--against=none", "model.d_modle=3"], "d_modle"),
        (["layr"], "layr"),
    ],
)
def test_wrong_use(moekit_command, arguments, words):
    result = moekit_command("bench", *arguments)
    assert (result.code, result.out) == (2, "")
    assert words in result.err


@pytest.mark.parametrize(
    ("peer", "version", "words"),
    [
        ("transformers", None, "needs transformers. Install it: pip install 'moekit[transformers]'"),
        ("transformers", "4.57.1", "needs transformers 5 or newer; 4.57.1 is installed"),
        ("llama-cpp", None, "needs llama-cpp-python. Install it: pip install 'moekit[llama-cpp]'"),
    ],
)
def test_a_missing_peer_ends_with_6_and_the_command_that_installs_it(
    moekit_command, monkeypatch, peer, version, words
):
    monkeypatch.setattr(peers, "installed_version", lambda name: version)
    result = moekit_command("bench", "model", f"--against={peer}")
    assert (result.code, result.out) == (6, "")
    assert words in result.err
    assert "--against none" in result.err


def test_every_extra_of_a_peer_is_declared(repository):
    if sys.version_info < (3, 11):
        pytest.skip("reads pyproject.toml with tomllib")
    import tomllib

    extras = tomllib.loads((repository / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for peer, distributions in peers.PEERS.items():
        for name in distributions:
            assert any(requirement.startswith(name) for requirement in extras[peer])
