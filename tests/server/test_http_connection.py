"""The connection's state machine on a fake transport and a fake clock."""

import logging
from dataclasses import replace

import orjson
import pytest
from http_cases import HOST, SMALL_LIMITS, connect, handle, make_server, read_answers

from minisgl_fast.errors import ContextLengthError, OverloadedError
from minisgl_fast.server.http import Exchange, HttpLimits, HttpRequest

GET = b"GET / HTTP/1.1\r\n" + HOST + b"\r\n"
LIMITS = SMALL_LIMITS


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


# Order.


def test_a_request_is_parsed_only_after_the_answer_before_it():
    keep = Keep()
    server = make_server(keep)
    connection, transport = connect(server)
    connection.data_received(get("/1") + get("/2"))
    connection.data_received(get("/3"))
    assert [r.path for r in keep.requests] == ["/1"]
    keep.exchanges[0].respond(200, b"1")
    assert [r.path for r in keep.requests] == ["/1", "/2"]
    keep.exchanges[1].start_stream()
    keep.exchanges[1].write(b"2")
    assert len(keep.requests) == 2
    keep.exchanges[1].finish(b"2")
    assert [r.path for r in keep.requests] == ["/1", "/2", "/3"]
    keep.exchanges[2].respond(200, b"3")
    answers = read_answers(bytes(transport.written), ["GET"] * 3)
    assert [answer.body for answer in answers] == [b"1", b"22", b"3"]


def test_a_bad_request_in_the_pipeline_waits_for_its_turn():
    keep = Keep()
    connection, transport = connect(make_server(keep))
    connection.data_received(get("/1") + b"nonsense\r\n\r\n")
    assert not transport.written
    keep.exchanges[0].respond(200, b"1")
    assert [a.status for a in read_answers(bytes(transport.written), ["GET"] * 2)] == [200, 400]
    assert transport.ended


def test_many_synchronous_answers_do_not_recurse():
    connection, transport = connect(make_server())
    connection.data_received(GET * 5000)
    assert transport.written.count(b"HTTP/1.1 200 OK") == 5000


def test_reading_pauses_when_too_much_is_pipelined_and_resumes():
    keep = Keep()
    connection, transport = connect(make_server(keep, replace(LIMITS, max_pipelined=100)))
    connection.data_received(GET)
    connection.data_received(b"x" * 100)
    assert not transport.reading_paused
    connection.data_received(b"x")
    assert transport.reading_paused
    keep.exchanges[0].respond(200, b"")
    assert not transport.reading_paused


def test_no_request_is_taken_while_the_client_does_not_read_the_answers():
    keep = Keep()
    connection, transport = connect(make_server(keep))
    connection.data_received(get("/1"))
    connection.pause_writing()
    keep.exchanges[0].respond(200, b"1")
    connection.data_received(get("/2"))
    assert len(keep.requests) == 1
    connection.resume_writing()
    assert len(keep.requests) == 2
    assert keep.resumed == 0  # nobody was paused in the second exchange


def test_reading_pauses_while_answers_are_not_read():
    connection, transport = connect(make_server(limits=replace(LIMITS, max_pipelined=100)))
    connection.pause_writing()
    connection.data_received(GET * 10)
    assert transport.reading_paused
    assert not transport.written
    connection.resume_writing()
    assert not transport.reading_paused
    assert transport.written.count(b" 200 OK") == 10


# Timeouts: every one is checked just before and just after.


def test_slow_head_gets_408_however_its_bytes_trickle():
    server = make_server()
    connection, transport = connect(server)
    connection.data_received(b"GET / HTTP/1.1\r\n")
    for _ in range(10):
        server._loop.advance(0.99)
        connection.data_received(b"X")
    assert not transport.written
    server._loop.advance(0.2)
    answer = only_answer(transport)
    assert answer.status == 408
    assert orjson.loads(answer.body)["error"]["code"] == "request_timeout"
    assert answer.headers[b"connection"] == b"close"
    assert server.refusals == {408: 1}


def test_empty_lines_do_not_count_as_a_head():
    server = make_server()
    connection, transport = connect(server)
    for _ in range(8):
        connection.data_received(b"\r\n")
        server._loop.advance(9.9)
    assert transport.closed
    assert not transport.written


def test_idle_body_gets_408():
    server = make_server()
    connection, transport = connect(server)
    connection.data_received(post(30, b"x"))
    server._loop.advance(9.9)
    assert not transport.written
    server._loop.advance(0.2)
    assert only_answer(transport).status == 408


