"""Heads that come again: the same request as when parsed anew, and bounded memory."""

import pytest
from http_cases import CASES, SMALL_LIMITS

from minisgl_fast.errors import MinisglError
from minisgl_fast.server.head_cache import MAX_HEADS, HeadCache
from minisgl_fast.server.http_rules import HttpLimits, parse_head

HEAD = b"POST /v1/x?q=1 HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\nA-Header: b\r\n\r\n"


def seen(parse, head):
    try:
        request = parse(head)
    except MinisglError as error:
        return type(error), error.message
    names = {name for name in dir(request) if not name.startswith("_")} - {"request_id"}
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
