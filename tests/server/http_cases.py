"""Raw requests with the answers they must get, and a way to feed them without I/O."""

from __future__ import annotations

import asyncio
from typing import NamedTuple

import h11
import orjson

from minisgl_fast.server import http_request
from minisgl_fast.server.http import Exchange, HttpLimits, HttpRequest, HttpServer, Router

HOST = b"Host: a\r\n"

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


class Case(NamedTuple):
    """``statuses`` in order; ``closes``: we end the connection; ``seen``: from the last echo."""

    name: str
    raw: bytes
    statuses: tuple[int, ...]
    closes: bool
    seen: dict[str, object] | None = None
    methods: tuple[str, ...] = ()


def _get(extra: bytes = b"", target: bytes = b"/", line: bytes | None = None) -> bytes:
    return (line or b"GET " + target + b" HTTP/1.1") + b"\r\n" + HOST + extra + b"\r\n"


def _post(extra: bytes, body: bytes = b"", version: bytes = b"1.1") -> bytes:
    return b"POST / HTTP/" + version + b"\r\n" + HOST + extra + b"\r\n" + body


def _chunked(body: bytes) -> bytes:
    return _post(b"Transfer-Encoding: chunked\r\n", body)


def _ok(name: str, raw: bytes, closes: bool = False, **seen: object) -> Case:
    return Case(name, raw, (200,), closes, seen or None)


def _bad(name: str, raw: bytes, status: int = 400) -> Case:
    return Case(name, raw, (status,), True)