def test_body_under_the_minimum_rate_gets_408():
    server = make_server(limits=replace(LIMITS, max_body=10**6, min_body_rate=1000))
    connection, transport = connect(server)
    connection.data_received(post(10**6))
    for _ in range(10):
        server._loop.advance(1)
        connection.data_received(b"x" * 10)
    assert not transport.written
    server._loop.advance(1)
    assert only_answer(transport).status == 408
    assert server.num_buffered_body_bytes == 0


def test_a_steady_body_may_take_long():
    server = make_server(limits=replace(LIMITS, max_body=10**6, min_body_rate=1000))
    connection, transport = connect(server)
    connection.data_received(post(100_000))
    for _ in range(99):
        server._loop.advance(1)
        connection.data_received(b"x" * 1000)
    assert not transport.written
    connection.data_received(b"x" * 1000)
    assert only_answer(transport).status == 200


def test_idle_connection_is_closed_silently():
    server = make_server()
    connection, transport = connect(server)
    connection.data_received(GET)
    del transport.written[:]
    server._loop.advance(74.9)
    assert not transport.closed
    server._loop.advance(0.2)
    assert transport.closed
    assert not transport.aborted
    assert not transport.written


def test_an_exchange_under_way_has_no_deadline():
    keep = Keep()
    server = make_server(keep)
    connection, transport = connect(server)
    connection.data_received(GET)
    server._loop.advance(100_000)
    assert not transport.closed
    keep.exchanges[0].respond(200, b"")
    server._loop.advance(74.9)
    assert not transport.closed


def test_after_an_error_the_client_has_time_to_read_then_is_cut():
    server = make_server()
    connection, transport = connect(server)
    connection.data_received(b"nonsense\r\n\r\n")
    assert transport.ended
    assert not transport.closed
    written = len(transport.written)
    connection.data_received(GET)
    assert len(transport.written) == written
    server._loop.advance(1.9)
    assert not transport.closed
    server._loop.advance(0.2)
    assert transport.aborted


def test_an_error_with_reading_paused_reads_on():
    keep = Keep()
    connection, transport = connect(make_server(keep, replace(LIMITS, max_pipelined=10)))
    connection.data_received(GET)
    connection.data_received(b"nonsense, long enough\r\n\r\n")
    assert transport.reading_paused
    keep.exchanges[0].respond(200, b"")
    assert transport.ended
    assert not transport.reading_paused


def test_one_failing_timeout_does_not_stop_the_sweep(caplog):
    keep = Keep()
    server = make_server(keep)
    connections = [connect(server) for _ in range(3)]
    for connection, _ in connections:
        connection.data_received(GET)
        connection.pause_writing()

    def fail() -> None:
        raise ZeroDivisionError

    for exchange in keep.exchanges:
        exchange.on_disconnect = fail
    server._loop.advance(30.1)
    assert all(transport.aborted for _, transport in connections)
    assert server._loop.callback is not None
    assert len(caplog.records) == 3


# Back-pressure.


def test_paused_and_resumed():
    keep = Keep()
    connection, transport = connect(make_server(keep))
    connection.data_received(GET)
    (exchange,) = keep.exchanges
    exchange.start_stream()
    assert not exchange.paused
    connection.pause_writing()
    assert exchange.paused
    assert keep.resumed == 0
    connection.resume_writing()
    assert not exchange.paused
    assert keep.resumed == 1
    assert keep.gone == []


def test_a_stalled_client_is_cut_off():
    keep = Keep()
    server = make_server(keep)
    connection, transport = connect(server)
    connection.data_received(GET)
    keep.exchanges[0].start_stream()
    connection.pause_writing()
    server._loop.advance(29.9)
    assert keep.gone == []
    server._loop.advance(0.2)
    assert keep.gone == ["/"]
    assert transport.aborted
    assert keep.exchanges[0].closed
    assert server.num_stalled == 1
    connection.connection_lost(None)
    assert keep.gone == ["/"]
    assert server.num_exchanges == 0


def test_a_client_that_resumes_in_time_is_not_cut_off():
    keep = Keep()
    server = make_server(keep)
    connection, transport = connect(server)
    connection.data_received(GET)
    keep.exchanges[0].start_stream()
    for _ in range(5):
        connection.pause_writing()
        server._loop.advance(20)
        connection.resume_writing()
    server._loop.advance(1000)
    assert not transport.closed


