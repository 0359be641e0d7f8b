"""Answers of a connection: their bytes, and what becomes of a handler that fails, without I/O."""

import logging

import orjson
import pytest
from http_driver import GET, HOST, Keep, connect, get, make_server, only_answer, post, read_answers

from minisgl_fast.errors import ContextLengthError
from minisgl_fast.server.http import Exchange, HttpRequest

# Answers.


def test_the_end_of_a_stream_is_one_write():
    keep = Keep()
    connection, transport = connect(make_server(keep))
    connection.data_received(GET)
    exchange = keep.exchanges[0]
    exchange.start_stream()
    exchange.write(b"data: 1\n\n")
    writes = transport.writes
    exchange.finish(b"data: 2\n\ndata: [DONE]\n\n")
    assert transport.writes == writes + 1
    end = b"17\r\ndata: 2\n\ndata: [DONE]\n\n\r\n0\r\n\r\n"
    assert transport.written.endswith(b"9\r\ndata: 1\n\n\r\n" + end)
    answer = only_answer(transport)
    assert answer.complete
    assert answer.body == b"data: 1\n\ndata: 2\n\ndata: [DONE]\n\n"
    assert answer.headers[b"content-type"] == b"text/event-stream; charset=utf-8"
    assert exchange.done


@pytest.mark.parametrize("size", [1, 15, 16, 4095, 4096, 70_000])
def test_chunk_sizes(size: int):
    keep = Keep()
    connection, transport = connect(make_server(keep))
    connection.data_received(GET)
    keep.exchanges[0].start_stream(b"text/plain")
    keep.exchanges[0].write(b"x" * size)
    keep.exchanges[0].write(b"")  # would end the body: it must not be framed
    keep.exchanges[0].finish()
    answer = only_answer(transport)
    assert answer.body == b"x" * size
    assert answer.complete
    body = bytes(transport.written).partition(b"\r\n\r\n")[2]
    assert body.count(b"0\r\n\r\n") == 1


def test_an_http_1_0_stream_ends_with_the_connection():
    keep = Keep()
    connection, transport = connect(make_server(keep))
    connection.data_received(b"GET / HTTP/1.0\r\nConnection: keep-alive\r\n\r\n")
    exchange = keep.exchanges[0]
    exchange.start_stream()
    exchange.write(b"data: 1\n\n")
    assert not transport.closed
    exchange.finish(b"data: 2\n\n")
    assert transport.closed
    head, _, body = bytes(transport.written).partition(b"\r\n\r\n")
    assert body == b"data: 1\n\ndata: 2\n\n"
    assert b"connection: close" in head
    assert b"transfer-encoding" not in head


def test_head_has_the_length_of_the_body_it_leaves_out():
    connection, transport = connect(make_server())
    connection.data_received(b"HEAD / HTTP/1.1\r\n" + HOST + b"\r\n")
    head = bytes(transport.written)
    assert head.endswith(b"\r\n\r\n")
    length = len(
        orjson.dumps({"method": "HEAD", "path": "/", "query": "", "body": "", "names": ["host"]})
    )
    assert b"content-length: %d\r\n" % length in head


def test_204_has_neither_body_nor_length():
    connection, transport = connect(
        make_server(lambda request, exchange: exchange.respond(204, b""))
    )
    connection.data_received(GET)
    assert b"content-length" not in transport.written
    assert only_answer(transport).status == 204


def test_extra_headers_are_sent_and_cannot_be_split():
    def handler(request: HttpRequest, exchange: Exchange) -> None:
        value = bytes.fromhex(request.query)
        exchange.respond(200, b"", headers=((b"x-extra", value),))

    connection, transport = connect(make_server(handler))
    connection.data_received(get("/?6162"))
    assert only_answer(transport).headers[b"x-extra"] == b"ab"
    del transport.written[:]
    connection.data_received(get("/?" + b"a\r\nb: c".hex()))
    assert b"b: c" not in transport.written
    assert only_answer(transport).status == 500


