"""Heads that come again: the same request as when parsed anew, and bounded memory."""

import pytest
from http_cases import CASES
from http_driver import SMALL_LIMITS, Keep, connect, make_server

from minisgl_fast.errors import MinisglError
from minisgl_fast.server.head_cache import MAX_HEADS, HeadCache
from minisgl_fast.server.http_rules import HttpLimits, parse_head

HEAD = b"POST /v1/x?q=1 HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\nA-Header: b\r\n\r\n"


def seen(parse, head):
    try:
        request = parse(head)
    except MinisglError as error:
        return type(error), error.message
    names = {name for name in dir(request) if not name.startswith("_")} - {"request_id", "field"}
    fields = {name: request.field(name) for name in (b"host", b"content-length", b"expect", b"x")}
    assert fields == {name: request.headers.get(name) for name in fields}
    return {name: getattr(request, name) for name in names}


def heads():
    for case in CASES:
        end = case.raw.find(b"\r\n\r\n")
        if end >= 0:
            yield case.raw.lstrip(b"\r\n")[: end + 4]
    for length in (1, 2, 31, 32, 999, 123456789):
        yield HEAD % length
    yield (HEAD % 5).replace(b"Content-Length: 5", b"Content-Length: 05")
    yield (HEAD % 5).replace(b"Content-Length: 5", b"Content-Length: 5 ")
    yield (HEAD % 5).replace(b"A-Header: b", b"Content-Length: 6")
    yield (HEAD % 5).replace(b"A-Header: b", b"content-length: 5")
    yield (HEAD % 5).replace(b"A-Header: b", b"Transfer-Encoding: chunked")
    yield (HEAD % 0).replace(b"Content-Length: 0\r\n", b"Transfer-Encoding: chunked\r\n")
    yield HEAD.replace(b"Content-Length: %d\r\n", b"")


def test_a_head_means_the_same_however_often_it_comes():
    limits = SMALL_LIMITS
    cache = HeadCache(limits)
    for _ in range(3):
        for head in heads():
            expected = seen(lambda head: parse_head(head, limits), head)
            assert seen(cache.parse, head) == expected, head
    assert len(cache) > 5


def test_requests_with_one_head_are_not_one_request():
    cache = HeadCache(HttpLimits())
    first, second, third = (cache.parse(HEAD % length) for length in (7, 7, 8))
    assert first is not second and len({first.request_id, second.request_id, third.request_id}) == 3
    assert (second.content_length, third.content_length) == (7, 8)
    second.body = b"body"
    assert cache.parse(HEAD % 7).body == b""
    assert len(cache) == 1


@pytest.mark.parametrize("line", [b"X-Request-Id: one\r\n", b"Long: " + b"x" * 4096 + b"\r\n"])
def test_what_is_each_its_own_or_too_long_is_not_kept(line):
    cache = HeadCache(HttpLimits())
    for _ in range(2):
        request = cache.parse((HEAD % 5).replace(b"A-Header: b\r\n", line))
    assert len(cache) == 0
    assert request.headers[b"host"] == b"a"


def test_memory_is_bounded():
    cache = HeadCache(HttpLimits())
    for index in range(3 * MAX_HEADS):
        cache.parse((HEAD % 5).replace(b"A-Header: b", b"A-Header: %d" % index))
        assert len(cache) <= MAX_HEADS


# One connection, which compares each head with its last one before it looks it up


def requests_of(*pieces):
    """What a handler gets of these bytes on one connection: (path, host, length, body)."""
    handler = Keep()
    connection, _ = connect(make_server(handler, limits=HttpLimits()))
    for piece in pieces:
        connection.data_received(piece)
        while connection.exchange is not None:
            connection.exchange.respond(200, b"ok")
    return [
        (r.path, r.headers[b"host"], r.content_length, r.headers.get(b"content-length"), r.body)
        for r in handler.requests
    ]


def test_heads_that_differ_in_one_byte_are_not_taken_for_each_other():
    head = b"POST /v1 HTTP/1.1\r\nHost: a\r\nContent-Length: 12\r\nX: y\r\n\r\n"
    body = b"x" * 12
    expected = seen(lambda head: parse_head(head, HttpLimits()), head)
    for index in range(len(head) - 4):
        for byte in b"bZ1 ":
            other = head[:index] + bytes((byte,)) + head[index + 1 :]
            handler = Keep()
            connection, _ = connect(make_server(handler, limits=HttpLimits()))
            connection.data_received(head + body)
            connection.exchange.respond(200, b"ok")
            meant = seen(lambda head: parse_head(head, HttpLimits()), other)
            connection.data_received(other)
            if isinstance(meant, tuple):
                assert len(handler.requests) == 1, other
                continue
            connection.data_received(b"x" * meant["content_length"])
            first, second = handler.requests
            assert seen(lambda request: request, second) == {
                **meant,
                "body": b"x" * meant["content_length"],
            }, other
            assert seen(lambda request: request, first) == {**expected, "body": body}


@pytest.mark.parametrize("size", [1, 3, 50])
def test_heads_in_pieces_mean_what_whole_ones_do(size):
    lengths = (3, 3, 12, 100, 3, 0, 7, 7)
    raw = b"".join(HEAD % length + b"b" * length for length in lengths)
    whole = requests_of(raw)
    assert [(length, body) for _, _, length, _, body in whole] == [
        (length, b"b" * length) for length in lengths
    ]
    assert requests_of(*(raw[i : i + size] for i in range(0, len(raw), size))) == whole


@pytest.mark.parametrize(
    "digits", [b"05", b"+5", b" 5", b"5 ", b"", b"0x5", b"12345678901234567890"]
)
def test_a_length_is_taken_from_no_other_digits(digits):
    """Behind a head that is known, but for how its length is written."""
    head = HEAD % 5
    other = head.replace(b"Length: 5", b"Length: " + digits)
    expected = requests_of(other + b"12345")
    assert requests_of(head + b"abcde", other + b"12345")[1:] == expected


def test_a_head_that_was_let_in_is_not_judged_again_and_others_are():
    judged = []

    def admit(request):
        judged.append(request.field(b"host"))
        request.is_admin = request.field(b"host") == b"admin"
        request.extra_head = b"x-judged: yes\r\n"
        return None if request.field(b"host") != b"no" else MinisglError("no")

    handler = Keep()
    server = make_server(handler, limits=HttpLimits(), admit=admit)
    for _ in range(2):
        for host in (b"a", b"admin", b"no", b"a", b"admin", b"no"):
            connection, transport = connect(server)
            for _ in range(2):
                connection.data_received(b"GET / HTTP/1.1\r\nHost: %b\r\n\r\n" % host)
                if connection.exchange is not None:
                    assert connection.exchange.request.is_admin == (host == b"admin")
                    connection.exchange.respond(200, b"ok")
                    assert transport.written.endswith(b"x-judged: yes\r\n\r\nok")
    assert judged == [b"a", b"admin", b"no", b"no", b"no", b"no", *[b"no"] * 4]
    assert len(handler.requests) == 16
