"""The dashboard in a headless Chromium: figures of runs that go on, tables, hover, themes, a server that stops."""

from __future__ import annotations

import json
import sys
import threading
from pathlib import Path

import pytest

pytest.importorskip("starlette", reason="pip install 'moekit[test]' brings starlette and uvicorn")
pytest.importorskip("uvicorn", reason="pip install 'moekit[test]' brings starlette and uvicorn")
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "serve"))
import uvicorn
from chromium import INK, WIDE, Browser, until
from run_folders import CONFIG, forming_record, line, make_run, write

from moekit.serve.dashboard.app import make_app
from moekit.serve.dashboard.server import listen
from moekit.serve.dashboard.watch import Watch

pytestmark = [pytest.mark.slow, pytest.mark.browser]
OPTION = "echarts.getInstanceByDom(document.querySelector('[data-chart=loss] .plot')).getOption()"
HOSTILE = "<img src=x onerror=alert(1)>"
MESSAGE = f"layer 0: expert 3 is dead {HOSTILE}. Raise model.moe.balance.load_balance"


class Server:
    """The application on a free port, in a thread."""

    def __init__(self, folder: Path) -> None:
        self._listener = listen(0)
        self.address = f"http://127.0.0.1:{self._listener.getsockname()[1]}/"
        config = uvicorn.Config(make_app(Watch([folder])), log_level="error", lifespan="off", ws="none")
        self._server = uvicorn.Server(config)
        self._server.install_signal_handlers = lambda: None  # type: ignore[method-assign]
        self._thread = threading.Thread(
            target=self._server.run, kwargs={"sockets": [self._listener]}, daemon=True
        )
        self._thread.start()

    def stop(self) -> None:
        self._server.should_exit = True
        self._thread.join(20)
        self._listener.close()


@pytest.fixture
def runs(tmp_path) -> Path:
    """One run with a record and alarms that trains, a finished one without, and one with a hostile name."""
    folder = tmp_path / "runs"
    first = make_run(folder / "alpha-1")
    write(first, *(line(step) for step in range(1, 40)), line(40, "validation", validation_loss=4.6),
          line(40, "alarm", alarm="dead", layer=0, message=MESSAGE))  # fmt: skip
    forming_record().save(first / "routing")
    second = make_run(
        folder / "beta-1", CONFIG.replace("3e-3", "1e-3").replace("n_experts: 4", "n_experts: 8")
    )
    write(
        second,
        *(line(step, loss=6 - step / 50) for step in range(1, 101)),
        line(100, "validation", validation_loss=4.0),
    )
    (second / "final.json").write_text("{}")
    (second / "explain.html").write_text("<h1>explained</h1>")
    write(make_run(folder / HOSTILE.replace("/", "∕"), f"name: '{HOSTILE}'\n"), line(1))
    return folder


@pytest.fixture
def server(runs):
    one = Server(runs)
    yield one
    one.stop()


@pytest.fixture
def browser():
    with Browser() as one:
        yield one


def choose(browser: Browser, *names: str) -> None:
    """Tick these runs and no others."""
    browser.wait("document.querySelectorAll('#list tbody tr').length > 0")
    browser.run(
        "for (const row of document.querySelectorAll('#list tbody tr')) {"
        f" const wanted = {json.dumps(names)}.includes(row.querySelector('label span').textContent);"
        " const box = row.querySelector('input');"
        " if (box.checked !== wanted) box.click(); }"
    )
    browser.wait(f"document.querySelectorAll('#list input:checked').length === {len(names)}")


def test_figures_are_drawn_and_follow_the_run(browser, server, runs):
    browser.open(server.address)
    choose(browser, "alpha-1", "beta-1")
    browser.wait(f"Object.fromEntries({INK}).saturation > 0")
    ink = dict(browser.run(INK))
    assert set(ink) == {"validation", "bits", "loss", "other", "load_entropy", "max_violation", "dead_experts", "heat",
                        "group", "vocabulary", "saturation"}  # fmt: skip
    assert min(ink.values()) > 0.005, "a figure is empty"
    assert browser.run("document.getElementById('headline').textContent") == "2 runs train, 1 finished"
    rows = "[...document.querySelectorAll('#list tbody tr')]"
    step = f"{rows}.find((row) => row.textContent.includes('alpha-1')).cells[2].textContent"
    assert browser.run(step) == "40 of 100"
    write(runs / "alpha-1", *(line(step) for step in range(41, 60)))
    browser.wait(f"{step} === '59 of 100'", 20)
    point = f"{OPTION}.series[0].data.at(-1)"
    browser.wait(f"{point}[0] === 59")
    asked = [address for address in browser.requests if "/series" in address]
    assert asked[-1].endswith("train=39&validation=1&layers=39&loads=39"), "only what is new was asked for"
    assert browser.complaints == []
    assert all(address.startswith((server.address, "data:", "about:")) for address in browser.requests)


