"""Every example runs: Python and commands of the pages, configurations, doctests of the modules."""

from __future__ import annotations

import doctest
import importlib
import importlib.util
import pkgutil
import re
import shlex
from pathlib import Path

import click
import pytest

import moekit
from moekit.cli.main import VERBS, cli
from moekit.config.adversarial import AttackConfig
from moekit.config.loading import apply_overrides, load_run_config
from moekit.config.merge import MergeConfig
from moekit.config.upcycle import UpcycleConfig
from moekit.evaluate.plan import plan_run
from moekit.recipes.tasks import task_config

ROOT = Path(__file__).resolve().parents[2]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(page: Path, language: str) -> list[str]:
    return [body for found, body in BLOCK.findall(page.read_text(encoding="utf-8")) if found == language]


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")], ids=name_of)
def test_python_of_a_page_runs_from_top_to_bottom(page, capsys):
    if page.stem == "keras":
        pytest.importorskip("keras.ops", reason="Keras 3 is not installed")
    if page.stem == "control":
        pytest.importorskip("stable_baselines3", reason="the extra control is not installed")
    if page.stem == "design":
        pytest.importorskip("optuna", reason="the extra design is not installed")
    names: dict[str, object] = {"__name__": "page"}
    for number, body in enumerate(blocks(page, "python"), 1):
        exec(compile(body, f"{name_of(page)} block {number}", "exec"), names)


def commands() -> list[tuple[str, str]]:
    lines = [(page, line) for page in PAGES for body in blocks(page, "console") for line in body.splitlines()]
    return [
        (name_of(page), part.strip())
        for page, line in lines
        if line.startswith("$ ")
        for part in line[2:].split(" && ")
        if part.strip().startswith("moekit ")
    ]


@pytest.mark.parametrize(("page", "command"), commands())
def test_moekit_commands_of_the_pages_parse(page, command):
    words = shlex.split(command, comments=True)[1:]
    verb = cli.get_command(click.Context(cli), words.pop(0))
    while isinstance(verb, click.Group):
        inner = verb.commands.get(words.pop(0))
        assert inner is not None
        verb = inner
    # with the settings of the real one: click keeps the first help option that a command is asked for
    parent = click.Context(cli, **cli.context_settings)
    context = verb.make_context("moekit", list(words), parent=parent)
    for word in words:
        if word.startswith("examples/"):
            assert (ROOT / word).is_file(), f"{page}: {word} does not exist"
        elif word != context.params.get("budget") and re.match(r"[\w.]+=", word):
            _accept_override(verb.name, word, context.params)
    if "key" in context.params:
        from moekit.config.explain import explain_key

        assert context.params["key"] == "KEY" or explain_key(context.params["key"])


def _accept_override(verb, word, params):
    """Raise where KEY=VALUE is none of the keys that the verb takes."""
    if verb in ("predict", "explain"):
        return  # the user's names of columns
    recipe = params.get("config") if verb in ("train", "validate") else params.get("name")
    if verb == "run":
        recipe = f"recipe:{recipe}"
    if str(recipe).startswith("recipe:"):
        task_config(recipe, [word])
        return
    own = {"upcycle": UpcycleConfig, "merge": MergeConfig, "evaluate": AttackConfig}
    if verb not in own:
        load_run_config(None, ["model.moe={}", word])
        return
    fields: dict = {}
    apply_overrides(fields, [word])
    own[verb].from_dict(fields)


def test_the_pages_show_every_verb():
    shown = {command.split()[1] for _, command in commands()}
    assert shown >= set(VERBS)


def test_the_two_commands_of_the_readme():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert "pip install . && moekit quickstart" in text
    assert "pip install '.[test]' && pytest" in text


EXAMPLES = sorted((ROOT / "examples").glob("*.yaml"))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example_configurations_build(path):
    config = load_run_config(path)
    assert config.name == path.stem
    assert plan_run(config, measure=False)["warnings"] == []


def test_the_example_decoders_have_equal_active_parameters():
    dense, sparse = (load_run_config(ROOT / "examples" / f"{name}-small.yaml") for name in ("dense", "moe"))
    active = [plan_run(config, measure=False)["parameters"]["active"] for config in (dense, sparse)]
    assert active[1] == pytest.approx(active[0], rel=0.02)


def modules() -> list[str]:
    names = [info.name for info in pkgutil.walk_packages(moekit.__path__, "moekit.")]
    return [name for name in names if name != "moekit.__main__"]


@pytest.mark.parametrize("name", modules())
def test_doctests(name):
    if name.startswith("moekit.keras"):
        pytest.importorskip("keras.ops", reason="Keras 3 is not installed")
    if name == "moekit.recipes.control_policy":
        pytest.importorskip("stable_baselines3", reason="the extra control is not installed")
    if name == "moekit.serve.dashboard.app":
        pytest.importorskip("starlette", reason="the extra dashboard is not installed")
    module = importlib.import_module(name)
    failed, _ = doctest.testmod(module, optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS)
    assert failed == 0
