"""What each verb hands to the functions behind it, and what it prints."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from moekit.cli.output import duration, in_units, print_json


@pytest.fixture
def config_file(tmp_path) -> str:
    path = tmp_path / "run.yaml"
    path.write_text("name: mine\ntrain: {steps: 5}\n")
    return str(path)


@pytest.fixture
def training(stand_in):
    """Stand-ins for training that remember their calls and print as a chatty library would."""
    calls: list[tuple] = []

    def train_model(config, overrides, *, source=None, quiet=False):
        from moekit.config.loading import load_run_config

        print("progress")
        calls.append((load_run_config(config, overrides), quiet, source))
        return SimpleNamespace(
            folder=Path("runs/mine-1"), final={"loss": 2.5, "steps": 5, "broken": float("nan")}
        )

    def resume(folder, *, runs_dir="runs", overrides=(), quiet=False):
        calls.append((folder, runs_dir, list(overrides), quiet))
        return SimpleNamespace(folder=Path("runs/mine-1"), final={"loss": 2.4})

    stand_in("moekit.convert.training", train_model=train_model, resume=resume)
    return calls


def test_train(moekit_command, training, config_file):
    result = moekit_command("train", config_file, "train.steps=9", "model.moe.top_k=1", "--quiet")
    ((config, quiet, source),) = training
    assert (config.name, config.train.steps, config.model.moe.top_k, quiet) == ("mine", 9, 1, True)
    assert source is None
    assert result.code == 0
    assert "runs/mine-1" in result.out


def test_train_from_a_model(moekit_command, training, config_file):
    assert moekit_command("train", config_file, "--from", "a-model").code == 0
    assert training[0][2] == "a-model"


def test_json_holds_the_answer_and_nothing_else(moekit_command, training, config_file):
    result = moekit_command("train", config_file, "--json")
    assert json.loads(result.out) == {
        "folder": "runs/mine-1",
        "final": {"loss": 2.5, "steps": 5, "broken": None},
    }
    assert "progress" in result.err


def test_resume_newest(moekit_command, training):
    assert moekit_command("resume").code == 0
    assert training == [(None, "runs", [], False)]


def test_resume_newest_with_a_change(moekit_command, training):
    moekit_command("resume", "train.steps=20", "--runs-dir", "elsewhere")
    assert training == [(None, "elsewhere", ["train.steps=20"], False)]


def test_resume_one(moekit_command, training):
    moekit_command("resume", "runs/a", "train.steps=20", "--quiet")
    assert training == [(Path("runs/a"), "runs", ["train.steps=20"], True)]


def test_evaluate(moekit_command, stand_in):
    answer = {
        "parameters": 1200,
        "bits_per_byte": {"mean": 1.25, "code": 1.0},
        "balance": {"dead_experts": [0, 1]},
    }

    def evaluate_run(folder, *, max_batches=None, settings=()):
        assert (folder, max_batches, list(settings)) == (Path("runs/a"), 3, [])
        return answer

    stand_in("moekit.evaluate.run", evaluate_run=evaluate_run)
    assert json.loads(moekit_command("evaluate", "runs/a", "--max-batches", "3", "--json").out) == answer
    text = moekit_command("evaluate", "runs/a", "--max-batches", "3").out
    for words in ("1,200", "bits per byte", "1.25", "0, 1"):
        assert words in text


def test_quickstart(moekit_command, stand_in, tmp_path):
    calls = []

    def run_quickstart(**arguments):
        calls.append(arguments)
        return {"models": {}}

    stand_in("moekit.recipes.quickstart", run_quickstart=run_quickstart)
    out = tmp_path / "q"
    result = moekit_command(
        "quickstart", "--out", str(out), "--short", "--seed", "3", "--offline", "--no-open", "--json"
    )
    assert json.loads(result.out) == {"models": {}}
    assert calls == [{"out": out, "steps": None, "seed": 3, "short": True, "offline": True, "quiet": False}]


def test_league(moekit_command, stand_in, tmp_path):
    def run_league(*, out, steps, seeds, routers, short):
        assert (out, steps, seeds, routers, short) == (tmp_path, 20, 2, ["softmax", "hash"], True)
        return {"table": {"columns": ["router", "loss"], "rows": [["softmax", 1.234], ["hash", None]]}}

    stand_in("moekit.recipes.league", run_league=run_league)
    arguments = ["league", "--out", str(tmp_path), "--steps", "20", "--seeds", "2", "--router", "softmax",
                 "--router", "hash", "--short"]  # fmt: skip
    assert json.loads(moekit_command(*arguments, "--json").out)["table"]["columns"] == ["router", "loss"]
    assert "1.234" in moekit_command(*arguments).out


def test_config_show_is_a_configuration(moekit_command, config_file, tmp_path):
    from moekit.config.loading import load_run_config

    shown = tmp_path / "shown.yaml"
    shown.write_text(moekit_command("config", "show", config_file, "train.seed=4").out)
    assert load_run_config(shown) == load_run_config(config_file, ["train.seed=4"])
    as_json = json.loads(moekit_command("config", "show", config_file, "train.seed=4", "--json").out)
    assert as_json == load_run_config(shown).to_dict()


def test_config_show_without_a_file(moekit_command):
    assert "steps: 7\n" in moekit_command("config", "show", "train.steps=7").out


def test_config_explain(moekit_command):
    assert "at least 1" in moekit_command("config", "explain", "train.steps").out
    (info,) = json.loads(moekit_command("config", "explain", "train.steps", "--json").out)
    assert (info["key"], info["type"], info["default"]) == ("train.steps", "integer", "300")


def test_config_explain_lists_the_routers_and_their_options(moekit_command):
    from moekit.layers.routing import ROUTERS

    out = moekit_command("config", "explain", "model.moe.router").out
    for name, cls in ROUTERS.items():
        assert f"  {name}" in out
        for option in cls.Options.model_fields:
            assert f"{option}:" in out


def test_data_list(moekit_command):
    assert "quickstart" in moekit_command("data", "list").out
    assert "python" in json.loads(moekit_command("data", "list", "--json").out)


def test_data_describe_own_text(moekit_command, tmp_path):
    for number in range(40):
        (tmp_path / f"{number}.txt").write_text(f"Text number {number}. " * 20, encoding="utf-8")
    result = moekit_command("data", "describe", str(tmp_path), "data.validation_share=0.25", "--json")
    facts = json.loads(result.out)
    (sizes,) = facts["domains"].values()
    total = sum(path.stat().st_size for path in tmp_path.iterdir())
    assert sizes["train"]["bytes"] + sizes["validation"]["bytes"] == total
    assert 5 <= sizes["validation"]["documents"] <= 15
    assert facts["sources"][0]["origin"]
    assert "documents" in moekit_command("data", "describe", str(tmp_path)).out


def test_json_has_no_nan(capsys):
    print_json({"a": [float("inf"), 1.5], "b": Path("x/y"), 3: "数据"})
    text = capsys.readouterr().out
    assert json.loads(text) == {"a": [None, 1.5], "b": "x/y", "3": "数据"}
    assert "数据" in text


def test_large_numbers_and_times():
    assert [in_units(999), in_units(1000), in_units(2.5e9, "FLOP"), in_units(0, "B", 1024)] == \
        ["999", "1.00 k", "2.50 GFLOP", "0 B"]  # fmt: skip
    assert [duration(0.31), duration(59.7), duration(3600), duration(86400 * 3)] == \
        ["0.3 s", "1 min 0 s", "1 h 0 min", "3 d 0 h"]  # fmt: skip
