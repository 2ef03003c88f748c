"""Reads the bodies of requests, within limits."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from fastapi import Request
from starlette.requests import ClientDisconnect

CLIENT_LEFT = 499  # nginx's status of a client that has hung up; nobody receives it


@dataclass(frozen=True, kw_only=True)
class Limits:
    """
    What requests may ask for.

    Args:
        body_bytes: the size of the body of a request.
        all_bodies_bytes: the size of the bodies of all requests that are read, waiting or in progress.
        documents: the number of documents of a request.
        seconds: the time until its answer.
    """

    body_bytes: int = 16 * 2**20
    all_bodies_bytes: int = 2**30
    documents: int = 10_000
    seconds: float = 300.0


class RefusedError(Exception):
    """A request that gets no scores: its HTTP status, the message, and further headers of the answer."""

    def __init__(self, status: int, message: str, **headers: str):
        super().__init__(message)
        self.status, self.headers = status, headers


class Bodies:
    """
    The bodies of all requests in progress.

    Args:
        limits: of the requests.
    """

    def __init__(self, limits: Limits):
        self._limits = limits
        self._num_bytes = 0

    @asynccontextmanager
    async def read(self, request: Request) -> AsyncIterator[bytes]:
        """
        Reads the body of a request. It counts as held until the context ends.

        Raises:
            RefusedError: the body is too large, compressed or late, or other requests hold too much.
        """
        body = bytearray()
        try:
            await self._receive(body, request)
            yield bytes(body)
        finally:
            self._num_bytes -= len(body)

    async def _receive(self, body: bytearray, request: Request) -> None:
        if encoding := request.headers.get("content-encoding", ""):
            raise RefusedError(415, f"Content-Encoding {encoding} is not supported: send the JSON as it is")
        limit, all_limit = self._limits.body_bytes, self._limits.all_bodies_bytes
        too_large = RefusedError(413, f"the body has more than {limit} bytes: send fewer or shorter documents")
        length = request.headers.get("content-length", "")
        if length.isdigit() and int(length) > limit:
            raise too_large
        try:
            async with asyncio.timeout(self._limits.seconds):
                async for part in request.stream():
                    if len(body) + len(part) > limit:
                        raise too_large
                    if self._num_bytes + len(part) > all_limit:
                        message = f"the requests in progress have more than {all_limit} bytes together: ask again later"
                        raise RefusedError(429, message, **{"Retry-After": "1"})
                    body += part
                    self._num_bytes += len(part)
        except TimeoutError:
            raise RefusedError(408, f"the body did not arrive within {self._limits.seconds:g} s") from None
        except ClientDisconnect:
            raise RefusedError(CLIENT_LEFT, "the client has hung up") from None
