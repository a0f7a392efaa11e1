"""A recipe's run: twin and sparse model on the same examples, baselines, rows that are kept, tables."""

from __future__ import annotations

import json
import random
import types

import pytest

from moekit.config.errors import ConfigError
from moekit.models.accounting import active_parameters
from moekit.recipes import running
from moekit.recipes.running import run_all, run_recipe
from moekit.recipes.tables import recipe_table, table_of_all, verdict
from moekit.recipes.tasks import Measure, Recipe
from moekit.train.run import load_task_run


def recipe(path, **fields) -> Recipe:
    run = {
        "data": {"path": str(path), "test_share": 0.25, "validation_share": 0.1},
        "inputs": {"text": {"kind": "text", "tokenizer": "words"}, "age": {"kind": "fields", "numbers": ["age"]}},
        "targets": {"label": {"kind": "class"}, "value": {"kind": "number"}},
        "model": {"d_model": 16, "n_layers": 1, "n_heads": 2, "moe": {"n_experts": 4, "top_k": 2, "d_expert": 16}},
        "train": {"batch_size": 16, "device": "cpu", "validate_every": 0, "checkpoint_every": 0,
                  "optimizer": {"lr": 0.02}, "schedule": {"warmup_steps": 2}},
        "epochs": 6,
    }  # fmt: skip
    base = Recipe(
        name="own", title="Own", about="Of a file.", minutes=1,
        measures=(Measure("label", "accuracy", {}), Measure("label", "roc_auc", {}), Measure("value", "rmse", {})),
        baselines=("majority", "tfidf-svm"), variants={"all": {}, "fewer": {"data": {"max_examples": 60}}},
        published={"all": [{"figure": 0.9, "what": "somebody"}]}, run=run, short={"epochs": 1}, lr={"dense": 0.01},
    )  # fmt: skip
    return Recipe(**{**vars(base), **fields})


@pytest.fixture
def own(tmp_path, monkeypatch):
    """The recipe under its name, on a file of texts whose words give the label away."""
    pytest.importorskip("sklearn")
    rng = random.Random(0)
    words = {"sport": "ball goal team", "food": "bread soup salt"}
    rows = []
    for _ in range(160):
        label = rng.choice(list(words))
        text = " ".join(rng.choices([*words[label].split(), "the", "a"], k=6))
        rows.append(f"{text},{rng.random():.3f},{label},{(label == 'food') + rng.gauss(0, 0.1):.3f}")
    path = tmp_path / "own.csv"
    path.write_text("text,age,label,value\n" + "\n".join(rows) + "\n")
    found = recipe(path)
    for module in ("moekit.recipes.running", "moekit.recipes.tables"):
        monkeypatch.setattr(f"{module}.load_recipe", lambda name: found)
    return found


def test_a_whole_run(own, tmp_path):
    said: list[str] = []
    result = run_recipe("own", seeds=2, out=tmp_path / "out", say=said.append)
    rows = result["rows"]
    assert list(rows) == ["majority", "tfidf-svm", "dense twin", "MoE"]
    assert len(rows["MoE"]) == len(rows["dense twin"]) == 2
    for row in (*rows["MoE"], *rows["dense twin"], *rows["tfidf-svm"]):
        assert row["scores"]["label.accuracy"] > 0.9
        assert row["scores"]["label.roc_auc"] > 0.9
        assert row["seconds"] > 0
        assert row["processor_seconds"] > 0
    # the targets' deviation is 0.5: something was learnt
    assert rows["MoE"][0]["scores"]["value.rmse"] < 0.4 < rows["majority"][0]["scores"]["value.rmse"] < 0.6
    assert rows["tfidf-svm"][0]["scores"]["value.rmse"] < 0.4
    sparse, dense = (load_task_run(rows[kind][0]["folder"]) for kind in ("MoE", "dense twin"))
    assert not dense.model.moe_layers
    assert active_parameters(sparse.config.model) <= active_parameters(dense.config.model)
    assert rows["MoE"][0]["active"] == active_parameters(sparse.config.model) < rows["MoE"][0]["total"]
    assert dense.config.train.optimizer.lr == 0.01
    assert dense.config.train.seed == 0
    assert result["table"]["columns"] == ["model", "label accuracy", "label roc_auc", "value rmse", "active", "total",
                                          "processor seconds"]  # fmt: skip
    assert [row[0] for row in result["table"]["rows"]] == ["majority", "tfidf-svm", "dense twin", "**MoE**",
                                                           "published: somebody"]  # fmt: skip
    assert "±" in result["table"]["rows"][3][1]
    assert (
        "40 to test on (a share of the examples that was held out); mean ± deviation over 2 seeds"
        in result["note"]
    )
    assert json.loads((tmp_path / "out" / "own-all.json").read_text())["table"] == result["table"]
    assert result["command"] == "moekit recipes run own --variant all --seeds 2"
    assert len([line for line in said if ": MoE " in line]) == 2


