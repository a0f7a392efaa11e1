"""The pages are true: links, generated references, exit codes, words of the glossary."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

from moekit.cli import main as command_line
from moekit.config import errors
from moekit.config.errors import MoekitError
from moekit.layers.routing import ROUTERS

ROOT = Path(__file__).resolve().parents[2]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)

# the words of the project's design, spelled as in the code
WORDS = (
    "n_tokens", "d_model", "d_expert", "n_experts", "top_k", "router_logits", "router_probs",
    "expert_indices", "expert_weights", "RoutingPlan", "dispatch", "combine", "capacity", "load_balance_loss",
    "router_z_loss", "importance_loss", "max_violation", "dropped_share", "ep_size", "n_local_experts",
    "active parameters", "total parameters", "router", "expert", "stem", "head", "backbone", "routing record",
    "dense twin", "dropless",
)  # fmt: skip


def script(name: str) -> ModuleType:
    specification = importlib.util.spec_from_file_location(name, ROOT / "docs" / f"{name}.py")
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def anchors(page: Path) -> set[str]:
    """What a link to a heading of the page may end in."""
    headings = HEADING.findall(page.read_text(encoding="utf-8"))
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    for target in LINK.findall(text):
        if re.match(r"[a-z]+://", target):
            continue
        file, _, anchor = target.partition("#")
        path = (page.parent / file).resolve() if file else page
        assert path.exists(), f"{page.name} links to {target}"
        assert not anchor or anchor in anchors(path), f"{page.name} links to {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_no_placeholders(page):
    text = page.read_text(encoding="utf-8")
    assert not re.search(r"\b(TODO|TBD|FIXME|XXX|lorem ipsum|coming soon)\b", text, re.IGNORECASE)


def glossary() -> list[str]:
    """The words that the glossary explains, in its order."""
    text = (ROOT / "docs" / "glossary.md").read_text(encoding="utf-8")
    return re.findall(r"^- \*\*(.+?)\*\*: ", text, re.MULTILINE)


def plain(word: str) -> str:
    return word.replace("`", "")


def test_the_glossary_has_the_words_of_the_design():
    explained = {part.lower() for word in glossary() for part in plain(word).split(", ")}
    assert [word for word in WORDS if word.lower() not in explained] == []


def test_the_glossary_is_in_order_and_says_each_word_once():
    words = [re.sub(r"[-_]", " ", plain(word).lower()) for word in glossary()]
    assert words == sorted(words)
    assert len(set(words)) == len(words)


def test_the_glossary_is_short():
    text = (ROOT / "docs" / "glossary.md").read_text(encoding="utf-8")
    for entry in re.split(r"^- ", text, flags=re.MULTILINE)[1:]:
        assert len(entry.split()) <= 60, entry


def test_every_exit_code_is_documented():
    text = (ROOT / "docs" / "reference" / "cli.md").read_text(encoding="utf-8")
    documented = {int(code) for code in re.findall(r"^\| (\d+) \|", text, re.MULTILINE)}
    classes = [cls for cls in vars(errors).values() if isinstance(cls, type) and issubclass(cls, MoekitError)]
    constants = {value for name, value in vars(command_line).items() if name.startswith("EXIT_")}
    assert documented == {cls.exit_code for cls in classes} | constants


def test_reference_pages_are_up_to_date(capsys):
    assert script("generate_reference").main(["--check"]) == 0, capsys.readouterr().out


def test_the_reference_shows_every_router():
    text = (ROOT / "docs" / "reference" / "configuration.md").read_text(encoding="utf-8")
    for name, cls in ROUTERS.items():
        assert f"| `{name}` |" in text, f"{name} of {cls.__module__}"


def test_the_readme_names_every_folder():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for folder in (ROOT / "src" / "moekit").iterdir():
        if (folder / "__init__.py").exists():
            assert f"  {folder.name}/" in text, f"README.md's tree lacks {folder.name}/"
