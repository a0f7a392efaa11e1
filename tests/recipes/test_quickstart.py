"""The quickstart: equal terms for the three models, a sound report, and what it says when the MoE loses."""

import json
import random

import pytest
import yaml

from moekit.cli.main import main
from moekit.config.model import ModelConfig, TransformerXLConfig
from moekit.config.train import RunConfig
from moekit.data.prepare import prepare
from moekit.evaluate.page import check_report
from moekit.models import build_model
from moekit.models.accounting import active_parameters, total_parameters
from moekit.recipes import quickstart
from moekit.recipes.quickstart import (
    MODELS,
    base_config,
    describe,
    model_run,
    quickstart_recipe,
    run_quickstart,
    summary_line,
)
from moekit.train.run import load_run
from moekit.train.trackers import read_metrics

SIZES = ("full", "short")


def runs_of(size, **changes):
    recipe = quickstart_recipe(size == "short")
    base = base_config(recipe, "out", **{"seed": 3, **changes})
    return recipe, {name: model_run(base, name, recipe) for name in MODELS}


# --- the recipe


@pytest.mark.parametrize("size", SIZES)
def test_the_models_have_equal_active_parameters(size):
    """The twins a little more, never fewer; counted on real modules."""
    _, runs = runs_of(size)
    active = {name: active_parameters(run.model) for name, run in runs.items()}
    for name in ("dense", "transformer_xl"):
        assert 1 <= active[name] / active["moe"] < 1.015
        module = build_model(runs[name].model)
        assert sum(parameter.numel() for parameter in module.parameters()) == active[name]
    module = build_model(runs["moe"].model)
    assert sum(parameter.numel() for parameter in module.parameters()) == total_parameters(runs["moe"].model)
    experts = sum(p.numel() for name, p in module.named_parameters() if ".experts." in name)
    moe = runs["moe"].model.moe
    idle = experts * (moe.n_experts - moe.top_k) // moe.n_experts
    assert active["moe"] == total_parameters(runs["moe"].model) - idle


@pytest.mark.parametrize("size", SIZES)
def test_the_models_differ_in_architecture_and_learning_rate_only(size):
    recipe, runs = runs_of(size)
    assert {type(run.model) for run in runs.values()} == {ModelConfig, TransformerXLConfig}
    assert runs["dense"].model.moe is None
    assert runs["moe"].model.moe is not None
    for name, run in runs.items():
        assert run.train.optimizer.lr == recipe["lr"][name]
        same = run.train.optimizer.replace(lr=1.0)
        assert run.train.replace(optimizer=same) == runs["moe"].train.replace(optimizer=same)
        assert run.data == runs["moe"].data
        assert run.train.seed == 3
        for field in ("vocab_size", "d_model", "n_layers", "n_heads", "max_seq_len", "tie_embeddings"):
            assert getattr(run.model, field) == getattr(runs["moe"].model, field), field
    assert [run.name for run in runs.values()] == ["dense", "transformer-xl", "moe"]
    # a decoder must not look ahead, or its numbers are too good to be true
    assert not runs["moe"].model.allow_noncausal_router


def test_the_recipe_is_valid_and_complete():
    recipe = quickstart_recipe()
    assert recipe.keys() == {"run", "lr", "transformer_xl"}
    assert recipe["lr"].keys() == set(MODELS)
    assert recipe["run"]["data"]["corpus"] == "quickstart"
    RunConfig.from_dict(recipe["run"])


def test_short_is_merged_key_by_key(monkeypatch):
    full, short = quickstart_recipe(), quickstart_recipe(short=True)
    assert short["lr"] == full["lr"]
    # what short does not name stays, however deep it lies
    assert short["run"]["data"]["corpus"] == full["run"]["data"]["corpus"]
    assert short["run"]["data"]["vocab_size"] < full["run"]["data"]["vocab_size"]
    assert short["run"]["train"]["schedule"]["kind"] == full["run"]["train"]["schedule"]["kind"]
    assert (
        short["run"]["train"]["schedule"]["warmup_steps"] < full["run"]["train"]["schedule"]["warmup_steps"]
    )
    assert short["run"]["train"]["steps"] < full["run"]["train"]["steps"]
    assert short["run"]["model"]["moe"]["router"] == full["run"]["model"]["moe"]["router"]
    text = yaml.safe_dump(
        {
            "run": {"a": {"b": 1, "c": {"d": 2, "e": 3}}, "f": [1, 2]},
            "lr": {},
            "short": {"a": {"c": {"d": 4}}, "f": [5]},
        }
    )
    use_recipe(monkeypatch, text)
    assert quickstart_recipe() == {"run": {"a": {"b": 1, "c": {"d": 2, "e": 3}}, "f": [1, 2]}, "lr": {}}
    assert quickstart_recipe(True) == {"run": {"a": {"b": 1, "c": {"d": 4, "e": 3}}, "f": [5]}, "lr": {}}


