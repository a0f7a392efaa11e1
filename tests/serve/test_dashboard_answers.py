"""The dashboard over HTTP, without a network and with one."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from run_folders import line, make_run, write

pytest.importorskip("starlette", reason="pip install 'moekit[test]' brings starlette and uvicorn")
pytest.importorskip("uvicorn", reason="pip install 'moekit[test]' brings starlette and uvicorn")
from starlette.testclient import TestClient

from moekit.cli.main import main
from moekit.config.errors import ConfigError
from moekit.serve.dashboard.app import make_app
from moekit.serve.dashboard.server import listen
from moekit.serve.dashboard.watch import Watch

HOSTILE = "<script>alert(1)</script>"


@pytest.fixture
def runs(tmp_path) -> Path:
    run = make_run(tmp_path / "runs" / "a")
    write(
        run,
        line(10),
        line(20, "validation", validation_loss=2.5),
        line(20, "alarm", alarm="dead", message="Raise it"),
    )
    return tmp_path / "runs"


@pytest.fixture
def client(runs) -> TestClient:
    return TestClient(make_app(Watch([runs])), base_url="http://127.0.0.1")


def test_every_address_answers(client, runs):
    page = client.get("/")
    assert page.status_code == 200
    assert "script-src 'self'" in page.headers["content-security-policy"]
    for address in re.findall(r'(?:src|href)="([^"#:]+)"', page.text):
        found = client.get(f"/{address}")
        assert found.status_code == 200, address
        assert found.headers["x-content-type-options"] == "nosniff"
    (run,) = client.get("/api/runs").json()["runs"]
    assert run["alarms"][0]["message"] == "Raise it"
    series = client.get(f"/api/runs/{run['id']}/series?generation=0&train=1").json()
    assert series["series"]["train"]["columns"] == {}, "known already"
    assert series["series"]["validation"]["columns"]["validation_loss"] == [2.5]
    assert client.get(f"/api/differences?runs={run['id']},{run['id']}").json()["rows"] == []
    assert client.get(f"/api/runs/{run['id']}/routing").status_code == 404
    assert client.get(f"/runs/{run['id']}/explain.html").status_code == 404
    (runs / "a" / "explain.html").write_text("<script>1</script>")
    explained = client.get(f"/runs/{run['id']}/explain.html")
    assert explained.headers["content-security-policy"].startswith("sandbox ")


@pytest.mark.parametrize(
    "path", ["/api/runs/0/series", "/api/runs/../../etc/series", "/runs/x/explain.html", "/etc/passwd"]
)
def test_what_is_not_there_is_not_found(client, path):
    assert client.get(path).status_code == 404


def test_numbers_are_numbers(client):
    (run,) = client.get("/api/runs").json()["runs"]
    for text in ("-1", "x", "1e3", "9" * 40, "²"):
        assert client.get(f"/api/runs/{run['id']}/series", params={"train": text}).status_code == 400


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example:80", "", "[::2]", "10.0.0.1"])
def test_other_hosts_are_refused(client, host):
    for path in ("/", "/api/runs", "/nothing"):
        found = client.get(path, headers={"Host": host})
        assert found.status_code == 421
        assert "runs" not in found.text


def test_no_other_origin_may_read_and_nothing_can_be_changed(client):
    found = client.get("/api/runs", headers={"Origin": "http://evil.example"})
    assert not any(name.startswith("access-control") for name in found.headers)
    assert found.headers["cross-origin-resource-policy"] == "same-origin"
    for method in ("POST", "PUT", "DELETE", "OPTIONS"):
        assert client.request(method, "/api/runs").status_code == 405


def test_the_page_asks_no_other_address(client):
    own = client.get("/").text + client.get("/dashboard.js").text + client.get("/dashboard.css").text
    assert not re.search(r"(?:https?:)?//[\w.-]+\.\w", own, re.IGNORECASE)
    assert "@import" not in own


def test_names_are_data_and_never_markup(tmp_path):
    run = make_run(tmp_path / HOSTILE.replace("/", "∕"), f"name: '{HOSTILE}'\n")
    write(run, line(1, loss=None, note=HOSTILE))
    client = TestClient(make_app(Watch([tmp_path])), base_url="http://localhost:1")
    assert HOSTILE not in client.get("/").text
    assert client.get("/api/runs").headers["content-type"] == "application/json"


def test_a_taken_port_is_said(runs, capsys):
    listener = listen(0)
    port = listener.getsockname()[1]
    with pytest.raises(ConfigError, match="Choose another one with --port"):
        listen(port)
    assert main(["dashboard", str(runs), "--port", str(port)]) == 2
    listener.close()
    assert "cannot be used" in capsys.readouterr().err


def get(address: str):
    # without the proxy that a machine may have
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(address, timeout=20) as answer:
        return json.loads(answer.read())


TRAINS = """
name: live
model: {vocab_size: 300, d_model: 32, n_layers: 2, n_heads: 2, moe: {n_experts: 4, d_expert: 16, top_k: 2}}
data: {corpus: null, path: text, vocab_size: 300, seq_len: 32, validation_share: 0.2}
train: {steps: 100000, batch_size: 4, log_every: 1, validate_every: 5, checkpoint_every: 0, validation_batches: 2,
        record: {tokens: 128, every: 1}}
