"""What a search leaves: recipes that train, a page that loads nothing, files that are whole or not there."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest

pytest.importorskip("optuna")
pytest.importorskip("matplotlib")

from tiny_design import tiny_config

from moekit.config.loading import load_any_config
from moekit.design.report import overrides_of, report_table, write_recipe, write_report
from moekit.design.search import Plan, Search, Stop, search
from moekit.design.subject import Subject, changed
from moekit.train.run import train_run

PLAN = Plan(trials=5, effort=1.0, finalists=1, repeats=1, seeds=2)


@pytest.fixture(scope="module")
def searched(tmp_path_factory):
    folder = tmp_path_factory.mktemp("search")
    subject = Subject("points </script>", tiny_config(folder))
    return folder / "s", search(subject, PLAN, folder / "s"), subject


def test_the_best_is_a_recipe_that_trains(searched, tmp_path):
    folder, report, subject = searched
    config = load_any_config(folder / "best.yaml", [f"runs_dir={tmp_path}", "train.steps=3"])
    result = train_run(config, quiet=True)
    assert result.final["step"] == 3
    best = changed(subject.config, report["best"]["changes"]).model
    assert config.model.to_dict() == best.to_dict()


def test_each_design_of_the_front_is_one_too(searched):
    folder, report, subject = searched
    others = [one for one in report["front"] if one["id"] != "default"]
    assert {path.stem for path in (folder / "front").iterdir()} == {one["id"] for one in others}
    for one in others:
        config = load_any_config(folder / "front" / f"{one['id']}.yaml")
        assert config.model.to_dict() == changed(subject.config, one["changes"]).model.to_dict()


def test_changes_as_overrides_give_the_same_configuration(searched, tmp_path):
    _, report, subject = searched
    write_recipe(tmp_path / "default.yaml", subject.config, {}, "the default")
    for one in report["designs"]:
        config = load_any_config(tmp_path / "default.yaml", overrides_of(one["changes"]))
        assert config.model.to_dict() == changed(subject.config, one["changes"]).model.to_dict()
    layer = {
        "model.moe_by_layer": {"0": {"router": "hash", "balance": {"bias_update_rate": 0.0}}},
        "name": "a b: c",
    }
    assert overrides_of(layer) == [
        'model.moe_by_layer={"0": {router: hash, balance: {bias_update_rate: 0.0}}}', 'name="a b: c"',
    ]  # fmt: skip


class Page(HTMLParser):
    """Scripts and tags."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.scripts, self.charts, self.inside, self.data = [], [], False, False
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.inside = tag == "script" and "type" not in dict(attrs)
        self.data = tag == "script" and "type" in dict(attrs)
        if self.inside:
            self.scripts.append("")
        if tag == "figure":
            self.charts.append(dict(attrs)["data-chart"])

    def handle_endtag(self, tag):
        self.inside = self.data = False

    def handle_data(self, data):
        if self.inside:
            self.scripts[-1] += data
        elif self.data:
            self.report = json.loads(data)


def test_the_page_holds_all_and_loads_nothing(searched):
    folder, report, _ = searched
    html = (folder / "report.html").read_text("utf-8")
    page = Page(html)
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', html).group(1)
    assert policy.startswith("default-src 'none'")
    for script in page.scripts:
        assert f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'" in policy
    assert len(page.scripts) == 2
    assert not re.search(r'(src|href)="(https?:)?//', html)
    assert page.report["title"] == "points </script>"
    assert page.report["front"] == json.loads(json.dumps(report["front"]))
    assert {"design_front", "design_history"} <= set(page.charts)
    known = re.findall(r"^  (design_\w+): \{", html, flags=re.M)
    assert set(page.charts) <= set(known)


def test_the_picture_is_one(searched):
    folder, _, _ = searched
    assert (folder / "front.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_the_table_says_who_won(searched):
    _, report, _ = searched
    table = report_table(report)
    assert {len(row) for row in table["table"]["rows"]} == {len(table["table"]["columns"])}
    names = [row[0] for row in table["table"]["rows"]]
    assert sum("(best)" in name for name in names) == 1
    assert any(name.startswith("default") for name in names)
    assert any(word in table["title"] for word in ("of the default", "The default", "beats the default"))


def test_a_lost_search_says_so(searched):
    _, report, _ = searched
    from moekit.design.report import in_words

    lost = json.loads(json.dumps(report))
    for name in ("validation loss", "test loss"):
        lost["finals"]["figures"][name] |= {"default": 0.1, "chosen": 0.5, "difference": 0.4, "error": 0.01}
    assert in_words(lost, {})[0].startswith("The default wins")
    lost["finals"]["figures"]["validation loss"]["difference"] = -0.4
    assert in_words(lost, {})[0].startswith("The default is not beaten: better on validation, not on test")
    for name in ("validation loss", "test loss"):
        lost["finals"]["figures"][name] |= {"difference": -0.05, "error": 0.02}
    assert in_words(lost, {})[0].startswith("The design found beats the default")
    lost["finals"]["figures"]["test loss"] |= {"difference": -0.03, "error": 0.02}
    assert in_words(lost, {})[0].startswith("The design found is ahead of the default, not beyond chance")
    assert any("within two standard errors" in note for note in in_words(lost, {})[1])


def test_a_report_in_the_midst_of_a_search(tmp_path):
    subject = Subject("points", tiny_config(tmp_path))
    Search.open(subject, replace(PLAN, trials=1), tmp_path / "s", print, Stop()).trials()
    report = write_report(tmp_path / "s")
    assert report["best"]["id"] == "default"
    assert "no finals yet" in report["verdict"]
    assert load_any_config(tmp_path / "s" / "best.yaml").model.moe.n_experts == 4


def test_an_interrupted_write_leaves_what_was_there(searched, monkeypatch):
    folder, _, _ = searched
    names = ("report.json", "best.yaml", "report.html", "front.png", "design.json")
    before = {name: (folder / name).read_bytes() for name in names}

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_report(folder)
    assert {name: (folder / name).read_bytes() for name in names} == before
    assert not list(folder.rglob(".partial-*"))
