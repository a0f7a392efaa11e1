"""The routing of generation: every token once, as one pass over the whole text routes it."""

import numpy as np
import pytest
import torch

from moekit.cli.main import main
from moekit.config.errors import ConfigError
from moekit.config.model import ModelConfig
from moekit.data.documents import Document
from moekit.data.tokenizer import train_tokenizer
from moekit.generate import generate
from moekit.generate.trace import RoutingTrace
from moekit.models import build_model
from moekit.observe.record import RoutingRecord

TEXT = "the cat sat on the mat. " * 20


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([Document(TEXT, "mixed", "a")], vocab_size=280)


# reads the text again at each step: its keyword holds from there on
RULE = {"name": "rule", "options": {"rules": [{"expert": 3, "token_ids": [[i] for i in range(60, 75)]}],
                                    "scope": "onward"}}  # fmt: skip


def model(tokenizer, router="softmax", length=64, **fields):
    torch.manual_seed(0)
    return build_model(ModelConfig.from_dict({
        "vocab_size": tokenizer.vocab_size, "d_model": 16, "n_layers": 2, "n_heads": 2, "max_seq_len": length,
        "init_std": 0.3,
        "moe": {"n_experts": 4, "top_k": 2 if router == "softmax" else 1, "d_expert": 8, "router": router,
                "balance": {"load_balance": 0}}, **fields,
    })).double()  # fmt: skip


@pytest.mark.parametrize("router", ["softmax", RULE], ids=["cached", "read again"])
def test_every_token_is_routed_once_as_in_one_pass(tokenizer, router):
    sparse = model(tokenizer, router)
    trace = RoutingTrace(sparse)
    prompts = ["the cat", "sat on the mat. the cat", "the mat"]
    answers = generate(sparse, tokenizer, prompts, max_new_tokens=6, stop_at_end=False, trace=trace)
    record = trace.record(model="here")
    assert (record.source, record.groups) == ("generation", ("read", "written"))
    lengths = [1 + len(tokenizer.encode(prompt)) for prompt in prompts]
    assert record.arrays["tokens"].tolist() == [sum(lengths), 18]
    for number, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        rows = np.flatnonzero(record.arrays["token/text"] == number)
        rows = rows[np.argsort(record.arrays["token/position"][rows])]
        n = lengths[number]
        whole = [tokenizer.end_id, *tokenizer.encode(prompt), *answer.token_ids]
        assert record.arrays["token/id"][rows].tolist() == whole
        assert record.arrays["token/position"][rows].tolist() == list(range(n + 6))
        assert record.arrays["token/step"][rows].tolist() == [0] * n + [1, 2, 3, 4, 5, 6]
        assert record.arrays["token/group"][rows].tolist() == [0] * n + [1] * 6
        with torch.no_grad():
            plans = sparse.eval()(torch.tensor([whole])).routing
        for layer, plan in enumerate(plans):
            chosen = torch.zeros(len(whole), 4)
            chosen[plan.token_index, plan.expert_of_row()] = 1
            experts = torch.from_numpy(record.of(layer, "token/experts")[rows]).long()
            assert torch.equal(torch.zeros(len(whole), 4).scatter_(1, experts, 1), chosen)


@pytest.mark.parametrize("router", ["softmax", RULE], ids=["cached", "read again"])
def test_a_full_window_counts_nothing_twice(tokenizer, router):
    sparse = model(tokenizer, router, length=8)
    trace = RoutingTrace(sparse)
    generate(sparse, tokenizer, "the", max_new_tokens=20, stop_at_end=False, trace=trace)
    record = trace.record()
    n = 1 + len(tokenizer.encode("the"))
    assert record.arrays["token/position"].tolist() == list(range(n + 20))
    k = 2 if router == "softmax" else 1
    assert record.of(0, "counts").sum(axis=1).tolist() == [k * n, k * 20]


def test_a_prompt_longer_than_the_window(tokenizer):
    sparse = model(tokenizer, length=8)
    trace = RoutingTrace(sparse)
    ids = list(range(1, 13))
    generate(sparse, tokenizer, [ids], max_new_tokens=2, stop_at_end=False, trace=trace)
    record = trace.record()
    assert record.arrays["token/position"].tolist() == list(range(4, 14)), "the first four were not read"
    assert record.arrays["token/id"].tolist()[:8] == ids[4:]


def test_recording_changes_no_text(tokenizer):
    sparse = model(tokenizer)
    plain = generate(sparse, tokenizer, "the cat", max_new_tokens=8, seed=3)
    traced = generate(sparse, tokenizer, "the cat", max_new_tokens=8, seed=3, trace=RoutingTrace(sparse))
    assert [answer.token_ids for answer in plain] == [answer.token_ids for answer in traced]


def test_a_dense_model_is_refused(tokenizer):
    with pytest.raises(ConfigError, match="needs a model with experts; this one is dense"):
        RoutingTrace(model(tokenizer, moe=None, d_ff=16))


def test_the_verb_writes_the_record(tmp_path, capsys, monkeypatch):
    from moekit.config.train import RunConfig
    from moekit.train.run import train_run

    monkeypatch.setenv("MOEKIT_CACHE", str(tmp_path / "cache"))
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("\n\n".join(f"{i}: {TEXT}" for i in range(20)), encoding="utf-8")
    run = train_run(RunConfig.from_dict({
        "runs_dir": str(tmp_path / "runs"), "data": {"path": str(corpus), "vocab_size": 270, "seq_len": 16,
                                                      "validation_share": 0.2, "offline": True},
        "model": {"d_model": 16, "n_layers": 1, "n_heads": 2, "max_seq_len": 16,
                  "moe": {"n_experts": 4, "top_k": 2, "d_expert": 8}},
        "train": {"steps": 1, "batch_size": 2, "device": "cpu", "precision": "float32"},
    }), quiet=True).folder  # fmt: skip
    folder = tmp_path / "routing"
    assert main(["generate", str(run), "the cat", "--max-tokens", "5", "--record", str(folder)]) == 0
    record = RoutingRecord.load(folder)
    assert record.info["prompt"] == "the cat"
    assert record.info["model"] == str(run)
    assert 0 < record.arrays["tokens"][1] <= 5
    capsys.readouterr()
