"""Both ends of the AF_UNIX stream socketpair between a frontend and the engine.

Rules: a frame is never split or merged for its reader; ``send`` never blocks, what the socket does
not take is kept and sent later; the death of a peer is end-of-file. A frame longer than
``MAX_FRAME_BYTES`` means that the stream is out of step, and ends the channel.
"""

from __future__ import annotations

import asyncio
import os
import select
import socket
import struct
from collections.abc import Callable, Iterable

from minisgl_fast.errors import EngineError
from minisgl_fast.wire import FRAME_HEADER_BYTES, frame

# The longest real frame is an ADD at 4 bytes a prompt token: room for 64 million tokens.
MAX_FRAME_BYTES = 1 << 28
RECEIVE_BYTES = 1 << 20
MAX_SOCKETS = 8  # that come in one read
_HEADER = struct.Struct("<IB")


class FrameReader:
    """Cuts a byte stream into frames."""

    __slots__ = ("_unfinished",)

    def __init__(self) -> None:
        self._unfinished = bytearray()  # the first part of a frame

    def feed(self, data: bytes) -> list[tuple[int, bytes]]:
        """The (kind, payload) of every frame that ``data`` completes."""
        unfinished = self._unfinished
        if unfinished:
            unfinished += data
            if not _is_whole(unfinished):
                return []
            data = bytes(unfinished)
            unfinished.clear()
        frames = []
        start = 0
        size = len(data)
        while size - start >= FRAME_HEADER_BYTES:
            length, kind = _HEADER.unpack_from(data, start)
            if not 0 < length <= MAX_FRAME_BYTES:
                raise EngineError(f"A frame of {length} bytes arrived: the channel is out of step.")
            end = start + 4 + length
            if size < end:
                break
            frames.append((kind, data[start + FRAME_HEADER_BYTES : end]))
            start = end
        if start < size:
            unfinished += data[start:]
        return frames


def _is_whole(data: bytearray) -> bool:
    """Whether there is a frame in it, or something that cannot become one."""
    if len(data) < FRAME_HEADER_BYTES:
        return False
    length = _HEADER.unpack_from(data)[0]
    return len(data) >= 4 + length or not 0 < length <= MAX_FRAME_BYTES


class EngineChannel:
    """The engine's end: read when asked, write without blocking."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self._sock = sock
        self._reader = FrameReader()
        self._unsent = bytearray()
        self._sockets: list[socket.socket] = []
        self.closed = False

    def fileno(self) -> int:
        return self._sock.fileno()

    @property
    def has_unsent(self) -> bool:
        return bool(self._unsent)

    def receive(self) -> list[tuple[int, bytes]]:
        """Every whole frame that has arrived; sets ``closed`` at end-of-file."""
        frames: list[tuple[int, bytes]] = []
        while True:
            try:
                data, descriptors, _, _ = socket.recv_fds(self._sock, RECEIVE_BYTES, MAX_SOCKETS)
            except BlockingIOError:
                return frames
            except ConnectionError:
                data, descriptors = b"", []
            self._sockets += [socket.socket(fileno=descriptor) for descriptor in descriptors]
            if not data:
                self.closed = True
                return frames
            frames += self._reader.feed(data)
            if len(data) < RECEIVE_BYTES:
                return frames

    def take_sockets(self) -> list[socket.socket]:
        """The sockets that came with JOIN frames."""
        sockets, self._sockets = self._sockets, []
        return sockets

    def send(self, kind: int, payload: bytes) -> None:
        """Queue a frame and send what the socket takes."""
        self._unsent += frame(kind, payload)
        self.flush()

    def flush(self) -> None:
        """Send what is still queued, as far as the socket takes it."""
        try:
            while self._unsent:
                num_sent = self._sock.send(self._unsent)
                del self._unsent[:num_sent]
        except BlockingIOError:
            return
        except ConnectionError:
            self.closed = True
            self._unsent.clear()

    def close(self) -> None:
        self._sock.close()
        self.closed = True


def wait_for_any(channels: Iterable[EngineChannel], timeout_s: float | None) -> None:
    """Sleep until a channel can be read, or written where it has unsent bytes, or is closed."""
    readable = list(channels)
    if not any(channel.closed for channel in readable):
        writable = [channel for channel in readable if channel.has_unsent]
        select.select(readable, writable, [], timeout_s)


class FrontendChannel(asyncio.Protocol):
    """A frontend's end on its event loop.

    ``on_frame(kind, payload)`` is called for every frame, ``on_close()`` once at the engine's end.
    """

    def __init__(
        self, on_frame: Callable[[int, bytes], None], on_close: Callable[[], None]
    ) -> None:
        self._on_frame = on_frame
        self._on_close = on_close
        self._reader = FrameReader()
        self._transport: asyncio.WriteTransport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport  # type: ignore[assignment]

    def data_received(self, data: bytes) -> None:
        for kind, payload in self._reader.feed(data):
            self._on_frame(kind, payload)

    def connection_lost(self, error: Exception | None) -> None:
        self._transport = None
        self._on_close()

    def send(self, kind: int, payload: bytes) -> None:
        """Send one frame; silently dropped when the engine is gone (``on_close`` has told)."""
        if self._transport is not None:
            self._transport.write(frame(kind, payload))

    def send_socket(self, kind: int, sock: socket.socket) -> bool:
        """Send a frame with a socket for the other end; False where that cannot be done now."""
        if self._transport is None or self._transport.get_write_buffer_size():
            return False  # it would come in the middle of a frame
        descriptor = self._transport.get_extra_info("socket").fileno()
        with socket.socket(fileno=os.dup(descriptor)) as channel:
            try:
                socket.send_fds(channel, [frame(kind, b"")], [sock.fileno()])
            except OSError:
                return False
        return True

    def close(self) -> None:
        if self._transport is not None:
            self._transport.close()
