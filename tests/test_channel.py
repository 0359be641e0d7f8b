"""The framed socketpair: frames survive every cut, nothing blocks, end-of-file is seen."""

import asyncio
import random
import socket

import pytest

from minisgl_fast.channel import EngineChannel, wait_for_any
from minisgl_fast.errors import EngineError
from minisgl_fast.frames import MAX_FRAME_BYTES, FrameReader
from minisgl_fast.frontend_channel import FrontendChannel
from minisgl_fast.wire import FrameKind, frame

FRAMES = [(1, b""), (18, b"x"), (2, bytes(range(256)) * 5), (19, b"{}")]
STREAM = b"".join(frame(kind, payload) for kind, payload in FRAMES)


def test_frames_are_the_same_for_every_cut_of_the_stream() -> None:
    for cut in range(len(STREAM) + 1):
        reader = FrameReader()
        assert reader.feed(STREAM[:cut]) + reader.feed(STREAM[cut:]) == FRAMES


def test_frames_survive_random_pieces() -> None:
    generator = random.Random(0)
    for _ in range(200):
        reader, got, rest = FrameReader(), [], STREAM * 3
        while rest:
            size = generator.randint(1, 400)
            got += reader.feed(rest[:size])
            rest = rest[size:]
        assert got == FRAMES * 3


def test_frames_of_every_size_survive_every_way_to_cut_them() -> None:
    generator = random.Random(2)
    for _ in range(300):
        frames = [
            (generator.randrange(256), generator.randbytes(generator.choice((0, 1, 7, 300, 5000))))
            for _ in range(generator.randint(1, 12))
        ]
        rest = b"".join(frame(kind, payload) for kind, payload in frames)
        reader, got = FrameReader(), []
        largest = generator.choice((1, 3, 40, 2000, len(rest)))
        while rest:
            size = generator.randint(1, largest)
            got += reader.feed(rest[:size])
            rest = rest[size:]
        assert got == frames


def test_a_bad_length_behind_good_frames_ends_the_channel() -> None:
    reader = FrameReader()
    assert reader.feed(STREAM + b"\0\0") == FRAMES
    with pytest.raises(EngineError):
        reader.feed(b"\0\0\1")


@pytest.mark.parametrize("length", [0, MAX_FRAME_BYTES + 1])
def test_an_impossible_length_ends_the_channel(length: int) -> None:
    with pytest.raises(EngineError):
        FrameReader().feed(length.to_bytes(4, "little") + b"\x01")


def test_send_keeps_what_the_socket_does_not_take_and_loses_nothing() -> None:
    ours, theirs = socket.socketpair()
    engine = EngineChannel(ours)
    payload = random.Random(1).randbytes(3_000_000)
    engine.send(FrameKind.STEP, payload)
    engine.send(FrameKind.STATS, b"{}")
    assert engine.has_unsent

    reader, frames = FrameReader(), []
    theirs.setblocking(False)
    while len(frames) < 2:
        wait_for_any([engine], 0)
        engine.flush()
        try:
            frames += reader.feed(theirs.recv(1 << 16))
        except BlockingIOError:
            continue
    assert frames == [(FrameKind.STEP, payload), (FrameKind.STATS, b"{}")]
    assert not engine.has_unsent
    engine.close()
    theirs.close()


def test_a_closed_peer_is_seen_on_receive_and_on_send() -> None:
    ours, theirs = socket.socketpair()
    engine = EngineChannel(ours)
    theirs.sendall(frame(FrameKind.ABORT, b"abcd"))
    theirs.close()
    assert engine.receive() == [(FrameKind.ABORT, b"abcd")]
    engine.receive()
    assert engine.closed
    engine.send(FrameKind.STEP, b"into the void")
    assert not engine.has_unsent
    engine.close()


def test_the_frontend_end_gets_whole_frames_and_one_close() -> None:
    async def scenario() -> tuple[list[tuple[int, bytes]], int, list[tuple[int, bytes]]]:
        ours, theirs = socket.socketpair()
        loop = asyncio.get_running_loop()
        got: list[tuple[int, bytes]] = []
        closed = loop.create_future()
        ours.setblocking(False)
        _, channel = await loop.create_connection(
            lambda: FrontendChannel(
                lambda kind, payload: got.append((kind, payload)), lambda: closed.set_result(1)
            ),
            sock=ours,
        )
        engine = EngineChannel(theirs)
        channel.send(FrameKind.ADD, b"prompt")
        engine.send(FrameKind.READY, b"{}")
        engine.send(FrameKind.STEP, b"tokens")
        await asyncio.sleep(0)
        received = engine.receive()
        engine.close()
        await closed
        channel.send(FrameKind.ADD, b"nobody reads this")
        return got, closed.result(), received

    got, closed, received = asyncio.run(scenario())
    assert got == [(FrameKind.READY, b"{}"), (FrameKind.STEP, b"tokens")]
    assert closed == 1
    assert received == [(FrameKind.ADD, b"prompt")]


class Transport:
    """What a channel writes to."""

    def __init__(self) -> None:
        self.written: list[bytes] = []
        self.is_closed = False

    def write(self, data: bytes) -> None:
        assert not self.is_closed
        self.written.append(data)

    def close(self) -> None:
        self.is_closed = True


def _written(steps: list[list[tuple[int, bytes]]], *, close: bool = False) -> list[bytes]:
    """The writes of a channel that sends the frames of a step in one turn of the loop."""

    async def scenario() -> list[bytes]:
        channel = FrontendChannel(lambda kind, payload: None, lambda: None)
        transport = Transport()
        channel.connection_made(transport)
        for frames in steps:
            for kind, payload in frames:
                channel.send(kind, payload)
            if not close:
                await asyncio.sleep(0)
        channel.close()
        return transport.written

    return asyncio.run(scenario())


def test_what_is_sent_in_one_turn_leaves_in_one_write_and_in_order() -> None:
    turns = [
        [(FrameKind.ADD, b"one"), (FrameKind.ADD, b"two"), (FrameKind.ABORT, b"aaaa")],
        [(FrameKind.ADD, b"three")],
    ]
    assert _written(turns) == [b"".join(frame(*sent) for sent in turn) for turn in turns]


def test_a_long_frame_waits_for_no_turn_and_overtakes_nothing() -> None:
    short, long, after = (FrameKind.ADD, b"a"), (FrameKind.ADD, bytes(4000)), (FrameKind.ABORT, b"")
    writes = _written([[short, long, after]])
    assert writes == [frame(*short) + frame(*long), frame(*after)]


def test_closing_loses_no_frame() -> None:
    assert _written([[(FrameKind.ABORT, b"abcd")]], close=True) == [frame(FrameKind.ABORT, b"abcd")]


def test_random_frames_arrive_in_the_order_they_were_sent() -> None:
    generator = random.Random(3)
    turns = [
        [
            (generator.choice((FrameKind.ADD, FrameKind.ABORT)), generator.randbytes(size))
            for size in (generator.choice((0, 4, 120, 2500)) for _ in range(generator.randrange(9)))
        ]
        for _ in range(50)
    ]
    frames = FrameReader().feed(b"".join(_written(turns)))
    assert frames == [sent for turn in turns for sent in turn]
