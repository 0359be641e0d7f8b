"""A connection: requests in order, clients that leave, admission, drain, without I/O."""

from dataclasses import replace

import pytest
from http_driver import (
    GET,
    HOST,
    SMALL_LIMITS,
    Keep,
    connect,
    get,
    make_server,
    only_answer,
    post,
    read_answers,
)

from minisgl_fast.errors import OverloadedError
from minisgl_fast.server.http import HttpLimits, HttpRequest

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
    connection, transport = connect(make_server(keep, replace(SMALL_LIMITS, max_pipelined=100)))
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
    connection, transport = connect(make_server(limits=replace(SMALL_LIMITS, max_pipelined=100)))
    connection.pause_writing()
    connection.data_received(GET * 10)
    assert transport.reading_paused
    assert not transport.written
    connection.resume_writing()
    assert not transport.reading_paused
    assert transport.written.count(b" 200 OK") == 10


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
    server = make_server(limits=replace(SMALL_LIMITS, max_connections=2))
    pairs = [connect(server) for _ in range(3)]
    assert [transport.closed for _, transport in pairs] == [False, False, True]
    answer = only_answer(pairs[2][1])
    assert (answer.status, answer.headers[b"connection"]) == (503, b"close")
    for connection, _ in pairs:
        connection.connection_lost(None)
    assert server.num_connections == 0
    assert not connect(server)[1].closed
