"""The page of a report: it holds what it should, fetches nothing, survives hostile names, and stays small."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
import subprocess
import time
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from made_records import HOSTILE, large_record, small_record

from moekit.data.documents import Document
from moekit.data.tokenizer import train_tokenizer
from moekit.explain.page import render_explain_page
from moekit.explain.page.document import report_json
from moekit.explain.specialists import Verdict
from moekit.explain.summary import summarise

ADDRESS = re.compile(r"(?:https?:)?//[\w.-]+\.\w", re.IGNORECASE)


class Page(HTMLParser):
    """Tags, attributes, scripts and visible text of a page."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[tuple[dict[str, str | None], str]] = []
        self.styles, self.text = "", ""
        self._inside = ""
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self._inside = tag
        if tag == "script":
            self.scripts.append((dict(attrs), ""))

    def handle_endtag(self, tag):
        self._inside = ""

    def handle_data(self, data):
        if self._inside == "script":
            attributes, code = self.scripts[-1]
            self.scripts[-1] = (attributes, code + data)
        elif self._inside == "style":
            self.styles += data
        else:
            self.text += data


def hostile_report():
    """A report whose groups, labels, tokens and title are all markup."""
    tokenizer = train_tokenizer([Document(HOSTILE * 50, "english", "a")], vocab_size=300)
    record = small_record()
    ids = np.array(tokenizer.encode(HOSTILE + "中")[:8], dtype=np.int32)
    assert len(ids) >= 4
    arrays = {**record.arrays, "token/id": np.resize(ids, 8)}
    object.__setattr__(record, "arrays", arrays)
    object.__setattr__(record.layers[0], "expert_names", (HOSTILE, "专家", '"quoted"'))
    curve = ({"n": 1, "own": 0.01, "others": 0.0, "value": 0.01, "low": 0.0, "high": 0.02},)
    verdicts = [
        Verdict(
            0,
            group,
            (1, 2),
            0.6,
            0.5,
            0.1,
            0.3,
            way,
            0.02,
            0.03,
            -0.01,
            -0.02,
            0.01,
            (0.0, 0.01),
            ruling,
            curve,
        )
        for group, ruling in ((0, "not supported"), (1, "contrary"))
        for way in ("nothing", "next")
    ]
    return summarise(record, tokenizer=tokenizer, title=HOSTILE, verdicts=verdicts)


@pytest.fixture(scope="module")
def html() -> str:
    return render_explain_page(hostile_report())


@pytest.fixture(scope="module")
def page(html) -> Page:
    return Page(html)


def test_it_has_the_sections_and_their_figures(page):
    figures = {attributes["data-chart"] for tag, attributes in page.tags if "data-chart" in attributes}
    assert {"load", "groups", "claims", "ablation", "curve", "flow", "frequency"} == figures
    wanted = (
        "Routing has collapsed",
        "Collapsed",
        "model.moe.balance",
        "⚠ not supported",
        "✗ contrary",
        "0 of 2",
        "中文",
        "专家",
    )
    for words in wanted:
        assert words in page.text, words
    full = Page(render_explain_page(summarise(large_record(20_000, n_layers=2))))
    kinds = {attributes["data-chart"] for tag, attributes in full.tags if "data-chart" in attributes}
    assert kinds > {"vocabulary", "pairs", "history-load_entropy", "history-max_violation", "history-entropy"}
    assert "No alarm" in full.text


def test_markup_in_names_stays_text(page, html):
    assert len(page.scripts) == 3
    assert HOSTILE in page.text, "shown as it is"
    assert html.count("<script>alert") == 0
    (data,) = [code for attributes, code in page.scripts if attributes.get("type") == "application/json"]
    assert "<" not in data
    report = json.loads(data)
    assert report["groups"][1] == report["title"] == report["layers"][0]["labels"][0] == HOSTILE
    assert report_json({"text": "\u2028</script>\x07"}).isprintable()


def test_it_asks_the_network_for_nothing(page):
    for tag, attributes in page.tags:
        for name in ("src", "href", "action", "data", "srcset"):
            value = attributes.get(name) or ""
            assert value.startswith(("#", "data:")) or not value, f"<{tag} {name}={value}>"
    own = page.scripts[-1][1] + page.styles + page.text
    assert not ADDRESS.search(own)
    assert not re.search(r"\b(fetch|XMLHttpRequest|WebSocket|EventSource|sendBeacon|importScripts)\b", own)
    assert "@import" not in page.styles
    assert "url(" not in page.styles


def test_the_policy_allows_its_own_scripts_alone(page):
    (policy,) = [
        attributes["content"] for tag, attributes in page.tags if "http-equiv" in attributes and tag == "meta"
    ]
    assert policy.startswith("default-src 'none';")
    allowed = set(re.findall(r"'sha256-([^']+)'", policy))
    run = [code for attributes, code in page.scripts if "type" not in attributes]
    assert allowed == {base64.b64encode(hashlib.sha256(code.encode()).digest()).decode() for code in run}


def test_the_chart_library_is_the_one_that_was_published(repository):
    folder = repository / "src/moekit/explain/page/vendor"
    said = dict(re.findall(r"\| `([\w.-]+)` \| ([0-9a-f]{64}) \|", (folder / "README.md").read_text()))
    others = {path.name for path in folder.iterdir()} - {"README.md"}
    assert set(said) == others >= {"echarts.min.js", "LICENSE", "NOTICE"}
    for name, digest in said.items():
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == digest, name
    assert b'version="6.1.0"' in (folder / "echarts.min.js").read_bytes()