"""


def test_a_real_server_follows_a_real_run(tmp_path, monkeypatch):
    """The verb as a process, beside one that trains; the curve grows, and Ctrl-C ends both."""
    for domain, word in (("letters", "abcd efgh "), ("digits", "0123 4567 ")):
        (tmp_path / "text" / domain).mkdir(parents=True)
        for number in range(8):
            (tmp_path / "text" / domain / f"{number}.txt").write_text(word * 100)
    (tmp_path / "run.yaml").write_text(TRAINS)
    monkeypatch.setenv("MOEKIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("MOEKIT_CPU_KERNELS", "0")
    moekit = [sys.executable, "-m", "moekit"]
    server = subprocess.Popen(
        [*moekit, "dashboard", "--port", "0", "--json"], cwd=tmp_path,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    trainer = None
    try:
        assert server.stdout is not None
        address = server.stdout.readline().strip()
        assert re.fullmatch(r"http://127\.0\.0\.1:\d+/", address)
        assert get(f"{address}api/runs")["runs"] == [], "there is no folder of runs yet"
        trainer = subprocess.Popen([*moekit, "train", "run.yaml", "--quiet"], cwd=tmp_path)
        run = wait_for(
            lambda: next((one for one in get(f"{address}api/runs")["runs"] if one["step"] >= 5), None)
        )
        assert (run["name"], run["state"], run["steps"]) == ("live-1", "training", 100_000)
        first = get(f"{address}api/runs/{run['id']}/series")
        later = wait_for(
            lambda: next((o for o in get(f"{address}api/runs")["runs"] if o["step"] > run["step"] + 5), None)
        )
        assert later["tokens"] > run["tokens"]
        assert later["seconds_left"] > 0
        n = len(first["series"]["train"]["columns"]["step"])
        new = get(f"{address}api/runs/{run['id']}/series?generation={first['generation']}&train={n}")
        part = new["series"]["train"]
        assert part["from"] in (n, 0)
        steps = part["columns"]["step"]
        assert steps[-1] > first["series"]["train"]["columns"]["step"][-1]
        layers = get(f"{address}api/runs/{run['id']}/routing")["layers"]
        assert len(layers) == 2
        assert layers[0]["measures"]["group"][0] is not None
        trainer.send_signal(signal.SIGINT)
        assert trainer.wait(60) == 130
        server.send_signal(signal.SIGINT)
        out, err = server.communicate(timeout=20)
        assert (server.returncode, out, err) == (0, "", ""), "a clean end says nothing"
    finally:
        for process in (server, trainer):
            if process is not None and process.poll() is None:
                process.kill()
                process.wait()
    with pytest.raises(urllib.error.URLError):
        get(f"{address}api/runs")


def wait_for(found, seconds: float = 60):
    end = time.monotonic() + seconds
    while not (value := found()):
        assert time.monotonic() < end, "it never came"
        time.sleep(0.3)
    return value
