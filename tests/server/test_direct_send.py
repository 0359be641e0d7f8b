"""Streams whose chunks go straight to their sockets: exact bytes whatever the sockets take."""

import gc
import json
import random
import re
import socket
import ssl
import weakref

import pytest
from direct_driver import SMALL_BUFFER, SocketExchange, SocketResponse, unchunk
from fake_engine import eventually
from http_driver import FakeLoop, FakeTransport

from minisgl_fast.server.deliver import Dispatcher
from minisgl_fast.server.http import HttpServer
from minisgl_fast.server.response import Choice
from minisgl_fast.wire import FinishReason, pack_step

RUNNING, LENGTH = FinishReason.RUNNING, FinishReason.LENGTH


@pytest.fixture
def streams(tokenizer):
    """Gives a function that opens a stream: (dispatcher, exchange, response, choices)."""
    dispatcher = Dispatcher(lambda rid: None, [1.0], [1.0], 1)
    opened = []

    def open_one(num_choices=1):
        exchange = SocketExchange()
        opened.append(exchange)
        response = SocketResponse(exchange, True)
        response.exchange_ = exchange
        choices = [
            Choice(response, k, tokenizer.stream(()), b"[%d:" % k, b"]", False, 0.0)
            for k in range(num_choices)
        ]
        for choice in choices:
            dispatcher.open_choice(choice)
        return exchange, response, choices

    open_one.dispatcher = dispatcher
    yield open_one
    for exchange in opened:
        exchange.close()


def step(dispatcher, *rows, flush=True):
    rows = [(choice.rid, token, reason) for choice, token, reason in rows]
    dispatcher.deliver(pack_step(rows), 0.0)
    if flush:
        dispatcher.flush()


def test_from_the_second_event_on_chunks_pass_the_exchange_by(streams, tokenizer):
    exchange, _, (choice,) = streams()
    tokens = tokenizer.encode("a b c d")
    for token in tokens:
        step(streams.dispatcher, (choice, token, RUNNING))
    exchange.read()
    assert exchange.received == (
        b"b\r\n<open>[0:a]\r\n6\r\n[0: b]\r\n6\r\n[0: c]\r\n6\r\n[0: d]\r\n"
    )
    assert (exchange.num_writes, exchange.num_rests) == (1, 0)


def late_steps(streams, choices, tokens, num):
    """``num`` steps that come in one turn of the loop."""
    for number in range(num):
        step(
            streams.dispatcher,
            *((choice, tokens[number], RUNNING) for choice in choices),
            flush=False,
        )
    streams.dispatcher.flush()


def test_steps_that_come_a_little_late_are_events_of_their_own_in_one_write(streams, tokenizer):
    exchange, _, choices = streams(2)
    a, *tokens = tokenizer.encode("a b c d")
    step(streams.dispatcher, *((choice, a, RUNNING) for choice in choices))
    exchange.read()
    exchange.received = b""
    late_steps(streams, choices, tokens, 3)
    exchange.read()
    events = b"[0: b][1: b][0: c][1: c][0: d][1: d]"
    assert exchange.received == b"%x\r\n%b\r\n" % (len(events), events)
    assert exchange.num_writes == 1


def test_a_loop_that_lags_on_and_on_merges_until_it_is_in_time_again(streams, tokenizer):
    exchange, _, choices = streams()
    a, b = tokenizer.encode("a b")
    step(streams.dispatcher, (choices[0], a, RUNNING))
    late_steps(streams, choices, [b] * 20, 20)
    late_steps(streams, choices, [b] * 3, 3)
    for _ in range(2):  # in time: two late steps are allowed again
        step(streams.dispatcher, (choices[0], b, RUNNING))
    late_steps(streams, choices, [b] * 5, 5)
    exchange.read()
    expected = [1] * 8 + [12] + [3] + [1] * 2 + [1] * 2 + [3]
    events = b"".join(b"[0:%b]" % (b" b" * num) for num in expected)
    assert unchunk(exchange.received) == b"<open>[0:a]" + events


def test_late_steps_come_before_the_end_and_behind_nothing(streams, tokenizer):
    exchange, _, (choice,) = streams()
    a, b, c, d = tokenizer.encode("a b c d")
    step(streams.dispatcher, (choice, a, RUNNING))
    for token, reason in ((b, RUNNING), (c, RUNNING), (d, LENGTH)):
        step(streams.dispatcher, (choice, token, reason), flush=False)
    streams.dispatcher.flush()
    exchange.read()
    assert unchunk(exchange.received) == b"<open>[0:a]"
    assert unchunk(exchange.ending) == b"[0: b][0: c](0: d)"