def use_recipe(monkeypatch, text):
    """Another text in the place of quickstart.yaml."""

    class Folder:
        def joinpath(self, name):
            assert name == "quickstart.yaml"
            return self

        def read_text(self, encoding):
            return text

    monkeypatch.setattr(quickstart.resources, "files", lambda package: Folder())


def test_arguments_reach_the_run(tmp_path):
    base = base_config(quickstart_recipe(), tmp_path, seed=7, steps=11, offline=True)
    assert (base.train.seed, base.train.steps, base.data.offline) == (7, 11, True)
    assert base.runs_dir == str(tmp_path / "runs")
    default = base_config(quickstart_recipe(), tmp_path, seed=0)
    assert (default.train.steps, default.data.offline) == (
        quickstart_recipe()["run"]["train"]["steps"],
        False,
    )


def test_descriptions():
    _, runs = runs_of("full")
    moe = runs["moe"].model
    assert f"{moe.moe.n_experts} experts of width {moe.moe.d_expert}, top {moe.moe.top_k}" in describe(moe)
    assert describe(moe).endswith("by router hash (layers 0, 1) and softmax (layers 2, 3)")
    assert describe(moe.replace(moe_by_layer={})).endswith("by router softmax")
    shared = moe.replace(moe=moe.moe.replace(n_shared_experts=2))
    assert ", 2 shared, " in describe(shared)
    assert f"feed-forward {runs['dense'].model.d_ff}" in describe(runs["dense"].model)
    assert describe(runs["transformer_xl"].model).startswith("Transformer-XL, ")


def test_the_summary_tells_a_loss_as_plainly_as_a_win():
    def report(moe, dense, share):
        models = {"moe": {"bits_per_byte": {"mean": moe}}, "dense": {"bits_per_byte": {"mean": dense}}}
        return {"models": models, "to_dense_loss": {"steps_share": share}}

    won = summary_line(report(1.9, 2.0, 0.42))
    assert won == (
        "Bits per byte (lower is better): moe 1.900, dense 2.000. The MoE reached it after 42% of the steps."
    )
    lost = summary_line(report(2.1, 2.0, None))
    assert lost == (
        "Bits per byte (lower is better): dense 2.000, moe 2.100. "
        "The MoE never reached the dense twin's final loss."
    )


# --- from end to end

WORDS = {
    "code": ["def", "return", "import", "self", "for", "in", "if", "else", "x", "y", "(", ")", ":", "=", "+"],
    "english": ["the", "king", "shall", "speak", "to", "thee", "and", "my", "lord", "is", "gone"],
    "chinese": ["中", "国", "人", "民", "大", "会", "新", "华", "社", "北", "京", "今", "天"],
    "manual": ["see", "also", "note", "argument", "option", "default"],
}
TINY = """
run:
  data: {path: CORPUS, domain_column: domain, held_out_domain: manual, vocab_size: 300, seq_len: 16,
         validation_share: 0.1}
  model: {d_model: 16, n_layers: 2, n_heads: 2, max_seq_len: 16, moe: {n_experts: 4, top_k: 2, d_expert: 24}}
  train: {steps: 12, batch_size: 4, validate_every: 4, validation_batches: 2, checkpoint_every: 0,
          log_every: 2, device: cpu, precision: float32}
lr: {dense: 5.0e-3, transformer_xl: 2.0e-3, moe: 4.0e-3}
transformer_xl: {pre_norm: true, memory_length: 8}
short: {train: {steps: 4, validate_every: 2}}
"""


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """Four small domains in place of the corpus, and models that train in a second."""
    monkeypatch.setenv("MOEKIT_CACHE", str(tmp_path / "cache"))
    chance = random.Random(0)
    documents = []
    for index in range(80):
        domain = sorted(WORDS)[index % 4]
        text = f"{index} " + " ".join(chance.choices(WORDS[domain], k=50))
        documents.append(json.dumps({"text": text, "domain": domain}))
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text("\n".join(documents), encoding="utf-8")
    use_recipe(monkeypatch, TINY.replace("CORPUS", str(corpus)))


