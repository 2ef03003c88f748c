"""Runs an application until a signal, and finishes the requests that have begun."""

import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Server(uvicorn.Server):
    """A server that ends normally after SIGTERM and Ctrl-C. uvicorn's own raises the signal again when it is done."""

    def __init__(self, config: uvicorn.Config, on_start: Callable[[], None]):
        super().__init__(config)
        self._on_start = on_start

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        before = {number: signal.signal(number, self.handle_exit) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets=sockets)
        if self.started:
            self._on_start()


def serve(app: Any, host: str, port: int, *, on_start: Callable[[str], None]) -> None:
    """
    Serves an application. After SIGTERM or Ctrl-C, no connection is accepted, and requests that have begun are
    answered. A second Ctrl-C does not wait for them.

    Args:
        app: an ASGI application.
        host: the address to listen on.
        port: 0 takes a free one.
        on_start: called with the URL once the server accepts connections.

    Raises:
        OSError: the address cannot be used, for example because another server does.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, port))
        except OSError as error:
            raise OSError(error.errno, f"{error.strerror}: choose another --host or --port", f"{host}:{port}") from None
        name, number = listener.getsockname()[:2]
        shown = f"[{name}]" if family == socket.AF_INET6 else name
        config = uvicorn.Config(app, log_level="warning", access_log=False, server_header=False, lifespan="off")
        Server(config, lambda: on_start(f"http://{shown}:{number}")).run(sockets=[listener])
