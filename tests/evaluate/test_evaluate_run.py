"""`moekit evaluate`: what is measured of a run, and on which data."""

import json
import random

import pytest
import torch

from moekit.cli.main import main
from moekit.config.errors import CheckpointError
from moekit.config.train import RunConfig
from moekit.data.prepare import prepare
from moekit.evaluate import run as run_module
from moekit.evaluate.metrics import evaluate_split, mean_bits_per_byte
from moekit.evaluate.run import evaluate_run, setting_of
from moekit.models.accounting import active_parameters, flops_per_token, total_parameters
from moekit.train.run import load_run, train_run

DOMAINS = {
    "animals": "cat dog owl hen fox eel",
    "colours": "red blue green pink",
    "numbers": "1 22 333 4444 55555",
}


def write_corpus(path, seed=0):
    chance = random.Random(seed)
    lines = []
    for index in range(90):
        domain = sorted(DOMAINS)[index % 3]
        text = f"{index} " + " ".join(chance.choices(DOMAINS[domain].split(), k=40))
        lines.append(json.dumps({"text": text, "domain": domain}))
    path.write_text("\n".join(lines), encoding="utf-8")


def config_in(folder, **model):
    return RunConfig.from_dict(
        {
            "runs_dir": str(folder / "runs"),
            "model": {"d_model": 16, "n_layers": 2, "n_heads": 2, **model},
            "data": {"path": str(folder / "corpus.jsonl"), "domain_column": "domain", "vocab_size": 280,
                     "seq_len": 16, "validation_share": 0.2, "held_out_domain": "numbers"},
            "train": {"steps": 3, "batch_size": 4, "device": "cpu", "precision": "float32"},
        }
    )  # fmt: skip


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A corpus with a held-out domain, a sparse and a dense run on it."""
    folder = tmp_path_factory.mktemp("evaluate")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOEKIT_CACHE", str(folder / "cache"))
        write_corpus(folder / "corpus.jsonl")
        for model in ({"moe": {"n_experts": 4, "d_expert": 8}}, {"d_ff": 16}):
            train_run(config_in(folder, **model), quiet=True)
        yield folder


def test_everything_about_a_sparse_run(workplace):
    report = evaluate_run(workplace / "runs" / "run-1")
    assert json.loads(json.dumps(report, allow_nan=False)) == report
    run = load_run(workplace / "runs" / "run-1")
    data = prepare(run.config.data)
    assert (report["run"], report["step"]) == (str(run.folder), 3)
    results = evaluate_split(run.model, data.validation, data.tokenizer, setting_of(run))
    bits = {domain: result.bits_per_byte for domain, result in results.items()}
    assert bits.keys() == {"animals", "colours"}, "the held-out domain is apart"
    assert report["bits_per_byte"] == {"mean": sum(bits.values()) / 2, **bits}
    assert report["gap"]["validation"] == report["bits_per_byte"]["mean"]
    held_out = evaluate_split(run.model, data.held_out, data.tokenizer, setting_of(run))
    assert held_out.keys() == {"numbers"}
    assert report["gap"]["held_out"] == mean_bits_per_byte(held_out)
    assert report["gap"]["train"] < report["gap"]["held_out"], (
        "three steps suffice to tell known words from others"
    )
    for name, function in (("active_parameters", active_parameters), ("total_parameters", total_parameters),
                           ("flops_per_token", flops_per_token)):  # fmt: skip
        assert report[name] == function(run.config.model)
    routers = [layer.router.name for layer in run.model.moe_layers]
    for table in ("balance", "experts_by_domain"):
        assert [layer["router"] for layer in report[table]["layers"]] == routers == ["softmax"] * 2
    assert report["experts_by_domain"]["domains"] == ["animals", "colours"]
    for layer in report["experts_by_domain"]["layers"]:
        assert [sum(row) for row in layer["share"]] == pytest.approx([1, 1])
    assert report["inference_tokens_per_second"] > 0
    assert report["peak_memory_bytes"] > 1e7


def test_a_dense_run_and_no_held_out_domain(workplace, tmp_path):
    report = evaluate_run(workplace / "runs" / "run-2")
    assert report["balance"] == report["experts_by_domain"] == {}
    config = config_in(workplace)
    data = config.data.replace(held_out_domain=None)
    folder = train_run(config.replace(data=data, runs_dir=str(tmp_path)), quiet=True).folder
    report = evaluate_run(folder)
    assert report["gap"]["held_out"] is None
    assert report["bits_per_byte"].keys() == {"mean", "animals", "colours", "numbers"}


def test_evaluating_twice_gives_the_same(workplace):
    torch.manual_seed(3)
    first = evaluate_run(workplace / "runs" / "run-1")
    torch.manual_seed(4)
    second = evaluate_run(workplace / "runs" / "run-1")
    for name in ("inference_tokens_per_second", "peak_memory_bytes"):
        del first[name], second[name]
    assert first == second


def test_at_most_so_many_batches(workplace, monkeypatch):
    asked = []
    original = run_module.evaluate_split

    def note(model, split, tokenizer, setting):
        results = original(model, split, tokenizer, setting)
        asked.append((split.n_tokens, setting.max_batches, [result.n_tokens for result in results.values()]))
        return results

    monkeypatch.setattr(run_module, "evaluate_split", note)
    run = workplace / "runs" / "run-1"
    data = prepare(load_run(run).config.data)
    evaluate_run(run, max_batches=2)
    # validation, training (for the gap) and held-out: two batches of 4 x 16 tokens of each domain
    assert asked == [
        (data.validation.n_tokens, 2, [128, 128]),
        (data.train.n_tokens, 2, [128, 128]),
        (data.held_out.n_tokens, 2, [128]),
    ]
    asked.clear()
    evaluate_run(run)
    # in full, but of the training text only as much as the gap needs
    assert [(n, limit) for n, limit, _ in asked] == [
        (data.validation.n_tokens, None), (data.train.n_tokens, 12), (data.held_out.n_tokens, None)
    ]  # fmt: skip
    assert sum(asked[0][2]) == data.validation.n_tokens
    assert asked[1][2] == [12 * 64, 12 * 64]


def test_changed_data_is_refused(workplace, capsys):
    """Another text gives another tokenizer, and the model's numbers would mean nothing."""
    corpus = workplace / "corpus.jsonl"
    before = corpus.read_bytes()
    try:
        write_corpus(corpus, seed=1)
        with pytest.raises(CheckpointError, match=r"the data of .*run-1 has changed"):
            evaluate_run(workplace / "runs" / "run-1")
        assert main(["evaluate", str(workplace / "runs" / "run-1")]) == 4
        assert "has changed since the run began" in capsys.readouterr().err
    finally:
        corpus.write_bytes(before)
    with pytest.raises(CheckpointError, match="is no run"):
        evaluate_run(workplace)
