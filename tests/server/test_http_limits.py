"""The default limits, at the limit and one over."""

import pytest
from http_driver import HOST, connect, get, handle, make_server, only_answer, post

from minisgl_fast.server.http import HttpLimits


def _status(*pieces: bytes) -> int:
    connection, transport = connect(make_server(handle, HttpLimits()))
    for piece in pieces:
        connection.data_received(piece)
    return only_answer(transport).status


@pytest.mark.parametrize(("over", "status"), [(0, 200), (1, 414)])
def test_request_line_limit(over: int, status: int):
    target = "/?" + "q" * (8192 - len("GET /? HTTP/1.1") + over)
    request = get(target)
    assert len(request.partition(b"\r\n")[0]) == 8192 + over
    assert _status(request) == status
    assert _status(request[:8000], request[8000:]) == status


@pytest.mark.parametrize(("over", "status"), [(0, 200), (1, 431)])
def test_header_block_limit(over: int, status: int):
    value = b"v" * (32768 - len(HOST) - len(b"X: \r\n\r\n") + over)
    request = get("/", b"X: " + value)
    assert len(request.partition(b"\r\n")[2]) == 32768 + over
    assert _status(request) == status
    assert _status(request[:30_000], request[30_000:]) == status


@pytest.mark.parametrize(("num_fields", "status"), [(100, 200), (101, 431)])
def test_field_count_limit(num_fields: int, status: int):
    assert _status(get("/", *[b"X: 1"] * (num_fields - 1))) == status


@pytest.mark.parametrize(("over", "status"), [(0, 200), (1, 413)])
def test_body_limit(over: int, status: int):
    size = 8 * 1024 * 1024 + over
    half = b"x" * (size // 2)
    rest = b"x" * (size - len(half))
    if over:
        assert _status(post(size)) == status  # by its head alone
    else:
        assert _status(post(size), half, rest) == status
    chunked = b"POST / HTTP/1.1\r\n" + HOST + b"Transfer-Encoding: chunked\r\n\r\n"
    assert _status(chunked, b"%x\r\n" % size, half, rest, b"\r\n0\r\n\r\n") == status