CASES = [
    # Well formed.
    _ok("plain get", _get(), method="GET", path="/", query="", body=""),
    _ok("query", _get(target=b"/?a=1&b=%20?x"), path="/", query="a=1&b=%20?x"),
    _ok("empty query", _get(target=b"/?"), path="/", query=""),
    _ok("empty lines before", b"\r\n\r\n" + _get(), path="/"),
    _ok("absolute form", _get(target=b"http://other:80/models/x?q"), path="/models/x", query="q"),
    _ok("absolute form upper", _get(target=b"HTTP://other/models/x"), path="/models/x"),
    _ok("absolute form, no path", _get(target=b"https://other"), path="/"),
    _ok("absolute form, query only", _get(target=b"http://other?x=1"), path="/", query="x=1"),
    _ok("options star", b"OPTIONS * HTTP/1.1\r\n" + HOST + b"\r\n", path="*"),
    _ok("encoded path is left alone", _get(target=b"/models/%2e%2e/x"), path="/models/%2e%2e/x"),
    _ok("dots are left alone", _get(target=b"/models/../x"), path="/models/../x"),
    _ok("host with port", b"GET / HTTP/1.1\r\nHost: a.b-c:8080\r\n\r\n"),
    _ok("ipv6 host", b"GET / HTTP/1.1\r\nHost: [::1]:80\r\n\r\n"),
    _ok("host name in capitals", b"GET / HTTP/1.1\r\nHOST: a\r\n\r\n", names=["host"]),
    _ok("no space after colon", b"GET / HTTP/1.1\r\nHost:a\r\n\r\n"),
    _ok("empty value", _get(b"X:\r\n"), names=["host", "x"]),
    _ok("high bytes in a value", _get(b"X: \xc3\xa9\r\n")),
    _ok("underscore stays", _get(b"Content_Length: 5\r\n"), names=["content_length", "host"]),
    _ok("repeated field", _get(b"X: 1\r\nx: 2\r\n"), names=["host", "x"]),
    _ok("content length", _post(b"Content-Length: 3\r\n", b"abc"), body="abc"),
    _ok("content length 0", _post(b"Content-Length: 0\r\n"), body=""),
    _ok("content length, zeros before", _post(b"Content-Length: 003\r\n", b"abc"), body="abc"),
    _ok("no body", _post(b""), body=""),
    _ok("get with body", _get(b"Content-Length: 2\r\n") + b"hi", body="hi"),
    _ok("body of line ends", _post(b"Content-Length: 8\r\n", b"\r\n" * 4), body="\r\n" * 4),
    _ok("body at the limit", _post(b"Content-Length: 32\r\n", b"x" * 32), body="x" * 32),
    _ok("chunked", _chunked(b"3\r\nabc\r\n2\r\nde\r\n0\r\n\r\n"), body="abcde"),
    _ok("chunked, empty", _chunked(b"0\r\n\r\n"), body=""),
    _ok("chunked, hex sizes", _chunked(b"00a\r\n0123456789\r\n0\r\n\r\n"), body="0123456789"),
    _ok("chunked, upper case", _chunked(b"A\r\n0123456789\r\n0\r\n\r\n"), body="0123456789"),
    _ok("chunk extension", _chunked(b"2;a=b\r\nhi\r\n0;c\r\n\r\n"), body="hi"),
    _ok("trailers", _chunked(b"2\r\nhi\r\n0\r\nX: y\r\n\r\n"), body="hi"),
    _ok("empty trailer", _chunked(b"2\r\nhi\r\n0\r\nX:\r\n\r\n"), body="hi"),
    _ok(
        "trailers are not headers",
        _chunked(b"0\r\nX: y\r\n\r\n"),
        names=["host", "transfer-encoding"],
    ),
    _ok("chunk of line ends", _chunked(b"4\r\n\r\n\r\n\r\n0\r\n\r\n"), body="\r\n\r\n"),
    _ok("chunked at the limit", _chunked(b"20\r\n" + b"x" * 32 + b"\r\n0\r\n\r\n"), body="x" * 32),
    _ok("chunked in capitals", _post(b"Transfer-Encoding: Chunked\r\n", b"0\r\n\r\n"), body=""),
    _ok("close", _get(b"Connection: close\r\n"), closes=True),
    _ok("close, more bytes", _get(b"Connection: close\r\n") + _get(), closes=True),
    _ok("http/1.0", b"GET / HTTP/1.0\r\n\r\n", closes=True, path="/"),
    _ok("http/1.0 body", b"POST / HTTP/1.0\r\nContent-Length: 2\r\n\r\nhi", closes=True, body="hi"),
    _ok("http/1.0 keep-alive", b"GET / HTTP/1.0\r\nConnection: keep-alive\r\n\r\n"),
    _ok("h2c upgrade", _get(b"Connection: Upgrade\r\nUpgrade: h2c\r\n"), method="GET"),
    _ok(
        "h2c upgrade with a body",
        _post(b"Connection: Upgrade\r\nUpgrade: h2c\r\nContent-Length: 3\r\n", b"abc"),
        body="abc",
    ),
    _ok(
        "upgrade with chunks",
        _post(
            b"Connection: Upgrade\r\nUpgrade: websocket\r\nTransfer-Encoding: chunked\r\n",
            b"2\r\nhi\r\n0\r\n\r\n",
        ),
        body="hi",
    ),
    _ok("request line at the limit", _get(target=b"/?" + b"q" * (100 - 15))),
    _ok("header block at the limit", _get(b"X: " + b"v" * (200 - 9 - 2 - 5) + b"\r\n")),
    _ok("fields at the limit", _get(b"X: 1\r\n" * 7)),
    _ok("unknown expectation", _get(b"Expect: 200-maybe\r\n")),
    # Pipelined.
    Case("two gets", _get() + _get(target=b"/?2"), (200, 200), False, {"query": "2"}),
    Case("get after body", _post(b"Content-Length: 2\r\n", b"hi") + _get(), (200, 200), False),
    Case("get after chunks", _chunked(b"2\r\nhi\r\n0\r\n\r\n") + _get(), (200, 200), False),
    Case(
        "get after upgrade",
        _post(b"Connection: Upgrade\r\nUpgrade: h2c\r\nContent-Length: 2\r\n", b"hi") + _get(),
        (200, 200),
        False,
        {"method": "GET", "body": ""},
    ),
    Case("empty line between", _get() + b"\r\n" + _get(), (200, 200), False),
    Case(
        "stream, then 404, then get",
        _get(target=b"/stream") + _get(target=b"/no") + _get(),
        (200, 404, 200),
        False,
    ),
    Case("good, then bad", _get() + b"get / HTTP/1.1\r\n\r\n", (200, 400), True),
    Case("good, bad, good", _get() + _get(b"X : 1\r\n") + _get(), (200, 400), True),
    Case(
        "head, then get",
        b"HEAD / HTTP/1.1\r\n" + HOST + b"\r\n" + _get(),
        (200, 200),
        False,
        None,
        ("HEAD", "GET"),
    ),
    Case(
        "head of a stream",
        b"HEAD /stream HTTP/1.1\r\n" + HOST + b"\r\n" + _get(),
        (200, 200),
        False,
        None,
        ("HEAD", "GET"),
    ),
    # Routing.
    Case("404", _get(target=b"/nope"), (404,), False),
    Case("404 of a bare prefix", _get(target=b"/models/"), (404,), False),
    Case("404 by case", _get(target=b"/MODELS/x"), (404,), False),
    Case("405", _get(target=b"/only-post"), (405,), False),
    Case("405 delete", _get(line=b"DELETE / HTTP/1.1"), (405,), False),
    Case("405 trace", _get(line=b"TRACE / HTTP/1.1"), (405,), False),
    _bad("connect", b"CONNECT a:80 HTTP/1.1\r\n" + HOST + b"\r\nanything", 405),
    # Request lines.
    _bad("tls hello", b"\x16\x03\x01\x02\x00\x01", 400),
    _bad("lower-case method", b"get / HTTP/1.1\r\n" + HOST + b"\r\n"),
    _bad("unknown method", b"BREW / HTTP/1.1\r\n" + HOST + b"\r\n", 501),
    _bad("space before method", b" GET / HTTP/1.1\r\n" + HOST + b"\r\n"),
    _bad("two spaces", b"GET  / HTTP/1.1\r\n" + HOST + b"\r\n"),
    _bad("two spaces before version", b"GET /  HTTP/1.1\r\n" + HOST + b"\r\n"),
    _bad("tab", b"GET\t/ HTTP/1.1\r\n" + HOST + b"\r\n"),
    _bad("space after version", b"GET / HTTP/1.1 \r\n" + HOST + b"\r\n"),
    _bad("space in target", b"GET /a b HTTP/1.1\r\n" + HOST + b"\r\n"),
    _bad("no target", b"GET HTTP/1.1\r\n" + HOST + b"\r\n"),
    _bad("http/0.9", b"GET /\r\n\r\n"),
    _bad("version 0.9", b"GET / HTTP/0.9\r\n" + HOST + b"\r\n", 505),
    _bad("version 1.2", b"GET / HTTP/1.2\r\n" + HOST + b"\r\n", 505),
    _bad("version 2.0", b"GET / HTTP/2.0\r\n" + HOST + b"\r\n", 505),
    _bad("h2 preface", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 505),
    _bad("version without minor", b"GET / HTTP/1\r\n" + HOST + b"\r\n"),
    _bad("version with two digits", b"GET / HTTP/1.10\r\n" + HOST + b"\r\n"),
    _bad("lower-case version", b"GET / http/1.1\r\n" + HOST + b"\r\n"),
    _bad("another protocol", b"GET / RTSP/1.0\r\n" + HOST + b"\r\n"),
    _bad("fragment", _get(target=b"/a#b")),
    _bad("star for get", _get(target=b"*")),
    _bad("relative target", _get(target=b"models")),
    _bad("authority target", _get(target=b"a:80")),
    _bad("other scheme", _get(target=b"ftp://a/")),
    _bad("absolute form without host", _get(target=b"http:///x")),
    _bad("non-ascii target", _get(target=b"/\xc3\xa9")),
    _bad("nul in target", _get(target=b"/\x00")),
    # Header fields.
    _bad("no host", b"GET / HTTP/1.1\r\nX: 1\r\n\r\n"),
    _bad("no fields", b"GET / HTTP/1.1\r\n\r\n"),
    _bad("two hosts", _get(b"Host: a\r\n")),
    _bad("two different hosts", _get(b"host: b\r\n")),
    _bad("two hosts in 1.0", b"GET / HTTP/1.0\r\nHost: a\r\nHost: b\r\n\r\n"),
    _bad("empty host", b"GET / HTTP/1.1\r\nHost:\r\n\r\n"),
    *(
        _bad(f"host {bad.decode()!r}", b"GET / HTTP/1.1\r\nHost: " + bad + b"\r\n\r\n")
        for bad in (
            b"a/b",
            b"a?b",
            b"a#b",
            b"u@a",
            b"a b",
            b"a, b",
            b"a:b",
            b"[::1",
            b"a\\b",
            b'"a"',
        )
    ),
    _bad("bare lf lines", b"GET / HTTP/1.1\nHost: a\n\n"),
    _bad("bare lf in a field", b"GET / HTTP/1.1\r\nHost: a\nX: 1\r\n\r\n"),
    _bad("bare lf at the end", b"GET / HTTP/1.1\r\nHost: a\r\n\n"),
    _bad("bare cr in a field", _get(b"X: a\rb\r\n")),
    _bad("nul in a value", _get(b"X: a\x00b\r\n")),
    _bad("control byte in a value", _get(b"X: a\x01b\r\n")),
    _bad("space before colon", _get(b"X : 1\r\n")),
    _bad("space in a name", _get(b"X Y: 1\r\n")),
    _bad("no colon", _get(b"X\r\n")),
    _bad("empty name", _get(b": 1\r\n")),
    _bad("non-token name", _get(b"X(): 1\r\n")),
    _bad("high byte in a name", _get(b"X\xe9: 1\r\n")),
    _bad("folded line", _get(b"X: 1\r\n 2\r\n")),
    _bad("space before the first field", b"GET / HTTP/1.1\r\n X: 1\r\n" + HOST + b"\r\n"),
    # Framing.
    *(
        _bad(f"content length {bad.decode()!r}", _post(b"Content-Length: " + bad + b"\r\n", b"abc"))
        for bad in (b"", b"-1", b"+3", b"0x3", b"3 3", b"3,3", b"3, 3", b"3.0", b"a", b"9" * 20)
    ),
    _bad("two content lengths", _post(b"Content-Length: 3\r\nContent-Length: 3\r\n", b"abc")),
    _bad(
        "length, then chunked",
        _post(b"Content-Length: 3\r\nTransfer-Encoding: chunked\r\n", b"0\r\n\r\n"),
    ),
    _bad(
        "chunked, then length",
        _post(b"Transfer-Encoding: chunked\r\nContent-Length: 3\r\n", b"0\r\n\r\n"),
    ),
    _bad("chunked in 1.0", _post(b"Transfer-Encoding: chunked\r\n", b"0\r\n\r\n", b"1.0")),
    _bad("gzip, chunked", _post(b"Transfer-Encoding: gzip, chunked\r\n", b"0\r\n\r\n"), 501),
    _bad("gzip", _post(b"Transfer-Encoding: gzip\r\n", b"0\r\n\r\n")),
    _bad("identity", _post(b"Transfer-Encoding: identity\r\n", b"abc")),
    _bad("chunked twice", _post(b"Transfer-Encoding: chunked, chunked\r\n", b"0\r\n\r\n")),
    _bad("chunked twice, two fields", _post(b"Transfer-Encoding: chunked\r\n" * 2, b"0\r\n\r\n")),
    _bad("empty coding", _post(b"Transfer-Encoding: \r\n", b"0\r\n\r\n")),
    _bad("xchunked", _post(b"Transfer-Encoding: xchunked\r\n", b"0\r\n\r\n")),
    _bad("vertical tab", _post(b"Transfer-Encoding: \x0bchunked\r\n", b"0\r\n\r\n")),
    _bad("chunk size not hex", _chunked(b"x\r\nhi\r\n0\r\n\r\n")),
    _bad("chunk size signed", _chunked(b"-1\r\nhi\r\n0\r\n\r\n")),
    _bad("chunk size with 0x", _chunked(b"0x2\r\nhi\r\n0\r\n\r\n")),
    _bad("chunk size after a space", _chunked(b" 2\r\nhi\r\n0\r\n\r\n")),
    _bad("chunk size too big", _chunked(b"fffffffffffffffff\r\nhi\r\n0\r\n\r\n")),
    _bad("chunk size, bare lf", _chunked(b"2\nhi\r\n0\r\n\r\n")),
    _bad("chunk longer than its size", _chunked(b"2\r\nhix\r\n0\r\n\r\n")),
    _bad("chunk without its end", _chunked(b"2\r\nhi0\r\n\r\n")),
    _bad("chunk extension, bare lf", _chunked(b"2;a\nhi\r\n0\r\n\r\n")),
    _bad("length in trailers", _chunked(b"2\r\nhi\r\n0\r\nContent-Length: 3\r\n\r\n")),
    _bad("bad trailer", _chunked(b"2\r\nhi\r\n0\r\nX y\r\n\r\n")),
    # Limits, one over.
    _bad("request line too long", _get(target=b"/?" + b"q" * (101 - 15)), 414),
    _bad("request line without end", b"GET /" + b"a" * 200, 414),
    _bad("header block too big", _get(b"X: " + b"v" * (201 - 9 - 2 - 5) + b"\r\n"), 431),
    _bad("header block without end", b"GET / HTTP/1.1\r\n" + b"X: " + b"v" * 300, 431),
    _bad("too many fields", _get(b"X: 1\r\n" * 8), 431),
    _bad("content length too big", _post(b"Content-Length: 33\r\n", b"x" * 33), 413),
    _bad("content length far too big", _post(b"Content-Length: 9223372036854775807\r\n"), 413),
    _bad("chunks too big", _chunked(b"20\r\n" + b"x" * 32 + b"\r\n1\r\nx\r\n0\r\n\r\n"), 413),
    _bad("one chunk too big", _chunked(b"21\r\n" + b"x" * 33 + b"\r\n0\r\n\r\n"), 413),
    _bad("chunk extensions too big", _chunked(b"1;" + b"e" * 300 + b"\r\nx\r\n0\r\n\r\n"), 431),
    _bad("trailers too big", _chunked(b"0\r\nX: " + b"t" * 300 + b"\r\n\r\n"), 431),
    # Expect.
    _ok("expect", _post(b"Expect: 100-continue\r\nContent-Length: 2\r\n", b"hi"), body="hi"),
    _ok("expect, no body", _get(b"Expect: 100-continue\r\n"), body=""),
    _bad("expect, too big", _post(b"Expect: 100-continue\r\nContent-Length: 33\r\n"), 413),
    # Not complete: no answer yet.
    Case("half a line", b"GET / HT", (), False),
    Case("half a head", b"GET / HTTP/1.1\r\nHost: a\r\n", (), False),
    Case("half a body", _post(b"Content-Length: 3\r\n", b"ab"), (), False),
    Case("half a chunk", _chunked(b"3\r\nab"), (), False),
    Case("chunks without an end", _chunked(b"3\r\nabc\r\n0\r\n"), (), False),
    Case("only empty lines", b"\r\n\r\n\r\n", (), False),
]
