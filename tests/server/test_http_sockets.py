"""The HTTP server on real sockets and uvloop."""

import asyncio
import random
import socket
from dataclasses import replace

import httpx2
import pytest
from http_cases import CASES, Case
from http_driver import GET, SMALL_LIMITS, handle, read_answers
from http_site import Site, run, until

from minisgl_fast.server.http import (
    Exchange,
    HttpLimits,
    HttpRequest,
    HttpServer,
)

QUICK = HttpLimits(sweep_interval_s=0.02)


class Keep:
    """A handler that starts a stream and leaves it to the test."""

    def __init__(self) -> None:
        self.exchanges: list[Exchange] = []
        self.gone = 0

    def __call__(self, request: HttpRequest, exchange: Exchange) -> None:
        self.exchanges.append(exchange)
        exchange.on_disconnect = self._on_disconnect
        exchange.start_stream()

    def _on_disconnect(self) -> None:
        self.gone += 1


async def _exchange_case(site: Site, case: Case, rng: random.Random) -> None:
    reader, writer = await site.connect()
    for start, end in _random_pieces(len(case.raw), rng):
        writer.write(case.raw[start:end])
        await asyncio.sleep(0)
    received = b""
    if case.closes:
        received = await reader.read()
    else:
        if case.statuses:
            expected = len(case.statuses)
            methods = list(case.methods) or ["GET"] * expected
            while len(read_answers(received, methods)) < expected or not all(
                answer.complete for answer in read_answers(received, methods)
            ):
                received += await reader.read(65536)
        writer.write_eof()  # the rest that comes must be the end
        assert await reader.read() == b""
    methods = list(case.methods) or ["GET"] * (len(case.statuses) + 1)
    answers = read_answers(received, methods)
    assert tuple(answer.status for answer in answers) == case.statuses, case.name
    writer.close()


def _random_pieces(size: int, rng: random.Random) -> list[tuple[int, int]]:
    cuts = sorted(rng.randrange(size + 1) for _ in range(rng.choice((0, 1, 3))))
    return list(zip([0, *cuts], [*cuts, size], strict=True))


def test_the_table():
    async def main() -> None:
        rng = random.Random(0)
        async with Site(HttpServer(handle, SMALL_LIMITS)) as site:
            for start in range(0, len(CASES), 20):
                await asyncio.gather(
                    *(_exchange_case(site, case, rng) for case in CASES[start : start + 20])
                )

    run(main)


def test_keep_alive_reuses_one_connection_with_a_client_library():
    async def main() -> None:
        server = HttpServer(handle)
        ports = set()

        def note(request: HttpRequest, exchange: Exchange) -> None:
            ports.add(exchange._connection._transport.get_extra_info("peername")[1])
            handle(request, exchange)

        server.handler = note
        async with Site(server) as site, httpx2.AsyncClient(trust_env=False) as client:
            base = f"http://127.0.0.1:{site.port}"
            for i in range(20):
                answer = await client.post(base + "/", content=b"%d" % i)
                assert answer.json()["body"] == str(i)
            assert (await client.head(base + "/")).content == b""
            assert (await client.get(base + "/nope")).status_code == 404
            assert (await client.put(base + "/")).headers["allow"] == "GET, HEAD, POST"
            async with client.stream("POST", base + "/stream", content=b"") as streamed:
                lines = [line async for line in streamed.aiter_lines() if line]
            assert lines[-1] == "data: [DONE]"
            assert len(lines) == 5
            chunked = await client.post(base + "/", content=_pieces())
            assert chunked.json()["body"] == "abc" * 1000
            assert len(ports) == 1

    run(main)


async def _pieces():
    for _ in range(1000):
        yield b"abc"


@pytest.mark.parametrize("how", ["close", "reset", "half-close"])
def test_a_client_that_leaves_a_stream_is_noticed_at_once(how: str):
    async def main() -> None:
        keep = Keep()
        async with Site(HttpServer(keep)) as site:
            reader, writer = await site.connect()
            writer.write(GET)
            await until(lambda: bool(keep.exchanges))
            exchange = keep.exchanges[0]
            exchange.write(b"data: 1\n\n")
            await reader.readuntil(b"data: 1\n\n")
            assert keep.gone == 0
            if how == "close":
                writer.close()
            elif how == "reset":
                writer.transport.abort()
            else:
                writer.write_eof()
            await until(lambda: keep.gone == 1, 1.0)
            assert exchange.closed
            exchange.write(b"data: 2\n\n")
            exchange.finish(b"data: [DONE]\n\n")
            await until(lambda: site.server.num_connections == 0)
            assert keep.gone == 1
            writer.close()

    run(main)


