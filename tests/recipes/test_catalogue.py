"""Every recipe of the catalogue: its files fit together, whatever its data say."""

from __future__ import annotations

import inspect

import pytest

from moekit.config.errors import ConfigError
from moekit.config.task_run import TaskRunConfig
from moekit.data.task_sources.base import task_sources
from moekit.evaluate.baselines.base import baselines
from moekit.evaluate.task_metrics import find_metric
from moekit.recipes.tables import catalogue, catalogue_text
from moekit.recipes.tasks import load_recipe, recipe_names, task_config

CASES = [(name, variant) for name in recipe_names() for variant in load_recipe(name).variants]


@pytest.mark.parametrize("name", recipe_names())
def test_what_a_recipe_names_exists(name):
    recipe = load_recipe(name)
    assert recipe.title
    assert recipe.about.endswith(".")
    assert 0 < recipe.minutes <= 15
    code = recipe.code()
    for baseline in recipe.baselines:
        assert baseline in baselines() or hasattr(code, "baseline"), baseline
    for baseline, options in recipe.options.items():
        assert options.keys() <= baselines()[baseline].options.keys()
    assert set(recipe.published) <= set(recipe.variants)
    for figures in recipe.published.values():
        for figure in figures:
            assert figure.keys() <= {"figure", "what", "metric"}
    if code is not None:
        names = {"measure", "baseline", "notes", "run"} & set(vars(code))
        assert names, f"{recipe.module} defines nothing that a recipe's run calls"
        if "run" in names:
            expected = ["recipe", "variant", "seeds", "out", "short", "overrides", "say"]
            assert list(inspect.signature(code.run).parameters) == expected


@pytest.mark.parametrize(("name", "variant"), CASES)
@pytest.mark.parametrize("short", [False, True])
def test_the_configurations_of_a_recipe(name, variant, short):
    recipe = load_recipe(name)
    if hasattr(recipe.code(), "run"):
        pytest.skip("has a run of its own")
    config = recipe.config(variant, short=short)
    assert isinstance(config, TaskRunConfig)
    assert config.data.source in task_sources()
    assert config.model.moe is not None
    assert recipe.measures or hasattr(recipe.code(), "measure")
    for measure in recipe.measures:
        assert measure.target in config.targets
        assert set(measure.options) <= set(find_metric(measure.metric).options)
    options = set(task_sources()[config.data.source].options)
    assert set(config.data.options) <= options
    if short:
        whole = recipe.config(variant)
        assert (config.data, config.epochs, config.train.steps) != (
            whole.data,
            whole.epochs,
            whole.train.steps,
        )


def test_the_catalogue_says_data_licence_and_time():
    found = catalogue()
    assert [entry["recipe"] for entry in found] == recipe_names()
    assert all(entry["data"] and entry["licence"] for entry in found)
    text = catalogue_text(found)
    assert all(entry["about"] in text for entry in found)


def test_unknown_names_are_met_with_near_ones():
    with pytest.raises(ConfigError, match="news-topics"):
        load_recipe("news-topic")
    with pytest.raises(ConfigError, match=r"no variant 'r9'.*r8"):
        load_recipe("news-topics").config("r9")
    with pytest.raises(ConfigError, match="no variant"):
        task_config("recipe:news-topics:r9")
    assert task_config("recipe:news-topics:r8").data.source == "r8"
