"""From a trained run to its page, as a user types it."""

from __future__ import annotations

import io
import json
import random
from pathlib import Path

import numpy as np
import pytest

from moekit.cli.main import main
from moekit.explain.reading import record_run

CONFIG = """
name: tiny
model:
  vocab_size: 300
  d_model: 32
  n_layers: 2
  n_heads: 2
  moe: {n_experts: 4, d_expert: 16, top_k: 2}
data: {corpus: null, vocab_size: 300, seq_len: 32, validation_share: 0.2}
train: {steps: 4, batch_size: 4, log_every: 2, validate_every: 4, checkpoint_every: 4, validation_batches: 1}
"""
ALPHABETS = {"letters": "abcdefgh", "digits": "0123456789"}


@pytest.fixture(scope="module")
def workplace(tmp_path_factory) -> Path:
    """A folder with text of two domains and a sparse and a dense run."""
    folder = tmp_path_factory.mktemp("explained")
    draw = random.Random(0)
    for domain, signs in ALPHABETS.items():
        (folder / "text" / domain).mkdir(parents=True)
        for number in range(15):
            text = " ".join("".join(draw.choices(signs, k=4)) for _ in range(120))
            (folder / "text" / domain / f"{number}.txt").write_text(text)
    (folder / "run.yaml").write_text(CONFIG)
    patch = pytest.MonkeyPatch()
    patch.setenv("MOEKIT_CACHE", str(folder / "cache"))
    patch.setenv("MOEKIT_CPU_KERNELS", "0")  # an empty cache would compile them
    patch.chdir(folder)
    for extra in ("runs_dir=sparse", "runs_dir=dense model.moe=null"):
        assert main(["train", "run.yaml", "data.path=text", *extra.split(), "--quiet"]) == 0
    yield folder
    patch.undo()


def only(folder: Path) -> Path:
    (run,) = folder.iterdir()
    return run


def test_explain_writes_a_page_and_its_figures(workplace, capsys):
    run = only(workplace / "sparse")
    assert main(["explain", str(run), "--tokens", "500", "--causes"]) == 0
    said = capsys.readouterr().out
    assert f"page: {run / 'explain.html'}" in said
    report = json.loads((run / "explain.json").read_text("utf-8"))
    assert report["verdict"] in said
    assert set(report["groups"]) == set(ALPHABETS)
    assert 0 < report["sampling"]["rows"] <= 500 < report["n_tokens"]
    assert len(report["causes"]) == 8, "two groups in each of two layers, in two ways"
    assert {one["ruling"] for one in report["causes"]} <= {"supported", "not supported", "contrary"}
    assert {one["layer"] for one in report["causes"]} == {0, 1}
    for text in report["texts"]:
        assert not any(text["gap"]), "samples have every token"
        assert set("".join(text["tokens"])) - set(" <|endoftext|>") <= set(ALPHABETS[text["group"]])
    for layer in report["layers"]:
        assert sum(layer["load"]) == pytest.approx(1, abs=1e-3)
    assert report["verdict"] in (run / "explain.html").read_text("utf-8")


def test_explain_says_all_of_it_as_json(workplace, capsys):
    run, page = only(workplace / "sparse"), workplace / "pages" / "experts.html"
    assert main(["explain", str(run), "--out", str(page), "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["page"] == str(page)
    assert answer["causes"] is None
    assert page.is_file()
    assert page.with_suffix(".json").is_file()


def test_explain_reads_a_record(workplace, capsys):
    folder = workplace / "record"
    record = record_run(only(workplace / "sparse"), tokens=300)
    record.save(folder)
    assert main(["explain", str(folder), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert np.allclose(
        report["layers"][1]["load"], record.of(1, "requested") / record.of(1, "requested").sum(), atol=1e-4
    )
    assert (folder / "explain.html").is_file()
    assert main(["explain", str(folder), "--causes"]) != 0
    assert "Give its run's folder" in capsys.readouterr().err


def test_what_has_no_experts_is_refused(workplace, capsys, tmp_path):
    assert main(["explain", str(only(workplace / "dense"))]) != 0
    assert "is a dense model" in capsys.readouterr().err
    assert main(["explain", str(tmp_path)]) != 0
    assert "is no run" in capsys.readouterr().err
    (tmp_path / "encoding.json").write_text("{}")
    assert main(["explain", str(tmp_path)]) == 2
    assert "moekit evaluate" in capsys.readouterr().err


def test_one_text_is_explained(workplace, capsys, monkeypatch):
    run = only(workplace / "sparse")
    assert main(["explain", str(run), "--text", "abcd efgh", "--swap", "1:0:2", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["page"] == str(run / "explain-text.html")
    assert (run / "explain-text.html").is_file()
    assert not (run / "explain.html").read_text("utf-8").startswith(report["verdict"])
    assert "".join(report["texts"][0]["tokens"]).endswith("abcd efgh")
    assert len(report["layers"]) == 2
    assert report["swaps"][0]["layer"] == 1
    monkeypatch.setattr("sys.stdin", io.StringIO("abcd efgh"))
    assert (
        main(["explain", str(run), "--text", "-", "--instead", "next", "--out", str(workplace / "n.html")])
        == 0
    )
    said = capsys.readouterr().out
    assert "layer 1" in said
    assert "next best expert takes its place" in said
    assert f"page: {workplace / 'n.html'}" in said
    file = workplace / "one.txt"
    file.write_text("abcd efgh")
    assert main(["explain", str(run), "--file", str(file), "--effects", "none", "--json"]) == 0
    plain = json.loads(capsys.readouterr().out)
    assert plain["measures"] == []
    assert plain["texts"][0]["layers"][0]["experts"] == report["texts"][0]["layers"][0]["experts"]


def test_one_text_that_cannot_be_explained(workplace, capsys):
    run = str(only(workplace / "sparse"))
    wrong = {
        ("--text", "a", "--file", "run.yaml"): "exclude each other",
        ("--swap", "1:0:2"): "needs an input",
        ("--text", "a", "--swap", "9:0:1"): r"layer must be 0..1",
        ("--input", "a.csv"): "are for runs of tasks",
        ("--text", "a b c d e f", "--limit", "20"): "limit must be at least",
    }
    for given, words in wrong.items():
        assert main(["explain", run, *given]) != 0
        assert words in capsys.readouterr().err, given
    assert main(["explain", str(only(workplace / "dense")), "--text", "a"]) != 0
    assert "dense" in capsys.readouterr().err
