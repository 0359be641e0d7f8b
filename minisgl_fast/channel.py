"""The engine's end of the AF_UNIX stream socketpair to a frontend (frontend_channel.pyx).

Rules: ``send`` never blocks, what the socket does not take is kept and sent later; the death of a
frontend is end-of-file.
"""

from __future__ import annotations

import select
import socket
from collections.abc import Iterable

from minisgl_fast.frames import FrameReader
from minisgl_fast.wire import frame

RECEIVE_BYTES = 1 << 20
MAX_SOCKETS = 8  # that come in one read


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