def test_alarms_names_and_differences_are_text(browser, server):
    browser.open(server.address)
    choose(browser, "alpha-1", "beta-1")
    browser.wait("document.querySelectorAll('#differences tbody tr').length === 2")
    rows = browser.run(
        "[...document.querySelectorAll('#differences tbody tr')].map((row) => [...row.cells].map((c) => c.textContent))"
    )
    assert rows == [["model.moe.n_experts", "4", "8"], ["train.optimizer.lr", "0.003", "0.001"]]
    assert MESSAGE in browser.run("document.querySelector('#alarms li').textContent")
    assert HOSTILE.replace("/", "∕") in browser.run("document.getElementById('list').textContent")
    assert browser.run("document.querySelectorAll('main img').length") == 0
    choose(browser, HOSTILE.replace("/", "∕"))
    browser.wait("document.querySelector('#alarms li').className === 'good'")
    browser.wait(f"Object.fromEntries({INK}).loss > 0")
    browser.point_at("[data-chart=loss] .plot")
    assert browser.run("document.querySelectorAll('main img').length") == 0
    assert browser.complaints == []


@pytest.mark.parametrize("chart", ["loss", "heat"])
def test_the_pointer_shows_figures(browser, server, chart):
    browser.open(server.address)
    choose(browser, "alpha-1")
    browser.wait(f"Object.fromEntries({INK}).{chart} > 0")
    browser.point_at(f"[data-chart={chart}] .plot")
    wanted = {"loss": "alpha-1", "heat": "times the mean of its layer"}[chart]
    browser.wait(
        f"document.querySelector('[data-chart={chart}] .plot').textContent.includes({json.dumps(wanted)})", 10
    )
    assert browser.complaints == []


def test_the_list_sorts_stays_sorted_and_answers_the_keyboard(browser, server, runs):
    browser.open(server.address)
    browser.wait("document.querySelectorAll('#list tbody tr').length === 3")
    loss = "[...document.querySelectorAll('#list tbody tr')].map((row) => Number(row.cells[5].textContent))"
    browser.run("document.querySelector('#list thead th:nth-child(6) button').focus()")
    browser.press("Enter")
    values = browser.run(loss)
    assert values == sorted(values, reverse=True)
    assert (
        browser.run("document.querySelector('#list thead th:nth-child(6)').getAttribute('aria-sort')")
        == "descending"
    )
    write(runs / "alpha-1", line(41, loss=1.0))
    browser.wait(f"{loss}.includes(1)", 20)
    assert len(browser.run(loss)) == 3
    box = browser.run("document.querySelector('#list tbody input').checked")
    browser.run("document.querySelector('#list tbody input').focus()")
    browser.press(" ")
    assert browser.run("document.querySelector('#list tbody input').checked") is not box
    assert browser.run("location.hash").startswith("#runs=")
    nameless = browser.run(
        "[...document.querySelectorAll('button, select, input, a')].filter((one) => one.offsetParent &&"
        " !(one.textContent.trim() || one.getAttribute('aria-label') || one.labels?.length)).length"
    )
    assert nameless == 0, "every control has a name"


def test_light_and_dark_and_narrow(browser, server):
    browser.open(server.address)
    choose(browser, "alpha-1", "beta-1")
    browser.wait(f"Object.fromEntries({INK}).heat > 0")
    ground = "getComputedStyle(document.body).backgroundColor"
    assert browser.run(ground) == "rgb(255, 255, 255)"
    browser.run("document.getElementById('theme').click()")
    assert browser.run(ground) == "rgb(13, 17, 23)"
    ink = f"{OPTION}.legend[0].textStyle.color"
    browser.wait(f"{ink} === '#e6edf3'")
    browser.run("document.getElementById('theme').click()")
    browser.theme(dark=True)
    browser.resize(360, 800)
    browser.wait("document.querySelector('[data-chart=loss] .plot').clientWidth < 350")
    assert browser.run(WIDE) == 0, "the page scrolls sideways"
    browser.wait(f"{INK}.every(([, share]) => share > 0.005)")
    assert browser.complaints == []


def test_the_explain_page_is_linked_and_kept_apart(browser, server):
    browser.open(server.address)
    browser.wait("document.querySelectorAll('#list a').length === 1")
    browser.open(browser.run("document.querySelector('#list a').href"))
    assert browser.run("document.querySelector('h1').textContent") == "explained"
    reached = browser.run("fetch('/api/runs').then(() => 'read', () => 'refused')")
    assert reached == "refused"


def test_a_stopped_server_is_said_and_found_again(browser, server, runs):
    browser.open(server.address)
    browser.wait("document.querySelectorAll('#list tbody tr').length === 3")
    assert browser.run("document.getElementById('lost').hidden")
    server.stop()
    until(lambda: not browser.run("document.getElementById('lost').hidden"), 30, "it was not said")
    assert browser.run("document.querySelectorAll('#list tbody tr').length") == 3, "what was known stays"


def test_nothing_there_yet(browser, tmp_path):
    one = Server(tmp_path / "later")
    try:
        browser.open(one.address)
        browser.wait("document.getElementById('headline').textContent === 'No run yet'")
        assert "moekit train" in browser.run("document.getElementById('lead').textContent")
        write(make_run(tmp_path / "later" / "new-1"), line(1))
        browser.wait("document.querySelector('#list tbody')?.textContent.includes('new-1')", 20)
        assert browser.complaints == []
    finally:
        one.stop()
