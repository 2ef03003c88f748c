"""The socket of the server."""

import asyncio
import socket

import pytest

pytest.importorskip("uvicorn")

from llama_bidir.serving.server import listen


def test_answers_are_sent_without_delay():
    """With Nagle's algorithm, the body of an answer waits for the client to acknowledge the headers."""
    found = []

    async def answer(reader, writer):
        found.append(writer.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
        writer.close()

    async def connect(listener):
        async with await asyncio.start_server(answer, sock=listener):
            reader, writer = await asyncio.open_connection(*listener.getsockname()[:2])
            assert await reader.read() == b""
            writer.close()

    with listen("127.0.0.1", 0) as (listener, _):
        asyncio.run(connect(listener))
    assert found == [1]