def test_too_much_unsent_cuts_off_at_once():
    keep = Keep()
    server = make_server(keep)
    connection, transport = connect(server)
    connection.data_received(GET)
    exchange = keep.exchanges[0]
    exchange.start_stream()
    connection.pause_writing()
    transport.unsent = LIMITS.max_write_backlog
    exchange.write(b"x")
    assert keep.gone == []
    transport.unsent += 1
    exchange.write(b"x")
    assert keep.gone == ["/"]
    assert transport.aborted
    exchange.write(b"x")  # nobody is there: no effect, no error
    exchange.finish(b"x")


def test_an_unread_answer_does_not_hold_its_connection_for_ever():
    keep = Keep()
    server = make_server(keep)
    connection, transport = connect(server)
    connection.data_received(get("/", b"Connection: close"))
    connection.pause_writing()
    keep.exchanges[0].respond(200, b"x" * 100_000)
    assert transport.closed
    assert not transport.aborted
    server._loop.advance(30.1)
    assert transport.aborted


# The client leaves.


@pytest.mark.parametrize("how", ["eof", "lost"])
@pytest.mark.parametrize("streaming", [False, True])
def test_disconnect_before_the_answer_is_complete(how: str, streaming: bool):
    keep = Keep()
    server = make_server(keep)
    connection, transport = connect(server)
    connection.data_received(get("/x"))
    exchange = keep.exchanges[0]
    if streaming:
        exchange.start_stream()
        exchange.write(b"1")
    if how == "eof":
        assert not connection.eof_received()
    else:
        connection.connection_lost(ConnectionResetError())
    assert keep.gone == ["/x"]
    assert exchange.closed
    assert not exchange.done
    assert server.num_exchanges == 0
    connection.connection_lost(None)
    assert keep.gone == ["/x"]
    assert server.num_connections == 0
    written = len(transport.written)
    exchange.write(b"2")
    exchange.finish(b"3")
    exchange.respond(200, b"4")
    exchange.fail(OverloadedError("5"))
    exchange.abort()
    assert len(transport.written) == written


def test_disconnect_after_the_answer_is_silent():
    keep = Keep()
    connection, _ = connect(make_server(keep))
    connection.data_received(GET)
    keep.exchanges[0].respond(200, b"")
    connection.eof_received()
    connection.connection_lost(None)
    assert keep.gone == []
    assert keep.exchanges[0].done


def test_requests_behind_the_one_that_was_left_are_dropped():
    keep = Keep()
    connection, _ = connect(make_server(keep))
    connection.data_received(get("/1") + get("/2"))
    connection.eof_received()
    assert [r.path for r in keep.requests] == ["/1"]


def test_abort_drops_the_connection_and_does_not_call_back():
    keep = Keep()
    server = make_server(keep)
    connection, transport = connect(server)
    connection.data_received(GET)
    keep.exchanges[0].start_stream()
    keep.exchanges[0].abort()
    assert transport.aborted
    connection.connection_lost(None)
    assert keep.gone == []
    assert server.num_exchanges == 0


# Expect and admission.


def test_continue_is_sent_once_the_head_is_admitted():
    heads = []

    def admit(request: HttpRequest) -> None:
        assert not transport.written
        heads.append((request.path, request.body))

    connection, transport = connect(make_server(admit=admit))
    connection.data_received(post(2, b"", b"Expect: 100-Continue"))
    assert bytes(transport.written) == b"HTTP/1.1 100 Continue\r\n\r\n"
    assert heads == [("/", b"")]
    connection.data_received(b"h")
    connection.data_received(b"i")
    assert transport.written.count(b"100 Continue") == 1
    assert only_answer(transport).status == 200


def test_no_continue_where_the_body_is_there_already():
    connection, transport = connect(make_server())
    connection.data_received(post(2, b"hi", b"Expect: 100-continue"))
    assert transport.written.startswith(b"HTTP/1.1 200 OK")


def test_no_continue_for_http_1_0_or_without_a_body():
    connection, transport = connect(make_server())
    connection.data_received(
        b"POST / HTTP/1.0\r\nExpect: 100-continue\r\nContent-Length: 1\r\n\r\n"
    )
    assert not transport.written


def refuse(request: HttpRequest) -> OverloadedError:
    return OverloadedError("Queue full.", retry_after_s=7)


def test_a_refused_expectation_gets_the_final_answer_instead():
    server = make_server(admit=refuse)
    connection, transport = connect(server)
    connection.data_received(post(2, b"", b"Expect: 100-continue"))
    answer = only_answer(transport)
    assert answer.status == 503
    assert answer.headers[b"retry-after"] == b"7"
    assert transport.ended
    assert server.refusals == {503: 1}


