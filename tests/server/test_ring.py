"""Many sends as one system call: what each socket gets, and what comes of each send."""

import errno
import random
import resource
import socket

import pytest

from minisgl_fast.server.ring import SendRing


@pytest.fixture
def pairs():
    """Gives a function that makes connected sockets."""
    made = []

    def make(num, buffer=None):
        for _ in range(num):
            ours, theirs = socket.socketpair()
            if buffer is not None:
                ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, buffer)
            theirs.setblocking(False)
            made.append((ours, theirs))
        return made[-num:]

    yield make
    for ours, theirs in made:
        ours.close()
        theirs.close()


def received(sock):
    data = b""
    try:
        while piece := sock.recv(1 << 20):
            data += piece
    except BlockingIOError:
        pass
    return data


@pytest.mark.parametrize("num", [0, 1, 3, 4, 5, 255, 256, 257, 600])
def test_every_socket_gets_its_own_bytes_in_order(pairs, num):
    ring = SendRing()
    opened = pairs(max(num, 1))[:num]
    for turn in range(3):
        messages = [b"%d of turn %d" % (index, turn) for index in range(num)]
        results = ring.send_all(
            [(ours.fileno(), data) for (ours, _), data in zip(opened, messages, strict=True)]
        )
        assert results == [len(data) for data in messages]
        assert [received(theirs) for _, theirs in opened] == messages


def test_a_socket_named_twice_gets_both_in_order(pairs):
    ((ours, theirs),) = pairs(1)
    SendRing().send_all([(ours.fileno(), b"%d " % number) for number in range(100)])
    assert received(theirs) == b"".join(b"%d " % number for number in range(100))


def test_full_broken_and_closed_sockets_fail_and_the_others_do_not(pairs):
    ring = SendRing()
    (fine, full, gone, closed, last) = pairs(5, buffer=4096)
    while True:
        try:
            full[0].send(bytes(1000), socket.MSG_DONTWAIT)
        except BlockingIOError:
            break
    gone[1].close()
    number = closed[0].fileno()
    closed[0].close()
    for _ in range(3):
        results = ring.send_all(
            [
                (fine[0].fileno(), b"fine"),
                (full[0].fileno(), b"full"),
                (gone[0].fileno(), b"gone"),
                (number, b"closed"),
                (last[0].fileno(), b"last"),
            ]
        )
        assert results == [4, -errno.EAGAIN, -errno.EPIPE, -errno.EBADF, 4]
        assert (received(fine[1]), received(last[1])) == (b"fine", b"last")
    assert set(received(full[1])) == {0}


def test_what_slow_sockets_take_is_told_exactly():
    """TCP with small buffers takes parts; together with what is sent again all of it arrives."""
    rng = random.Random(0)
    ring = SendRing()
    listener = socket.create_server(("127.0.0.1", 0))
    streams = []
    for index in range(8):
        theirs = socket.socket()
        theirs.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        theirs.connect(listener.getsockname())
        theirs.setblocking(False)
        ours, _ = listener.accept()
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        streams.append((ours, theirs, rng.randbytes(200_000), index))
    sent = [0] * 8
    got = [b""] * 8
    in_part = 0
    while any(len(data) < len(stream[2]) for data, stream in zip(got, streams, strict=True)):
        pieces = [
            (ours.fileno(), data[sent[index] : sent[index] + rng.randint(1, 60_000)])
            for ours, _, data, index in streams
        ]
        for index, result in enumerate(ring.send_all(pieces)):
            assert result >= 0 or result == -errno.EAGAIN
            sent[index] += max(result, 0)
            in_part += 0 < result < len(pieces[index][1])
        for _, theirs, _, index in streams:
            if rng.random() < 0.5:
                got[index] += received(theirs)
    assert got == [data for _, _, data, _ in streams]
    assert in_part
    for ours, theirs, _, _ in streams:
        ours.close()
        theirs.close()
    listener.close()


def test_two_rings_do_not_know_each_other(pairs):
    opened = pairs(10)
    first, second = SendRing(), SendRing()
    for _ in range(2):
        for ring in (first, second):
            results = ring.send_all([(ours.fileno(), b"abc") for ours, _ in opened])
            assert results == [3] * 10
    del first
    second.send_all([(ours.fileno(), b"d") for ours, _ in opened])
    assert [received(theirs) for _, theirs in opened] == [b"abc" * 4 + b"d"] * 10


def test_where_there_is_no_ring_sends_are_the_same(pairs):
    opened = pairs(6)
    ring = SendRing()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, hard))  # no descriptor for a ring
    try:
        results = ring.send_all([(ours.fileno(), b"abc") for ours, _ in opened])
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert results == [3] * 6
    assert not ring.works
    assert [received(theirs) for _, theirs in opened] == [b"abc"] * 6
