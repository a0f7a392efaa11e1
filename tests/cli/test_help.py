"""Help: there for every verb, true to the verb, and fast because nothing heavy is imported for it."""

from __future__ import annotations

import importlib
import subprocess
import sys

import click
import pytest

from moekit import __version__
from moekit.cli.main import VERBS

HELP_SECONDS = 0.3
HEAVY = ("torch", "numpy", "pydantic", "rich", "yaml", "tokenizers", "asyncio", "multiprocessing")


def commands() -> list[tuple[str, ...]]:
    """Every verb, and every verb below a verb."""
    found: list[tuple[str, ...]] = []
    for verb in VERBS:
        command = importlib.import_module(f"moekit.cli.{verb}").command
        found.append((verb,))
        if isinstance(command, click.Group):
            found += [(verb, name) for name in command.commands]
    return found


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_every_verb_has_help(moekit_command, words):
    result = moekit_command(*words, "--help")
    assert result.code == 0
    assert result.out.startswith(f"Usage: moekit {' '.join(words)}")
    assert moekit_command(*words, "-h") == result


@pytest.mark.parametrize("verb", VERBS)
def test_the_table_of_verbs_says_what_the_verb_says(verb):
    command = importlib.import_module(f"moekit.cli.{verb}").command
    assert command.name == verb
    assert (command.help or "").split("\n\n")[0].replace("\n", " ") == VERBS[verb][1]


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_every_option_and_every_verb_is_explained(words):
    command = importlib.import_module(f"moekit.cli.{words[0]}").command
    for word in words[1:]:
        command = command.commands[word]
    assert command.help
    for parameter in command.params:
        assert isinstance(parameter, click.Argument) or parameter.help, f"{' '.join(words)} {parameter.name}"


def test_a_thin_file_per_verb(repository):
    folder = repository / "src" / "moekit" / "cli"
    for verb in VERBS:
        lines = (folder / f"{verb}.py").read_text().splitlines()
        assert len(lines) < 100, f"{verb}.py has {len(lines)} lines; what it does belongs into a folder below"


def test_top_help_lists_every_verb(moekit_command):
    out = moekit_command("--help").out
    for verb, (section, _) in VERBS.items():
        assert f"  {verb}" in out
        assert f"{section}:" in out


def test_version(moekit_command):
    assert moekit_command("--version").out == f"moekit {__version__}\n"


def run_python(code: str) -> str:
    command = [sys.executable, "-c", code]
    return subprocess.run(
        command, check=True, capture_output=True, text=True, stdin=subprocess.DEVNULL
    ).stdout


def test_top_help_within_its_time():
    """Processor time of the whole process, which other programs do not change; the best of three."""
    code = "from moekit.cli.main import main; main(['--help']); import time; print(time.process_time())"
    assert min(float(run_python(code).splitlines()[-1]) for _ in range(3)) <= HELP_SECONDS


@pytest.mark.parametrize("words", [(), *commands()], ids=lambda words: " ".join(words) or "moekit")
def test_help_imports_nothing_heavy(words):
    arguments = [*words, "--help"]
    code = f"""
import sys
from moekit.cli.main import main
assert main({arguments}) == 0
print("heavy:", [name for name in {HEAVY} if name in sys.modules])
"""
    assert run_python(code).splitlines()[-1] == "heavy: []"


def test_a_mistyped_verb_imports_nothing_heavy():
    code = "import sys; from moekit.cli.main import main; main(['tran']); print(*sys.modules)"
    assert not {*HEAVY}.intersection(run_python(code).split())