def test_a_small_refused_body_is_dropped_and_the_connection_stays():
    keep = Keep()
    server = make_server(keep, admit=refuse)
    connection, transport = connect(server)
    for _ in range(2):
        connection.data_received(post(3, b"ab"))
        connection.data_received(b"c")
    answers = read_answers(bytes(transport.written), ["GET"] * 3)
    assert [answer.status for answer in answers] == [503, 503]
    assert not transport.ended
    assert keep.requests == []
    assert server.num_exchanges == server.num_buffered_body_bytes == 0


@pytest.mark.parametrize("fields", [b"Content-Length: 65537", b"Transfer-Encoding: chunked"])
def test_a_large_refused_body_is_not_read(fields: bytes):
    connection, transport = connect(make_server(limits=HttpLimits(), admit=refuse))
    connection.data_received(b"POST / HTTP/1.1\r\n" + HOST + fields + b"\r\n\r\n")
    assert only_answer(transport).status == 503
    assert transport.ended


def test_bodies_of_all_connections_together_are_bounded():
    server = make_server(limits=HttpLimits(max_buffered_bodies=100_000))
    big = connect(server)[0]
    big.data_received(post(200_000, b"x" * 100_001))
    assert server.num_buffered_body_bytes == 100_001
    connection, transport = connect(server)
    connection.data_received(post(10, b"x" * 10))
    assert only_answer(transport).status == 503
    big.connection_lost(None)
    assert server.num_buffered_body_bytes == 0
    connection.data_received(post(10, b"x" * 10))
    answers = read_answers(bytes(transport.written), ["GET"] * 2)
    assert [answer.status for answer in answers] == [503, 200]


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


# Drain, cap, close.


def test_drain():
    keep = Keep()
    server = make_server(keep)
    idle, idle_transport = connect(server)
    fresh, fresh_transport = connect(server)
    busy, busy_transport = connect(server)
    half, half_transport = connect(server)
    idle.data_received(GET)
    keep.exchanges[0].respond(200, b"")
    busy.data_received(get("/busy") + get("/next"))
    keep.exchanges[1].start_stream()
    half.data_received(post(3, b"ab"))
    server.drain(open_paths={"/health"})
    assert idle_transport.closed
    assert fresh_transport.closed
    assert not busy_transport.closed
    assert not half_transport.closed
    # A request whose head came before the drain is taken.
    half.data_received(b"c")
    assert keep.requests[2].body == b"abc"
    keep.exchanges[2].respond(200, b"done")
    answer = only_answer(half_transport)
    assert (answer.status, answer.headers[b"connection"]) == (200, b"close")
    assert half_transport.closed
    keep.exchanges[1].finish(b"end")
    assert only_answer(busy_transport).body == b"end"
    assert busy_transport.closed
    assert [r.path for r in keep.requests] == ["/", "/busy", "/"]

    late, late_transport = connect(server)
    late.data_received(get("/late") + get("/later"))
    answer = only_answer(late_transport)
    assert (answer.status, answer.headers[b"connection"]) == (503, b"close")
    assert answer.headers[b"retry-after"] == b"1"
    assert late_transport.closed
    probe, probe_transport = connect(server)
    probe.data_received(get("/health"))
    keep.exchanges[-1].respond(200, b"{}")
    answer = only_answer(probe_transport)
    assert (answer.status, answer.headers[b"connection"]) == (200, b"close")
    assert server.num_exchanges == 0


def test_a_live_exchange_is_listed_and_counted():
    keep = Keep()
    server = make_server(keep)
    connections = [connect(server)[0] for _ in range(3)]
    for connection in connections[:2]:
        connection.data_received(GET)
    assert server.num_connections == 3
    assert server.num_exchanges == 2
    assert set(server.exchanges()) == set(keep.exchanges)


def test_close_cuts_everything_and_tells_the_exchanges():
    keep = Keep()
    server = make_server(keep)
    connection, transport = connect(server)
    connection.data_received(GET)
    server.close()
    assert transport.aborted
    connection.connection_lost(None)  # as the transport does after an abort
    assert keep.gone == ["/"]
    assert server._loop.callback is None


def test_connections_over_the_cap_get_503():
    server = make_server(limits=replace(LIMITS, max_connections=2))
    pairs = [connect(server) for _ in range(3)]
    assert [transport.closed for _, transport in pairs] == [False, False, True]
    answer = only_answer(pairs[2][1])
    assert (answer.status, answer.headers[b"connection"]) == (503, b"close")
    for connection, _ in pairs:
        connection.connection_lost(None)
    assert server.num_connections == 0
    assert not connect(server)[1].closed


# The default limits, at the limit and one over.


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