def test_late_steps_of_a_client_that_does_not_read_are_merged_again(streams, tokenizer):
    exchange, response, (choice,) = streams()
    a, b = tokenizer.encode("a b")
    step(streams.dispatcher, (choice, a, RUNNING))
    while not exchange.paused:
        step(streams.dispatcher, (choice, b, RUNNING))
    late_steps(streams, [choice], [b] * 3, 3)
    late_steps(streams, [choice], [b] * 3, 3)
    while exchange.unsent:
        exchange.read()
        exchange.drain()
    response.write_ready()
    exchange.read()
    assert unchunk(exchange.received).endswith(b"[0: b][0:" + b" b" * 6 + b"]")


def test_a_chunk_of_nothing_is_not_sent(streams, tokenizer):
    exchange, _, (choice,) = streams()
    step(streams.dispatcher, (choice, tokenizer.encode("a")[0], RUNNING))
    exchange.read()
    pieces = tokenizer.encode("ᚠ")
    assert len(pieces) > 1
    for piece in pieces[:-1]:
        exchange.received = b""
        step(streams.dispatcher, (choice, piece, RUNNING))
        exchange.read()
        assert exchange.received == b""
    step(streams.dispatcher, (choice, pieces[-1], RUNNING))
    exchange.read()
    assert unchunk(exchange.received) == "[0:ᚠ]".encode()


@pytest.mark.parametrize("seed", range(6))
def test_whatever_sockets_take_every_byte_comes_once_and_in_order(streams, tokenizer, seed):
    """Streams of 1 to 3 choices against readers that read when and as much as they like."""
    rng = random.Random(seed)
    vocabulary = tokenizer.encode('Some plain words, ᚠ🥐 你好 and "quotes" \\ to be cut anywhere.')
    opened = [streams(rng.randint(1, 3)) for _ in range(5)]
    sent = {id(choice): [] for _, _, choices in opened for choice in choices}
    readiness = {id(exchange): rng.choice((0.02, 0.2, 0.9)) for exchange, _, _ in opened}
    for number in range(700):
        last = number == 699
        rows = []
        for _, _, choices in opened:
            for choice in choices:
                if last or rng.random() < 0.9:
                    rows.append((choice, rng.choice(vocabulary), LENGTH if last else RUNNING))
                    sent[id(choice)].append(rows[-1][1])
        step(streams.dispatcher, *rows, flush=last or rng.random() < 0.8)
        for exchange, response, _ in opened:
            if rng.random() < readiness[id(exchange)]:
                exchange.read(rng.choice((100, 2000, 1 << 20)))
                if exchange.unsent:
                    exchange.drain()
                    if not exchange.unsent:
                        response.write_ready()
    assert len(streams.dispatcher) == 0
    assert any(exchange.num_rests for exchange, _, _ in opened)
    for exchange, response, choices in opened:
        while exchange.unsent:
            exchange.read()
            exchange.drain()
        response.write_ready()
        exchange.read()
        body = unchunk(exchange.received + exchange.ending).decode()
        assert body.startswith("<open>")
        for choice in choices:
            text = "".join(
                re.findall(rf"\[{choice.index}:((?:[^\\\]]|\\.)*)\]", body)
                + re.findall(rf"\({choice.index}:((?:[^\\)]|\\.)*)\)", body)
            )
            assert json.loads(f'"{text}"') == tokenizer.decode(sent[id(choice)])


def test_a_client_that_is_gone_does_not_harm_the_others(streams, tokenizer):
    gone, _, (first,) = streams()
    here, _, (second,) = streams()
    a, b = tokenizer.encode("a b")
    step(streams.dispatcher, (first, a, RUNNING), (second, a, RUNNING))
    gone.peer.close()
    for _ in range(3):
        step(streams.dispatcher, (first, b, RUNNING), (second, b, RUNNING))
    here.read()
    assert unchunk(here.received) == b"<open>[0:a][0: b][0: b][0: b]"
    # The transport saw the chunk that could not be sent, and so learns of the end.
    assert gone.num_rests + gone.num_writes >= 2


def test_an_interval_writes_the_first_token_and_then_every_nth(tokenizer):
    dispatcher = Dispatcher(lambda rid: None, [1.0], [1.0], 3)
    exchange = SocketExchange()
    response = SocketResponse(exchange, True)
    response.exchange_ = exchange
    choice = Choice(response, 0, tokenizer.stream(()), b"[", b"]", False, 0.0)
    dispatcher.open_choice(choice)
    tokens = tokenizer.encode("a b c d e f g h i")
    for token in tokens[:-1]:
        step(dispatcher, (choice, token, RUNNING))
    step(dispatcher, (choice, tokens[-1], LENGTH))
    exchange.read()
    assert unchunk(exchange.received) == b"<open>[a][ b c d][ e f g]"
    assert unchunk(exchange.ending) == b"(0: h i)"
    exchange.close()


