"""The dashboard as a process: a port on loopback, its address, and a clean end."""

from __future__ import annotations

import errno
import signal
import socket
import threading
import webbrowser
from collections.abc import Callable, Sequence
from pathlib import Path

from moekit.config.errors import ConfigError, MissingExtraError, require
from moekit.serve.dashboard.watch import Watch

PORT = 8765
LOOPBACK = "127.0.0.1"


def serve(
    folders: Sequence[Path], *, port: int | None = None, open_page: bool = False,
    announce: Callable[[str], None] = print,
) -> None:  # fmt: skip
    """Serve the dashboard of these folders until SIGINT or SIGTERM.

    Args:
        folders: of runs, or of folders of runs; they need not exist yet.
        port: to listen on, 0 for one that is free; where None, 8765 or, where that is taken, a free one.
        open_page: show the page in the browser.
        announce: called with the address as soon as it is answered.

    Errors: `MissingExtraError` without starlette and uvicorn, `ConfigError` for a port that is taken.
    """
    try:
        import uvicorn

        from moekit.serve.dashboard.app import make_app
    except ImportError as error:
        raise MissingExtraError(
            f"moekit dashboard needs a package that is not installed ({error}). "
            "Install it: pip install 'moekit[dashboard]'"
        ) from error
    listener = listen(port)
    address = f"http://{LOOPBACK}:{listener.getsockname()[1]}/"
    config = uvicorn.Config(
        make_app(Watch(folders)), log_level="warning", access_log=False, lifespan="off", ws="none",
        timeout_graceful_shutdown=2, server_header=False,
    )  # fmt: skip
    server = uvicorn.Server(config)

    def ready() -> None:
        announce(address)
        if open_page:
            threading.Thread(target=webbrowser.open, args=(address,), daemon=True).start()

    # connections wait in the listener until the server takes them, so the address is good from here on
    ready()
    before = signal.getsignal(signal.SIGINT)
    try:
        server.run(sockets=[listener])
    except KeyboardInterrupt:  # uvicorn raises the signal again once it has shut down
        pass
    finally:
        signal.signal(signal.SIGINT, before)
        listener.close()


def listen(port: int | None) -> socket.socket:
    """A socket that listens on loopback.

    Errors: `ConfigError` for a port that is taken or not allowed.
    """
    require(port is None or 0 <= port <= 65535, "port", port, "must be 0 to 65535")
    tried = [PORT, 0] if port is None else [port]
    for number in tried:
        listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((LOOPBACK, number))
            listener.listen(128)
            return listener
        except OSError as error:
            listener.close()
            if number == tried[-1] or error.errno != errno.EADDRINUSE:
                raise ConfigError(
                    f"port {number} cannot be used: {error.strerror}. Choose another one with --port; 0 takes any"
                ) from None
    raise AssertionError("the last port either listens or raises")