def test_a_client_that_does_not_read_pauses_its_stream_alone():
    async def main() -> None:
        keep = Keep()
        async with Site(HttpServer(keep)) as site:
            slow_reader, slow = await _small_window_client(site)
            reader, writer = await site.connect()
            slow.write(GET)
            await until(lambda: len(keep.exchanges) == 1)
            writer.write(GET)
            await until(lambda: len(keep.exchanges) == 2)
            stuck, lively = keep.exchanges
            resumed = []
            stuck.on_resume = lambda: resumed.append(True)
            sent = 0
            while not stuck.paused:
                stuck.write(b"x" * 10_000)
                sent += 10_000
                await asyncio.sleep(0)
                assert sent < 20_000_000
            assert not lively.paused
            lively.finish(b"fine")
            await reader.readuntil(b"0\r\n\r\n")
            assert resumed == []
            body = b""
            while not resumed:
                body += await slow_reader.read(65536)
            assert not stuck.paused
            stuck.finish(b"end")
            while not body.endswith(b"\r\n0\r\n\r\n"):
                body += await slow_reader.read(65536)
            (answer,) = read_answers(body, ["GET"])
            assert answer.complete
            assert answer.body == b"x" * sent + b"end"
            slow.close()
            writer.close()

    run(main)


async def _small_window_client(site: Site) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A client whose socket takes little ahead of what it reads."""
    plain = socket.socket()
    plain.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    plain.setblocking(False)
    await asyncio.get_running_loop().sock_connect(plain, ("127.0.0.1", site.port))
    return await asyncio.open_connection(sock=plain, limit=4096)


@pytest.mark.parametrize("cause", ["time", "bytes"])
def test_a_client_that_never_reads_is_cut_off(cause: str):
    limits = replace(QUICK, client_stall_timeout_s=0.05 if cause == "time" else 1000)

    async def main() -> None:
        keep = Keep()
        async with Site(HttpServer(keep, limits)) as site:
            _, writer = await _small_window_client(site)
            writer.write(GET)
            await until(lambda: len(keep.exchanges) == 1)
            exchange = keep.exchanges[0]
            for _ in range(100_000):
                if exchange.closed or (cause == "time" and exchange.paused):
                    break
                exchange.write(b"x" * 10_000)
                await asyncio.sleep(0)
            await until(lambda: keep.gone == 1)
            assert exchange.closed
            assert site.server.num_stalled == 1
            writer.close()

    run(main)


@pytest.mark.parametrize(
    ("sent", "limits"),
    [
        (b"GET / HT", replace(QUICK, header_timeout_s=0.05)),
        (b"GET / HTTP/1.1\r\nHost: a\r\n", replace(QUICK, header_timeout_s=0.05)),
        (
            b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 9\r\n\r\nabc",
            replace(QUICK, body_timeout_s=0.05),
        ),
    ],
)
def test_slow_requests_get_408(sent: bytes, limits: HttpLimits):
    async def main() -> None:
        async with Site(HttpServer(handle, limits)) as site:
            reader, writer = await site.connect()
            writer.write(sent)
            (answer,) = read_answers(await reader.read(), ["GET"])
            assert answer.status == 408
            writer.close()

    run(main)


def test_idle_connections_are_closed():
    async def main() -> None:
        async with Site(HttpServer(handle, replace(QUICK, keep_alive_timeout_s=0.05))) as site:
            reader, writer = await site.connect()
            assert await reader.read() == b""
            writer.close()
            reader, writer = await site.connect()
            writer.write(GET)
            (answer,) = read_answers(await reader.read(), ["GET"])
            assert answer.status == 200
            writer.close()

    run(main)


def test_413_reaches_a_client_that_is_still_sending():
    """Closing with unread input would reset the connection and lose the answer."""

    async def main() -> None:
        async with Site(HttpServer(handle)) as site:
            for _ in range(20):
                reader, writer = await site.connect()
                size = 8 * 1024 * 1024 + 1
                head = b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n" % size
                writer.write(head + b"x" * 1_000_000)
                await asyncio.sleep(0.002)
                writer.write(b"x" * 100_000)
                (answer,) = read_answers(await reader.read(), ["POST"])
                assert answer.status == 413
                writer.close()

    run(main)


def test_drain_ends_streams_and_closes_connections():
    async def main() -> None:
        keep = Keep()
        async with Site(HttpServer(keep)) as site:
            idle_reader, idle = await site.connect()
            reader, writer = await site.connect()
            writer.write(GET)
            await until(lambda: len(keep.exchanges) == 1)
            site.server.drain()
            assert await idle_reader.read() == b""
            keep.exchanges[0].write(b"still here")
            keep.exchanges[0].finish(b".")
            (answer,) = read_answers(await reader.read(), ["GET"])
            assert answer.body == b"still here."
            late_reader, late = await site.connect()
            late.write(GET)
            (answer,) = read_answers(await late_reader.read(), ["GET"])
            assert answer.status == 503
            assert answer.headers[b"connection"] == b"close"
            for each in (idle, writer, late):
                each.close()

    run(main)


def test_a_half_closed_client_gets_the_answers_that_are_ready():
    async def main() -> None:
        async with Site(HttpServer(handle)) as site:
            reader, writer = await site.connect()
            writer.write(GET * 3)
            writer.write_eof()
            answers = read_answers(await reader.read(), ["GET"] * 3)
            assert [answer.status for answer in answers] == [200] * 3
            writer.close()

    run(main)