def test_a_million_rows_make_a_small_page_soon():
    record = large_record(1_000_000)
    before = time.process_time()
    html = render_explain_page(summarise(record))
    assert time.process_time() - before < 60
    data = re.search(r'id="report">(.*?)</script>', html, re.DOTALL)
    assert data is not None
    assert len(data[1]) < 1_200_000
    assert len(html) < 2_500_000, "of which the chart library has 1.1 million"
    assert "50,000 of 1,000,000 rows" in html


def chromium() -> str:
    names = ("chromium", "chromium-browser", "google-chrome", "chrome")
    found = next(filter(None, map(shutil.which, names)), None)
    if found is None:
        pytest.skip("no Chromium or Chrome on the PATH")
    return found


def dumped(html: str, folder: Path) -> tuple[str, list[str]]:
    """The document after the scripts have run, and what the console said."""
    (folder / "page.html").write_text(html, encoding="utf-8")
    done = subprocess.run(
        [
            chromium(), "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
            "--disable-background-networking", "--disable-component-update", "--disable-sync",
            "--enable-logging=stderr", f"--user-data-dir={folder / 'profile'}", "--window-size=1280,5000",
            "--virtual-time-budget=60000", "--dump-dom", (folder / "page.html").as_uri(),
        ],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


@pytest.mark.slow
def test_a_browser_draws_every_figure_without_complaint(html, page, tmp_path):
    dom, complaints = dumped(html, tmp_path)
    assert complaints == []  # a policy violation or a script error would be one
    figures = [attributes for tag, attributes in page.tags if "data-chart" in attributes]
    drawn = re.findall(r'<figure class="chart".*?</figure>', dom, re.DOTALL)
    assert len(drawn) == len(figures)
    assert all("<canvas" in figure and "<h3>" in figure for figure in drawn)
    assert 'aria-label="Load of the experts' in dom
    assert 'data-tip="' in dom  # the tokens of the text
    assert dom.count(">PDF</button>") == len(figures) + 1
    assert "<script>alert" not in dom


# without the policy, so that a script can be added: it presses every button and keeps the files
PRESS = """<script>
const kept = [];
const made = URL.createObjectURL.bind(URL);
URL.createObjectURL = (blob) => { kept.push(blob); return made(blob); };
HTMLAnchorElement.prototype.click = () => {};
addEventListener("load", async () => {
  for (const head of document.querySelectorAll("#load th button")) { head.click(); head.click(); }
  for (const select of document.querySelectorAll("select")) {
    select.selectedIndex = 0;
    select.dispatchEvent(new Event("change"));
  }
  for (const plot of document.querySelectorAll(".plot")) {
    while (!echarts.getInstanceByDom(plot)) await new Promise((done) => setTimeout(done, 20));
    echarts.getInstanceByDom(plot).dispatchAction({ type: "showTip", seriesIndex: 0, dataIndex: 1 });
  }
  const buttons = [...document.querySelectorAll(".save button")];
  for (const button of buttons) button.click();
  while (kept.length < buttons.length) await new Promise((done) => setTimeout(done, 20));
  const files = await Promise.all(kept.map(async (blob) => {
    const bytes = new Uint8Array(await blob.arrayBuffer());
    return [blob.type, btoa(Array.from(bytes, (byte) => String.fromCharCode(byte)).join(""))];
  }));
  const out = document.createElement("pre");
  out.id = "files";
  out.textContent = JSON.stringify(files);
  document.body.append(out);
});
</script>"""


@pytest.mark.slow
def test_every_button_gives_a_file(html, tmp_path):
    open_page = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', PRESS, html)
    dom, complaints = dumped(open_page, tmp_path)
    assert complaints == []
    found = re.search(r'<pre id="files">(.*?)</pre>', dom, re.DOTALL)
    assert found is not None, "not every button gave a file"
    files = [(kind, base64.b64decode(data)) for kind, data in json.loads(found[1])]
    assert "of the choices, 1.50 times the mean" in dom, "what the pointer shows"
    assert "<script>alert" not in dom
    by_kind = {
        kind: [data for one, data in files if one == kind]
        for kind in ("image/png", "application/pdf", "text/csv")
    }
    assert len(by_kind["image/png"]) == len(by_kind["application/pdf"]) >= 6
    assert all(data.startswith(b"\x89PNG") for data in by_kind["image/png"])
    assert min(map(len, by_kind["image/png"])) > 5000, "a blank picture is smaller"
    for data in by_kind["application/pdf"]:
        check_pdf(data)
    tables = [data.decode("utf-8-sig") for data in by_kind["text/csv"]]
    assert any(
        text.startswith("layer,router,expert,share of choices,times the mean\r\n0,softmax,")
        for text in tables
    )
    assert any(text.startswith("text,group,layer,place,id,token,") and "中文" in text for text in tables)


def check_pdf(data: bytes) -> None:
    """Every object stands where the table says, and the picture is a whole JPEG."""
    assert data.startswith(b"%PDF-1.4\n")
    assert data.endswith(b"%%EOF\n")
    table = int(re.search(rb"startxref\n(\d+)\n", data)[1])
    places = [int(place) for place in re.findall(rb"(\d{10}) 00000 n ", data[table:])]
    assert len(places) == 6
    for number, place in enumerate(places, 1):
        assert data[place:].startswith(b"%d 0 obj\n" % number)
    start = data.index(b"/DCTDecode /Length ")
    length = int(data[start + 19 :].split(b" ", 1)[0])
    picture = data[data.index(b"stream\n", start) + 7 :][:length]
    assert picture.startswith(b"\xff\xd8")
    assert picture.endswith(b"\xff\xd9")
