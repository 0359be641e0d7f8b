"""The framed socketpair: frames survive every cut, nothing blocks, end-of-file is seen."""

import asyncio
import random
import socket

import pytest

from minisgl_fast.channel import (
    MAX_FRAME_BYTES,
    EngineChannel,
    FrameReader,
    FrontendChannel,
    wait_for_any,
)
from minisgl_fast.errors import EngineError
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
