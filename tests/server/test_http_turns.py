"""How requests share the turns of the loop: what has no time now waits, in the order it came."""

import pytest
from http_driver import GET, FakeLoop, Keep, connect, get, only_answer, post

from minisgl_fast.server.http import HttpLimits, HttpServer


class Loop(FakeLoop):
    """What is to be called soon waits for the next ``turn``."""

    def __init__(self) -> None:
        super().__init__()
        self.soon = []

    def call_soon(self, callback) -> None:
        self.soon.append(callback)

    def turn(self) -> None:
        callbacks, self.soon = self.soon, []
        for callback in callbacks:
            callback()


@pytest.fixture
def loop():
    return Loop()


@pytest.fixture
def handler():
    return Keep()


@pytest.fixture
def server(loop, handler):
    """A server that takes one request a turn."""
    server = HttpServer(handler, HttpLimits(max_turn_s=0.0, max_pipelined=100))
    server.start(loop)
    return server


def paths(handler: Keep) -> list[str]:
    return [request.path for request in handler.requests]


def test_requests_beyond_a_turn_wait_and_go_on_in_the_order_they_came(server, loop, handler):
    connections = [connect(server) for _ in range(4)]
    for index, (connection, _) in enumerate(connections):
        connection.data_received(get(f"/{index}"))
    assert paths(handler) == ["/0"]
    late, _ = connect(server)
    late.data_received(get("/late"))
    for num_turns in (2, 3, 4):
        loop.turn()
        assert paths(handler) == [f"/{index}" for index in range(num_turns)]
    loop.turn()
    assert paths(handler)[4:] == ["/late"]
    loop.turn()
    assert not loop.soon


def test_a_turn_without_requests_costs_nothing_and_the_next_has_time_at_once(server, loop, handler):
    connection, _ = connect(server)
    for _ in range(3):
        connection.data_received(GET)
        handler.exchanges[-1].respond(200, b"ok")
        loop.turn()
        assert not loop.soon
    assert len(handler.requests) == 3


def test_pipelined_requests_of_one_connection_take_turns_too(server, loop, handler):
    connection, transport = connect(server)
    connection.data_received(get("/a") + get("/b"))
    handler.exchanges[0].respond(200, b"ok")
    assert paths(handler) == ["/a"]
    loop.turn()
    assert paths(handler) == ["/a", "/b"]
    handler.exchanges[1].respond(200, b"ok")
    assert transport.written.count(b"HTTP/1.1 200 OK") == 2


def test_a_request_that_waits_is_read_as_it_comes_in_pieces(server, loop, handler):
    first, _ = connect(server)
    first.data_received(GET)
    second, _ = connect(server)
    for byte in post(3, b"abc"):
        second.data_received(bytes((byte,)))
    assert len(handler.requests) == 1
    loop.turn()
    assert handler.requests[1].body == b"abc"


def test_the_body_of_a_request_that_was_begun_needs_no_turn(server, loop, handler):
    first, _ = connect(server)
    first.data_received(post(3))
    second, _ = connect(server)
    second.data_received(GET)
    first.data_received(b"abc")
    assert [request.body for request in handler.requests] == [b"abc"]
    loop.turn()
    assert len(handler.requests) == 2


@pytest.mark.parametrize("leave", ["connection_lost", "eof_received"])
def test_a_client_that_leaves_while_it_waits_is_not_served(server, loop, handler, leave):
    first, _ = connect(server)
    first.data_received(GET)
    gone, _ = connect(server)
    gone.data_received(get("/gone"))
    last, _ = connect(server)
    last.data_received(get("/last"))
    getattr(gone, leave)(*(None,) * (leave == "connection_lost"))
    loop.turn()
    assert paths(handler) == ["/", "/last"]


def test_what_waits_is_bounded(server, loop, handler):
    first, _ = connect(server)
    first.data_received(GET)
    second, transport = connect(server)
    second.data_received(post(200, bytes(200)))
    assert transport.reading_paused
    loop.turn()
    assert not transport.reading_paused
    assert len(handler.requests[1].body) == 200


def test_one_that_fails_does_not_hold_up_the_others(server, loop, handler):
    def fail(request, exchange):
        raise ValueError("a bug")

    connections = [connect(server) for _ in range(3)]
    for connection, _ in connections:
        connection.data_received(GET)
    server.handler = fail
    loop.turn()
    server.handler = handler
    loop.turn()
    assert only_answer(connections[1][1]).status == 500
    assert len(handler.requests) == 2


def test_a_drain_refuses_what_waits(server, loop, handler):
    connections = [connect(server) for _ in range(2)]
    for connection, _ in connections:
        connection.data_received(GET)
    server.drain()
    loop.turn()
    assert only_answer(connections[1][1]).status == 503


def test_a_server_that_is_closed_serves_nobody_who_waits(server, loop, handler):
    for _ in range(3):
        connect(server)[0].data_received(GET)
    server.close()
    loop.turn()
    assert len(handler.requests) == 1