@pytest.mark.parametrize(
    ("sent", "echoed"),
    [
        (b"abc-1.2_3:X", True),
        (b"x" * 128, True),
        (b"x" * 129, False),
        (b"", False),
        (b"a b", False),
        (b"a,b", False),
        (b'a"b', False),
        (b"\xc3\xa9", False),
        (b"a\r\nX-Request-Id: b", False),
    ],
)
def test_request_id_is_echoed_when_sane(sent: bytes, echoed: bool):
    connection, transport = connect(make_server())
    connection.data_received(get("/", b"X-Request-ID: " + sent))
    connection.data_received(get("/nope", b"X-Request-ID: " + sent))
    answers = read_answers(bytes(transport.written), ["GET"] * 2)
    assert [answer.status for answer in answers] == [200, 404]
    for answer in answers:
        assert (answer.headers[b"x-request-id"] == sent) == echoed
        assert answer.headers[b"x-request-id"]
    body = orjson.loads(answers[1].body)
    assert body["request_id"].encode() == answers[1].headers[b"x-request-id"]


def test_request_id_is_echoed_with_413():
    connection, transport = connect(make_server())
    connection.data_received(post(33, b"", b"X-Request-Id: mine"))
    assert only_answer(transport).headers[b"x-request-id"] == b"mine"


def test_fresh_request_ids_differ():
    keep = Keep()
    connection, _ = connect(make_server(keep))
    for i in range(100):
        connection.data_received(GET)
        keep.exchanges[i].respond(200, b"")
    assert len({request.request_id for request in keep.requests}) == 100


# Handlers that fail.


def test_an_exception_becomes_a_plain_500(caplog):
    def handler(request: HttpRequest, exchange: Exchange) -> None:
        raise ValueError("secret at 0x7f00")

    connection, transport = connect(make_server(handler))
    with caplog.at_level(logging.ERROR):
        connection.data_received(GET)
    answer = only_answer(transport)
    assert answer.status == 500
    assert b"secret" not in transport.written
    assert orjson.loads(answer.body)["error"]["code"] == "internal_error"
    assert "secret" in caplog.text
    assert not transport.closed


def test_an_error_of_ours_keeps_its_status_and_field():
    def handler(request: HttpRequest, exchange: Exchange) -> None:
        raise ContextLengthError("Too long.", param="messages")

    connection, transport = connect(make_server(handler))
    connection.data_received(GET * 2)
    first, second = read_answers(bytes(transport.written), ["GET"] * 2)
    assert first.status == second.status == 400
    error = {
        "message": "Too long.",
        "type": "invalid_request_error",
        "param": "messages",
        "code": "context_length_exceeded",
    }
    body = orjson.loads(first.body)
    flat = {**error, "code": 400}
    assert body == {"error": error, "object": "error", **flat, "request_id": body["request_id"]}


def test_an_exception_in_admit_becomes_a_plain_500(caplog):
    def admit(request: HttpRequest) -> None:
        raise ValueError("secret")

    connection, transport = connect(make_server(admit=admit))
    connection.data_received(GET)
    assert only_answer(transport).status == 500
    assert b"secret" not in transport.written
    assert transport.ended
    assert len(caplog.records) == 1


def test_a_failure_inside_a_stream_cuts_the_connection():
    def handler(request: HttpRequest, exchange: Exchange) -> None:
        exchange.start_stream()
        exchange.write(b"1")
        raise ContextLengthError("Too late.")

    connection, transport = connect(make_server(handler))
    connection.data_received(GET)
    assert transport.aborted
    assert not only_answer(transport).complete


def test_a_failure_after_the_answer_is_only_logged(caplog):
    def handler(request: HttpRequest, exchange: Exchange) -> None:
        exchange.respond(200, b"")
        raise ValueError

    connection, transport = connect(make_server(handler))
    connection.data_received(GET)
    connection.data_received(GET)
    assert [a.status for a in read_answers(bytes(transport.written), ["GET"] * 3)] == [200, 200]
    assert len(caplog.records) == 2


def test_calls_out_of_order_are_errors_of_ours():
    keep = Keep()
    connection, _ = connect(make_server(keep))
    connection.data_received(GET)
    exchange = keep.exchanges[0]
    with pytest.raises(RuntimeError, match="waiting"):
        exchange.write(b"x")
    with pytest.raises(RuntimeError, match="waiting"):
        exchange.finish()
    exchange.start_stream()
    with pytest.raises(RuntimeError, match="streaming"):
        exchange.respond(200, b"")
    with pytest.raises(RuntimeError, match="streaming"):
        exchange.start_stream()
    exchange.finish()
    with pytest.raises(RuntimeError, match="done"):
        exchange.finish()
    with pytest.raises(RuntimeError, match="done"):
        exchange.write(b"x")