def test_from_corpus_to_report(tmp_path, tiny, capsys):
    out = tmp_path / "out"
    report = run_quickstart(out=out, seed=5)
    assert json.loads((out / "report.json").read_text(encoding="utf-8")) == report
    check_report(report)
    page = (out / "report.html").read_text(encoding="utf-8")
    assert page.startswith(("<!DOCTYPE html>", "<!doctype html>"))
    for word in ("code", "english", "chinese"):
        assert word in page

    said = capsys.readouterr()
    said = said.out + said.err
    assert "Preparing the corpus" in said
    for name in MODELS:
        assert f"Training {name} (12 steps of 64 tokens)" in said
    assert summary_line(report) in said

    runs = {name: load_run(out / "runs" / f"{name.replace('_', '-')}-1") for name in MODELS}
    prepared = prepare(runs["moe"].config.data)
    assert report["models"].keys() == set(MODELS)
    for name, model in report["models"].items():
        run = runs[name]
        assert model["tokens"] == 12 * 4 * 16
        assert model["active_parameters"] == active_parameters(run.config.model)
        assert model["total_parameters"] == total_parameters(run.config.model)
        bits = [model["bits_per_byte"][domain] for domain in ("chinese", "code", "english")]
        assert model["bits_per_byte"]["mean"] == pytest.approx(sum(bits) / 3)
        assert 0 < min(bits) < max(bits) < 20
        final = json.loads((run.folder / "final.json").read_text())
        assert model["final_loss"] == final["validation_loss"]
        assert model["train_seconds"] == final["train_seconds"]
        assert [point["step"] for point in model["curve"]] == [2, 4, 6, 8, 10, 12]
        assert [point["validation_loss"] is not None for point in model["curve"]] == [False, True] * 3
        lines = {line["step"]: line for line in read_metrics(run.folder / "metrics.jsonl", "train")}
        for point in model["curve"]:
            assert (point["loss"], point["tokens"]) == (lines[point["step"]]["loss"], 64 * point["step"])
        speeds = sorted(line["tokens_per_second"] for line in lines.values())
        assert model["train_tokens_per_second"] in speeds[2:4]
        assert model["inference_tokens_per_second"] > 0
        assert model["peak_memory_bytes"] > 1e7
        assert model["gap"]["held_out"] > model["gap"]["validation"]
        for prompt in quickstart.PROMPTS.values():
            assert prompt in model["sample"]
        # the same text in the same order for all three
        assert run.config.train.seed == 5
        assert report["settings"]["lr"][name] == run.config.train.optimizer.lr
    assert runs["transformer_xl"].config.model.pre_norm
    assert runs["transformer_xl"].config.model.memory_length == 8
    moe, dense = report["models"]["moe"], report["models"]["dense"]
    assert dense["active_parameters"] / moe["active_parameters"] >= 1
    assert report["corpus"]["held_out_domain"] == "manual"
    assert report["corpus"]["train_tokens"] == prepared.train.n_tokens
    assert report["corpus"]["vocab_size"] == prepared.tokenizer.vocab_size
    assert report["experts_by_domain"]["domains"] == ["chinese", "code", "english"]
    assert [point["step"] for point in report["balance"]["history"]] == [2, 4, 6, 8, 10, 12]
    assert report["to_dense_loss"].keys() == {"steps_share", "seconds_share"}
    assert report["command"] == "moekit quickstart --seed 5"


def test_the_command_line_passes_everything_on(tmp_path, tiny, capsys):
    """And a second quickstart into the same folder replaces the report, not the runs."""
    out = tmp_path / "out"
    arguments = ["quickstart", "--out", str(out), "--short", "--offline", "--no-open", "--quiet"]
    for attempt in range(2):
        assert main([*arguments, "--steps", "2", "--seed", str(attempt)]) == 0
        report = json.loads((out / "report.json").read_text())
        assert report["command"] == f"moekit quickstart --seed {attempt} --steps 2 --short --offline"
        assert report["settings"]["steps"] == 2
        assert {run.name for run in (out / "runs").iterdir()} == {
            f"{name}-{n}" for name in ("dense", "transformer-xl", "moe") for n in range(1, attempt + 2)
        }
    assert "Training" not in capsys.readouterr().out


@pytest.mark.slow
def test_on_the_text_of_this_python(tmp_path, monkeypatch):
    """The real recipe in its short form without any network: the fallback corpus, and a note that says so."""
    monkeypatch.setenv("MOEKIT_CACHE", str(tmp_path / "cache"))
    report = run_quickstart(out=tmp_path / "out", steps=12, short=True, offline=True, quiet=True)
    check_report(json.loads((tmp_path / "out" / "report.json").read_text(encoding="utf-8")))
    assert (tmp_path / "out" / "report.html").stat().st_size > 20_000
    assert report["corpus"]["domains"] == ["code", "documentation"]
    assert report["corpus"]["held_out_domain"] == "idlelib"
    assert any("fallback" in note for note in report["notes"])
    for model in report["models"].values():
        assert 1 < model["bits_per_byte"]["mean"] < 5
