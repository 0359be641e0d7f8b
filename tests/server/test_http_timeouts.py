"""Every deadline of a connection, and clients that do not read, without I/O."""

from dataclasses import replace

import orjson
from http_driver import GET, SMALL_LIMITS, Keep, connect, get, make_server, only_answer, post

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
    server = make_server(limits=replace(SMALL_LIMITS, max_body=10**6, min_body_rate=1000))
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
    server = make_server(limits=replace(SMALL_LIMITS, max_body=10**6, min_body_rate=1000))
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
    connection, transport = connect(make_server(keep, replace(SMALL_LIMITS, max_pipelined=10)))
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
    transport.unsent = SMALL_LIMITS.max_write_backlog
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
