"""What tests of the HTTP server on real sockets share: a server on a free port, and its loop."""

import asyncio
from collections.abc import Awaitable, Callable

import uvloop

from minisgl_fast.server.http import HttpServer


class Site:
    """A server on a free port, inside the running loop."""

    def __init__(self, server: HttpServer) -> None:
        self.server = server

    async def __aenter__(self) -> "Site":
        loop = asyncio.get_running_loop()
        self.server.start(loop)
        self.listener = await loop.create_server(self.server.connection, "127.0.0.1", 0)
        self.port = self.listener.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *error: object) -> None:
        self.listener.close()
        self.server.close()
        await until(lambda: self.server.num_connections == 0)
        assert self.server.num_exchanges == 0
        assert self.server.num_buffered_body_bytes == 0

    async def connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return await asyncio.open_connection("127.0.0.1", self.port)


def run(main: Callable[[], Awaitable[None]]) -> None:
    uvloop.run(asyncio.wait_for(main(), 60))


async def until(condition: Callable[[], bool], timeout_s: float = 10.0) -> None:
    deadline = asyncio.get_running_loop().time() + timeout_s
    while not condition():
        assert asyncio.get_running_loop().time() < deadline, "it never came true"
        await asyncio.sleep(0.005)
