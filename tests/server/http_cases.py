"""Raw requests with the answers they must get."""

from __future__ import annotations

from typing import NamedTuple

from http_driver import HOST


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
