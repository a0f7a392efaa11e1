"""The dashboard over HTTP: one page, its scripts, and JSON of what changes; nothing can be changed through it.

Only this machine is answered: a page of another site that has its name point here (DNS rebinding) sends that name as
`Host`, and is refused; what it may load is nothing, because no answer allows another origin.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from moekit.explain.page.document import LIBRARY, asset
from moekit.serve.dashboard.page.document import dashboard_html, dashboard_script, dashboard_style
from moekit.serve.dashboard.routing import RoutingFigures
from moekit.serve.dashboard.run import NAMES
from moekit.serve.dashboard.watch import Watch

LOOPBACK = ("127.0.0.1", "localhost", "::1")
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; connect-src 'self'; img-src data: blob:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
# a page of `moekit explain` brings its own policy; here it is kept apart from the dashboard whose address it shares
APART = (
    "sandbox allow-scripts allow-downloads; default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    "img-src data:; frame-ancestors 'none'"
)
HEADERS = {
    "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer", "Cache-Control": "no-cache",
    "Cross-Origin-Resource-Policy": "same-origin", "Cross-Origin-Opener-Policy": "same-origin",
}  # fmt: skip
MOST_COMPARED = 20


def make_app(watch: Watch) -> Starlette:
    """The application, for any ASGI server that listens on loopback alone."""
    figures = RoutingFigures()

    async def page(request: Request) -> Response:
        return Response(dashboard_html(), media_type="text/html", headers={"Content-Security-Policy": POLICY})

    async def runs(request: Request) -> Response:
        return JSONResponse(await run_in_threadpool(watch.runs))

    async def series(request: Request) -> Response:
        have = {name: _whole(request, name) or 0 for name in NAMES}
        generation = _whole(request, "generation")
        found = await run_in_threadpool(watch.since, request.path_params["identity"], have, generation)
        return JSONResponse(_there(found))

    async def routing(request: Request) -> Response:
        folder = _there(watch.folder(request.path_params["identity"]))
        return JSONResponse(_there(await run_in_threadpool(figures.of, folder / "routing")))

    async def differences(request: Request) -> Response:
        asked = [one for one in request.query_params.get("runs", "").split(",") if one][:MOST_COMPARED]
        return JSONResponse({"runs": asked, "rows": await run_in_threadpool(watch.differences, asked)})

    async def explained(request: Request) -> Response:
        folder: Path = _there(watch.folder(request.path_params["identity"]))
        try:
            html = await run_in_threadpool((folder / "explain.html").read_bytes)
        except OSError:
            raise HTTPException(404, "this run has no explain.html: write it with moekit explain") from None
        return Response(html, media_type="text/html", headers={"Content-Security-Policy": APART})

    return Starlette(
        routes=[
            Route("/", page),
            Route("/dashboard.js", _fixed(dashboard_script, "text/javascript")),
            Route("/dashboard.css", _fixed(dashboard_style, "text/css")),
            Route("/echarts.js", _fixed(lambda: asset(LIBRARY), "text/javascript")),
            Route("/api/runs", runs),
            Route("/api/runs/{identity}/series", series),
            Route("/api/runs/{identity}/routing", routing),
            Route("/api/differences", differences),
            Route("/runs/{identity}/explain.html", explained),
        ],
        middleware=_middleware(),
        exception_handlers={HTTPException: _plainly},
    )


def _fixed(text: Callable[[], str], kind: str) -> Callable[[Request], Awaitable[Response]]:
    async def answer(request: Request) -> Response:
        return Response(text(), media_type=kind)

    return answer


def _there(found: Any) -> Any:
    if found is None:
        raise HTTPException(404, "there is no such run, or not any more")
    return found


def _whole(request: Request, name: str) -> int | None:
    text = request.query_params.get(name, "")
    if not text:
        return None
    if not text.isascii() or not text.isdigit() or len(text) > 12:
        raise HTTPException(400, f"{name} must be a whole number, 0 or more")
    return int(text)


async def _plainly(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return PlainTextResponse(f"{error.detail}\n", error.status_code)


def _middleware() -> Sequence[Any]:
    from starlette.middleware import Middleware

    return [Middleware(Loopback)]


class Loopback:
    """Answers requests that were meant for this machine, and adds what every answer says of itself."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        host = next((value.decode("latin-1") for name, value in scope["headers"] if name == b"host"), "")
        if host_name(host) not in LOOPBACK:
            await PlainTextResponse(
                "moekit dashboard answers this machine alone: open http://127.0.0.1\n", 421, headers=HEADERS
            )(scope, receive, send)
            return

        async def said(message: Any) -> None:
            if message["type"] == "http.response.start":
                present = {name.lower() for name, _ in message["headers"]}
                message["headers"] = [
                    *message["headers"],
                    *((name.lower().encode(), value.encode()) for name, value in HEADERS.items()
                      if name.lower().encode() not in present),
                ]  # fmt: skip
            await send(message)

        await self.app(scope, receive, said)


def host_name(host: str) -> str:
    """The name in a Host header, without its port.

    >>> host_name("127.0.0.1:8765"), host_name("[::1]:80"), host_name("LOCALHOST"), host_name("evil.example:80")
    ('127.0.0.1', '::1', 'localhost', 'evil.example')
    """
    host = host.strip().lower()
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.partition(":")[0]