def test_what_is_finished_is_kept_until_something_changes(own, tmp_path, monkeypatch):
    first = run_recipe("own", out=tmp_path / "out", short=True)
    trained: list[str] = []
    train = running.train_run

    def counted(run, **more):
        trained.append(run.name)
        return train(run, **more)

    monkeypatch.setattr(running, "train_run", counted)
    again = run_recipe("own", out=tmp_path / "out", short=True)
    assert trained == []
    assert again["rows"] == first["rows"]
    run_recipe("own", out=tmp_path / "out", short=True, overrides=["train.optimizer.lr=0.01"])
    assert trained == ["own"], "the twin has a rate of its own, which did not change"
    trained.clear()
    run_recipe("own", out=tmp_path / "out", short=True, seeds=2, overrides=["train.optimizer.lr=0.01"])
    assert trained == ["own-dense", "own"]
    trained.clear()
    with open(own.run["data"]["path"], "a") as file:
        file.write("the ball,0.5,sport,0.0\n")
    run_recipe("own", out=tmp_path / "out", short=True, overrides=["train.optimizer.lr=0.01"])
    assert trained == ["own-dense", "own"], "other data"


def test_options_of_baselines(own, tmp_path, monkeypatch):
    base = recipe(own.run["data"]["path"])

    def rows(options):
        changed = Recipe(**{**vars(base), "options": options})
        monkeypatch.setattr("moekit.recipes.running.load_recipe", lambda name: changed)
        return run_recipe("own", out=tmp_path / "out", short=True)["rows"]

    first, second = rows({}), rows({"tfidf-svm": {"grid": [0.25]}})
    assert first["tfidf-svm"][0]["settings"]["label"]["C"] != 0.25
    assert second["tfidf-svm"][0]["settings"]["label"]["C"] == 0.25
    assert first["majority"] == second["majority"], "it has no options and is taken from the folder"
    with pytest.raises(ConfigError, match="option 'nonsense' is no option of baseline 'tfidf-svm'"):
        rows({"tfidf-svm": {"nonsense": 1}})


def test_the_module_of_a_recipe(own, tmp_path, monkeypatch):
    def measure(loaded, data):
        return {"examples": float(len(data.test))}

    def baseline(name, recipe, config, data):
        return {"scores": {"label.accuracy": 0.25}, "seconds": 0.0}

    code = types.SimpleNamespace(measure=measure, baseline=baseline, notes=lambda loaded, data: "Seen.")
    monkeypatch.setattr(Recipe, "code", lambda self: code)
    monkeypatch.setattr("moekit.recipes.running.load_recipe", lambda name: recipe(
        own.run["data"]["path"], baselines=("oracle",)))  # fmt: skip
    result = run_recipe("own", out=tmp_path / "out", short=True)
    assert result["rows"]["oracle"][0]["scores"] == {"label.accuracy": 0.25}
    assert result["rows"]["MoE"][0]["scores"]["examples"] == 40
    assert result["table"]["columns"][4:] == ["examples", "active", "total", "processor seconds"]
    assert result["observed"].startswith("Experts by label differ by more than chance in")
    assert result["observed"].endswith(" Seen.")
    code.run = lambda recipe, variant, seeds, out, short, overrides, say: {
        "MoE": [{"scores": {"return": 475.0}, "seconds": 1.0}] * seeds
    }
    result = run_recipe("own", seeds=3, out=tmp_path / "out2")
    assert result["table"] == {"columns": ["model", "return", "active", "total", "processor seconds"], "rows": [
        ["**MoE**", "475.00 ± 0.00", "–", "–", "–"], ["published: somebody", "0.9", "–", "–", "–"]]}  # fmt: skip


def test_all_recipes_go_on_after_one_that_fails(own, tmp_path, monkeypatch):
    def run(name, variant, **more):
        if variant == "all":
            raise ConfigError("model.d_model must be even")
        return run_recipe(name, variant=variant, **more)

    monkeypatch.setattr(running, "run_recipe", run)
    result = run_all(names=["own"], out=tmp_path / "out", short=True)
    assert result["failed"] == {"own all": "ConfigError: model.d_model must be even"}
    assert "Failed: own all: ConfigError: model.d_model must be even." in result["note"]
    assert [row[0] for row in result["table"]["rows"]] == ["own fewer"]
    assert json.loads((tmp_path / "out" / "recipes.json").read_text()) == result
    assert table_of_all(tmp_path / "out")["failed"] == {}


def test_the_line_of_a_recipe_compares_with_the_best_baseline(own, tmp_path):
    def row(accuracy):
        return {"scores": {"label.accuracy": accuracy}, "seconds": 1.0}

    rows = {
        "a": [row(0.6)],
        "b": [row(0.7)],
        "dense twin": [row(0.8), row(0.82)],
        "MoE": [row(0.9), row(0.92)],
    }
    result = {
        "recipe": "own",
        "variant": "all",
        "seeds": 2,
        "rows": rows,
        "table": recipe_table(rows, own, "all"),
    }
    (tmp_path / "own-all.json").write_text(json.dumps(result))
    (line,) = table_of_all(tmp_path)["table"]["rows"]
    assert line == [
        "own all",
        "accuracy ↑",
        "0.9100 ± 0.0141",
        "0.8100 ± 0.0141",
        "0.7 (b)",
        "0.9 (somebody)",
        "yes",
    ]


def test_a_verdict_needs_more_than_the_deviations():
    # variances 0.0002 each: together a deviation of 0.02
    assert verdict([0.90, 0.92], [0.88, 0.90]) == "equal"
    assert verdict([0.90, 0.92], [0.87, 0.89]) == "yes"
    assert verdict([0.90, 0.92], [0.87, 0.89], high=False) == "no"
