"""What connections cost: no cycles are left of them, and idle ones are small."""

import asyncio
import gc
import socket

from http_driver import GET, HOST, handle
from http_site import Site, run, until

from minisgl_fast.server.http import Exchange, HttpConnection, HttpRequest, HttpServer
from minisgl_fast.server.http_rules import ChunkedBody, _HeadFields


def test_nothing_is_left_for_the_garbage_collector():
    """Connections and exchanges make no cycles: their memory is free when they end."""

    async def main() -> None:
        async with Site(HttpServer(handle)) as site:
            for raw in (
                GET,
                GET + b"junk\r\n\r\n",
                b"POST / HTTP/1.1\r\nHost: a\r\n"
                b"Transfer-Encoding: chunked\r\n\r\n2\r\nhi\r\n0\r\n\r\n",
            ):
                client = socket.create_connection(("127.0.0.1", site.port))
                client.sendall(raw)
                await until(lambda: site.server.num_connections == 1)
                await asyncio.sleep(0.02)
                client.close()
                await until(lambda: site.server.num_connections == 0)
            await asyncio.sleep(0.05)
            assert [one for one in found() if all(one is not other for other in before)] == []

    def found() -> list[object]:
        mine = (Exchange, HttpRequest, HttpConnection, ChunkedBody, _HeadFields)
        # Not isinstance: some lazy objects of torch warn when asked for their __class__.
        return [one for one in gc.get_objects() if issubclass(type(one), mine)]

    gc.collect()
    before = found()  # of other tests, some of which leave an answer open
    gc.disable()
    try:
        run(main)
    finally:
        gc.enable()


def test_an_idle_connection_is_small():
    """At most 8 kB each, transport included; measured as growth of this process."""
    num_connections = 400

    def resident() -> int:
        with open("/proc/self/smaps_rollup") as smaps:
            lines = dict(line.split(":", 1) for line in smaps if line.count(":") == 1)
        return int(lines["Private_Dirty"].split()[0]) * 1024

    async def main() -> None:
        async with Site(HttpServer(handle)) as site:
            clients = [await _used_connection(site) for _ in range(50)]  # arenas, caches
            gc.collect()
            before = resident()
            clients += [await _used_connection(site) for _ in range(num_connections)]
            gc.collect()
            each = (resident() - before) / num_connections
            assert site.server.num_connections == num_connections + 50
            for client in clients:
                client.close()
            assert each < 8192

    run(main)


async def _used_connection(site: Site) -> socket.socket:
    loop = asyncio.get_running_loop()
    client = socket.socket()
    client.setblocking(False)
    await loop.sock_connect(client, ("127.0.0.1", site.port))
    body = b"x" * 5000
    head = b"POST / HTTP/1.1\r\n" + HOST + b"X: y\r\n" * 10 + b"Content-Length: 5000\r\n\r\n"
    await loop.sock_sendall(client, head + body)
    received = b""
    while b'"names"' not in received:
        received += await loop.sock_recv(client, 65536)
    return client