def test_rids_stay_unique_while_their_table_grows(tokenizer):
    dispatcher = Dispatcher(lambda rid: None, [1.0], [1.0])
    response = SocketResponse(None, False)
    rng = random.Random(1)
    table = tokenizer.stream(())
    live = {}
    for _ in range(3000):
        if live and rng.random() < 0.4:
            rid = rng.choice(list(live))
            assert dispatcher.close(live.pop(rid))
        else:
            choice = Choice(response, 0, table, b"", b"", False, 0.0)
            rid = dispatcher.open_choice(choice)
            assert rid not in live
            live[rid] = choice
        assert len(dispatcher) == len(live)
    assert {choice.rid: choice for choice in dispatcher.choices()} == live


@pytest.mark.parametrize("encrypted", [False, True])
def test_only_a_plain_socket_is_written_past_its_transport(encrypted):
    ours, theirs = socket.socketpair()
    facts = {"socket": ours, "sslcontext": ssl.create_default_context() if encrypted else None}
    transport = FakeTransport()
    transport.get_extra_info = lambda name, default=None: facts.get(name, default)
    exchanges = []

    def handler(request, exchange):
        exchange.start_stream()
        exchanges.append(exchange)

    server = HttpServer(handler)
    server.start(FakeLoop())
    connection = server.connection()
    connection.connection_made(transport)
    connection.data_received(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
    assert exchanges[0].descriptor() == (-1 if encrypted else ours.fileno())
    assert (transport.high == 0) is not encrypted
    connection.connection_lost(None)
    assert exchanges[0].descriptor() == -1
    ours.close()
    theirs.close()


def open_stream(server, max_tokens):
    """A socket with a small window that has asked for a stream."""
    message = {"role": "user", "content": "Hello"}
    body = {"messages": [message], "stream": True, "ignore_eos": True, "max_tokens": max_tokens}
    data = json.dumps(body).encode()
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    sock.settimeout(30)
    sock.connect(("127.0.0.1", server.port))
    sock.sendall(
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%b"
        % (len(data), data)
    )
    return sock


def test_every_byte_of_slow_and_quick_readers_is_right(server, tokenizer):
    """Whole streams over TCP, with small buffers on both sides."""
    text = 'Quotes " and \\ and 🥐 and ᚠ. '
    server.engine.script = lambda request: tokenizer.encode(text)
    sockets = [open_stream(server, 700) for _ in range(4)]
    eventually(lambda: len(server.http.connections) == 4)
    for connection in server.http.connections:
        theirs = connection._transport.get_extra_info("socket")
        theirs.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SMALL_BUFFER)
    rng = random.Random(0)
    received = dict.fromkeys(sockets, b"")
    left = set(sockets)
    while left:
        for sock in list(left):
            data = sock.recv(rng.choice((64, 4096, 1 << 16)))
            assert data
            received[sock] += data
            if received[sock].endswith(b"0\r\n\r\n"):
                left.discard(sock)
    expected = tokenizer.decode((tokenizer.encode(text) * 100)[:700])
    for sock, data in received.items():
        body = unchunk(data.partition(b"\r\n\r\n")[2].removesuffix(b"0\r\n\r\n"))
        events = body.split(b"\n\n")
        assert events[-2:] == [b"data: [DONE]", b""]
        chunks = [json.loads(event.removeprefix(b"data: ")) for event in events[:-2]]
        deltas = [c["choices"][0]["delta"].get("content") or "" for c in chunks if c["choices"]]
        assert "".join(deltas) == expected
        sock.close()


def test_a_client_that_leaves_while_it_is_paused_leaves_no_garbage(server, tokenizer):
    server.engine.script = lambda request: tokenizer.encode(" word")
    server.engine.hold = True
    sock = open_stream(server, 3000)
    eventually(lambda: server.engine.running)
    (connection,) = server.http.connections
    theirs = connection._transport.get_extra_info("socket")
    theirs.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SMALL_BUFFER)
    (choice,) = server.call(server.frontend.dispatcher.choices)
    response = weakref.ref(choice.response)
    del connection, choice
    server.engine.hold = False
    eventually(lambda: any(exchange.paused for exchange in server.http.exchanges()))
    server.engine.hold = True
    gc.disable()
    try:
        sock.close()
        eventually(lambda: not server.http.connections)
        eventually(lambda: response() is None)
    finally:
        gc.enable()
