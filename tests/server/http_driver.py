"""What tests of one connection share: a server without I/O, requests to send it, its answers."""

from __future__ import annotations

import asyncio
from typing import NamedTuple

import h11
import orjson

from minisgl_fast.server import http_request
from minisgl_fast.server.http import Exchange, HttpLimits, HttpRequest, HttpServer, Router

HOST = b"Host: a\r\n"
GET = b"GET / HTTP/1.1\r\n" + HOST + b"\r\n"

# Small, so that every case can be cut at every byte.
SMALL_LIMITS = HttpLimits(
    max_request_line=100, max_header_block=200, max_header_fields=8, max_body=32, max_pipelined=4096
)


class FakeTransport(asyncio.Transport):
    """Keeps what is written. ``unsent`` is what get_write_buffer_size answers."""

    def __init__(self) -> None:
        super().__init__()
        self.written = bytearray()
        self.writes = 0
        self.closed = self.ended = self.aborted = self.reading_paused = False
        self.unsent = 0

    def write(self, data: bytes) -> None:
        assert not self.closed, "written after close"
        assert not self.ended, "written after write_eof"
        assert data, "an empty write"
        self.written += data
        self.writes += 1

    def get_extra_info(self, name: str, default: object = None) -> object:
        return default

    def close(self) -> None:
        self.closed = True

    def abort(self) -> None:
        self.closed = self.aborted = True

    def can_write_eof(self) -> bool:
        return True

    def write_eof(self) -> None:
        self.ended = True

    def is_closing(self) -> bool:
        return self.closed

    def pause_reading(self) -> None:
        assert not self.reading_paused
        self.reading_paused = True

    def resume_reading(self) -> None:
        assert self.reading_paused
        self.reading_paused = False

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        self.high = high

    def get_write_buffer_size(self) -> int:
        return self.unsent


class FakeLoop:
    """A clock that stands still until a test moves it, and every request a turn of its own."""

    def __init__(self) -> None:
        self.clock = 1000.0
        self.callback = None

    def time(self) -> float:
        return self.clock

    def call_later(self, delay: float, callback):
        self.callback = callback
        return self

    def call_soon(self, callback) -> None:
        callback()

    def cancel(self) -> None:
        self.callback = None

    def advance(self, seconds: float) -> None:
        self.clock += seconds
        self.callback()


def echo(request: HttpRequest, exchange: Exchange) -> None:
    """Answers with what the parser made of the request."""
    seen = {
        "method": request.method,
        "path": request.path,
        "query": request.query,
        "body": request.body.decode("latin-1"),
        "names": sorted(name.decode() for name in request.headers),
    }
    exchange.respond(200, orjson.dumps(seen))


def stream(request: HttpRequest, exchange: Exchange) -> None:
    """Answers with three events and an end, all written at once."""
    exchange.start_stream()
    for i in range(3):
        exchange.write(b"data: %d\n\n" % i)
    exchange.finish(b"data: end\n\ndata: [DONE]\n\n")


ROUTER = Router(
    {
        ("GET", "/"): echo,
        ("POST", "/"): echo,
        ("GET", "/models/*"): echo,
        ("OPTIONS", "*"): echo,
        ("POST", "/stream"): stream,
        ("GET", "/stream"): stream,
        ("POST", "/only-post"): echo,
    }
)


def handle(request: HttpRequest, exchange: Exchange) -> None:
    ROUTER.find(request)(request, exchange)


def make_server(handler=handle, limits: HttpLimits = SMALL_LIMITS, admit=None) -> HttpServer:
    """A server on a fake clock."""
    server = HttpServer(handler, limits, admit)
    server.start(FakeLoop())
    server.date_line = b"date: Sun, 06 Nov 1994 08:49:37 GMT\r\n"
    return server


def connect(server: HttpServer):
    """A connection on a fake transport: (connection, transport)."""
    connection = server.connection()
    transport = FakeTransport()
    connection.connection_made(transport)
    return connection, transport


def feed(pieces: list[bytes], server: HttpServer | None = None) -> FakeTransport:
    """Run one connection over the pieces; the transport tells what happened."""
    connection, transport = connect(server or make_server())
    for piece in pieces:
        if piece and not transport.closed:
            connection.data_received(piece)
    return transport


def fix_request_ids(monkeypatch) -> None:
    """Give every request the same id, so that whole answers can be compared."""
    monkeypatch.setattr(http_request, "fresh_request_id", lambda: "req-0")


class Answer(NamedTuple):
    status: int
    headers: dict[bytes, bytes]
    body: bytes
    complete: bool


def read_answers(raw: bytes, methods: list[str]) -> list[Answer]:
    """Parse answers with h11, an independent strict client; ``methods``: of the requests."""
    answers = []
    client = h11.Connection(h11.CLIENT)
    if not raw:
        return answers  # to h11 no bytes mean the end of the connection
    client.receive_data(raw)
    for method in methods:
        request = h11.Request(method=method, target="/", headers=[("Host", "a")])
        client.send(request)
        client.send(h11.EndOfMessage())
        head, body, complete = None, bytearray(), False
        while True:
            event = client.next_event()
            if isinstance(event, h11.Response):
                head = event
            elif isinstance(event, h11.Data):
                body += event.data
            elif isinstance(event, h11.EndOfMessage):
                complete = True
                break
            elif event in (h11.NEED_DATA, h11.PAUSED) or isinstance(event, h11.ConnectionClosed):
                break
        if head is None:
            break
        answers.append(Answer(head.status_code, dict(head.headers), bytes(body), complete))
        if not complete or client.our_state is not h11.DONE:
            break
        if client.their_state is not h11.DONE:
            break
        client.start_next_cycle()
    return answers


class Keep:
    """A handler that answers nothing and keeps what it got."""

    def __init__(self) -> None:
        self.requests: list[HttpRequest] = []
        self.exchanges: list[Exchange] = []
        self.gone: list[str] = []
        self.resumed = 0

    def __call__(self, request: HttpRequest, exchange: Exchange) -> None:
        self.requests.append(request)
        self.exchanges.append(exchange)
        exchange.on_disconnect = lambda: self.gone.append(request.path)
        exchange.on_resume = self._on_resume

    def _on_resume(self) -> None:
        self.resumed += 1


def get(path: str, *fields: bytes) -> bytes:
    lines = b"".join(field + b"\r\n" for field in fields)
    return b"GET %b HTTP/1.1\r\n" % path.encode() + HOST + lines + b"\r\n"


def post(size: int, body: bytes = b"", *fields: bytes) -> bytes:
    lines = b"".join(field + b"\r\n" for field in (*fields, b"Content-Length: %d" % size))
    return b"POST / HTTP/1.1\r\n" + HOST + lines + b"\r\n" + body


def only_answer(transport, method="GET"):
    (answer,) = read_answers(bytes(transport.written), [method])
    return answer
