"""Runs an application until a signal, and finishes the requests in progress."""

import math
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import uvicorn

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Server(uvicorn.Server):
    """
    A server that ends normally after SIGTERM and Ctrl-C. uvicorn's own raises the signal again when it is done. A
    second signal does not wait for the requests in progress.
    """

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

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self.force_exit = self.should_exit
        self.should_exit = True

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets=sockets)
        if self.started:
            self._on_start()


@contextmanager
def listen(host: str, port: int) -> Iterator[tuple[socket.socket, str]]:
    """
    Yields a bound socket and its URL.

    Args:
        host: the address to listen on.
        port: 0 takes a free one.

    Raises:
        OSError: the address cannot be used, for example because another server does.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # asyncio sets TCP_NODELAY only where the protocol is named. Without it, a client waits 40 ms for an answer's body.
    with socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, port))
        except OSError as error:
            raise OSError(error.errno, f"{error.strerror}: choose another --host or --port", f"{host}:{port}") from None
        name, number = listener.getsockname()[:2]
        yield listener, f"http://{f'[{name}]' if family == socket.AF_INET6 else name}:{number}"


def serve(app: Any, listener: socket.socket, *, seconds: float, on_start: Callable[[], None]) -> bool:
    """
    Serves an application. After SIGTERM or Ctrl-C, no connection is accepted, and the requests in progress are
    finished. A second signal does not wait for them.

    Args:
        app: an ASGI application.
        listener: a bound socket.
        seconds: how long to wait for the requests in progress.
        on_start: called once the server accepts connections.

    Returns:
        whether requests in progress were given up.
    """
    config = uvicorn.Config(
        app,
        log_level="critical",
        access_log=False,
        server_header=False,
        lifespan="off",
        timeout_graceful_shutdown=math.ceil(seconds),
    )
    server = Server(config, on_start)
    server.run(sockets=[listener])
    return server.force_exit
