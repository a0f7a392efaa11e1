"""A headless Chromium of this machine, spoken to over its debugging protocol."""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--hide-scrollbars", "--remote-debugging-port=0",
    "--proxy-server=direct://", "--disable-extensions", "--disable-default-apps",
)  # fmt: skip


def executable() -> str:
    """Its path; skips the test where there is none."""
    names = ("chromium", "chromium-browser", "google-chrome", "chrome")
    found = next(filter(None, map(shutil.which, names)), None)
    if found is None:
        pytest.skip(f"no browser on the PATH: looked for {', '.join(names)}")
    return found


class Browser:
    """One page of one browser.

    Attributes: complaints: console errors and warnings, exceptions, and refusals of the content policy, in order.
    requests: addresses that were asked for.
    """

    def __init__(self, width: int = 1400, height: int = 1000, dark: bool = False) -> None:
        client = pytest.importorskip(
            "websockets.sync.client", reason="pip install 'moekit[test]' brings websockets"
        )
        self._profile = Path(tempfile.mkdtemp(prefix="chromium-"))
        self._process = subprocess.Popen(
            [executable(), *FLAGS, f"--user-data-dir={self._profile}", f"--window-size={width},{height}",
             "about:blank"],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        self.complaints: list[str] = []
        self.requests: list[str] = []
        self._number, self._events = 0, []
        port_file = self._profile / "DevToolsActivePort"
        until(
            lambda: port_file.is_file() and port_file.read_text().count("\n") >= 1,
            60,
            "the browser did not start",
        )
        port, path = port_file.read_text().split("\n")[:2]
        self._open = ExitStack()
        self._socket = self._open.enter_context(
            client.connect(f"ws://127.0.0.1:{port}{path}", max_size=None, proxy=None)
        )
        self._session: str | None = None
        target = self.call("Target.getTargets")["targetInfos"]
        (page,) = [one["targetId"] for one in target if one["type"] == "page"]
        self._session = self.call("Target.attachToTarget", targetId=page, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        self.resize(width, height)
        self.theme(dark)

    def __enter__(self) -> Browser:
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()
        self._process.terminate()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
        shutil.rmtree(self._profile, ignore_errors=True)

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """A command of the protocol and its answer."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if self._session is not None:
            message["sessionId"] = self._session
        self._socket.send(json.dumps(message))
        while True:
            answer = json.loads(self._socket.recv(timeout=60))
            if answer.get("id") == self._number:
                assert "error" not in answer, f"{method}: {answer['error']}"
                return dict(answer["result"])
            self._note(answer)

    def _note(self, event: dict[str, Any]) -> None:
        said = event.get("params", {})
        match event.get("method"):
            case "Runtime.exceptionThrown":
                detail = said["exceptionDetails"]
                self.complaints.append(detail.get("exception", {}).get("description") or detail["text"])
            case "Runtime.consoleAPICalled" if said["type"] in ("error", "warning", "assert"):
                self.complaints.append(
                    " ".join(str(one.get("value", one.get("description"))) for one in said["args"])
                )
            case "Log.entryAdded" if said["entry"]["level"] in ("error", "warning"):
                self.complaints.append(said["entry"]["text"])
            case "Network.requestWillBeSent":
                self.requests.append(said["request"]["url"])

    def open(self, address: str) -> float:
        """Go to a page; returns the seconds until its load event."""
        began = time.monotonic()
        self.call("Page.navigate", url=address)
        self.wait("document.readyState === 'complete'")
        return time.monotonic() - began

    def run(self, script: str) -> Any:
        """The value of an expression on the page, which may be a promise."""
        found = self.call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in found, f"{script}: {found['exceptionDetails']}"
        return found["result"].get("value")

    def wait(self, script: str, seconds: float = 30) -> Any:
        """Until an expression is true; returns what it is then."""
        return until(lambda: self.run(script), seconds, f"never true: {script}")

    def point(self, x: float, y: float) -> None:
        """Move the pointer."""
        self.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def point_at(self, selector: str, right: float = 0.5, down: float = 0.5) -> None:
        """Scroll to an element and move the pointer over it, at a share of its width and height."""
        box = self.run(
            f"(() => {{ const one = document.querySelector({json.dumps(selector)});"
            " one.scrollIntoView({block: 'center'});"
            " const box = one.getBoundingClientRect(); return [box.x, box.y, box.width, box.height]; })()"
        )
        self.point(box[0] + right * box[2] - 2, box[1] + down * box[3])
        self.point(box[0] + right * box[2], box[1] + down * box[3])

    def press(self, key: str) -> None:
        """A key, such as Tab."""
        code = {"Tab": 9, "Enter": 13, " ": 32}[key]
        text = {"Enter": "\r", " ": " "}.get(key)
        for kind in ("keyDown", "keyUp"):
            extra = {"text": text} if text and kind == "keyDown" else {}
            self.call("Input.dispatchKeyEvent", type=kind, key=key, windowsVirtualKeyCode=code, **extra)

    def theme(self, dark: bool) -> None:
        """What the system says that the user wants."""
        wanted = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.call("Emulation.setEmulatedMedia", features=wanted)

    def resize(self, width: int, height: int) -> None:
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=False,
        )

    def picture(self, path: Path, whole: bool = False) -> None:
        """A PNG of the window, or of the whole page."""
        found = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(found["data"]))


def until(true: Any, seconds: float, otherwise: str) -> Any:
    """What `true()` answers as soon as that is true."""
    end = time.monotonic() + seconds
    while not (found := true()):
        assert time.monotonic() < end, otherwise
        time.sleep(0.05)
    return found


# what is drawn on the canvases of each figure: shares of pixels that differ from the first one; 0 is an empty picture
INK = """[...document.querySelectorAll("figure[data-chart]:not([hidden])")].map((figure) => {
  let most = 0;
  for (const canvas of figure.querySelectorAll("canvas")) {  // many cells have a canvas of their own
    const copy = document.createElement("canvas");  // the page's own one would be made slow, and say so
    [copy.width, copy.height] = [canvas.width, canvas.height];
    const pen = copy.getContext("2d", { willReadFrequently: true });
    pen.drawImage(canvas, 0, 0);
    const data = pen.getImageData(0, 0, copy.width, copy.height).data;
    let other = 0;
    for (let place = 4; place < data.length; place += 4)
      if ([0, 1, 2, 3].some((channel) => data[place + channel] !== data[channel])) other += 1;
    most = Math.max(most, other / (data.length / 4));
  }
  return [figure.dataset.chart, most];
})"""
# figures that lie outside the window, or hold text wider than themselves
WIDE = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
