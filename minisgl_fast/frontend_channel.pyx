"""FrontendChannel: a frontend's end of the socketpair to its engine, on the event loop.

What is sent in one turn of the loop leaves in one write at the turn's end: a write costs several
times what a short frame does, and wakes the engine. Long frames do not wait: the engine can begin
with them while the turn goes on.

Rules: frames leave in the order they were sent; the death of the engine is end-of-file, and what is
sent after it is dropped (``on_close`` has told).
"""

import asyncio
import os
import socket

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_GET_SIZE
from libc.stdint cimport uint8_t, uint32_t
from libcpp.string cimport string

from minisgl_fast.frames cimport FrameReader
from minisgl_fast.server.string_bytes cimport to_bytes

from minisgl_fast.wire import frame

cdef enum:
    # So much is not kept waiting for the end of the turn.
    GATHERED_BYTES = 2048


cdef class FrontendChannel:
    """An asyncio.Protocol in all but its base.

    ``on_frame(kind, payload)`` is called for every frame, ``on_close()`` once at the engine's end.
    """

    cdef object _on_frame
    cdef object _on_close
    cdef object _transport
    cdef object _loop
    cdef FrameReader _reader
    cdef string _gathered
    cdef bint _flush_is_due

    def __init__(self, on_frame, on_close):
        self._on_frame = on_frame
        self._on_close = on_close
        self._reader = FrameReader()

    # What the transport calls.

    def connection_made(self, transport):
        self._transport = transport
        self._loop = asyncio.get_running_loop()

    def data_received(self, bytes data not None):
        for kind, payload in self._reader.feed(data):
            self._on_frame(kind, payload)

    def eof_received(self):
        return False  # the transport closes itself

    def connection_lost(self, error):
        self._transport = None
        self._gathered.clear()
        self._on_close()

    def pause_writing(self):
        """The engine does not read: what is sent meanwhile waits in the transport."""

    def resume_writing(self):
        """The engine reads again."""

    # What the frontend calls.

    def send(self, uint8_t kind, bytes payload not None):
        """Send one frame, at the end of this turn of the loop at the latest."""
        if self._transport is None:
            return
        cdef size_t size = <size_t>PyBytes_GET_SIZE(payload)
        cdef uint32_t length = <uint32_t>size + 1
        self._gathered.append(<const char *>&length, sizeof(length))
        self._gathered.append(<const char *>&kind, sizeof(kind))
        self._gathered.append(<const char *>PyBytes_AS_STRING(payload), size)
        if self._gathered.size() >= GATHERED_BYTES:
            self.flush()
        elif not self._flush_is_due:
            self._flush_is_due = True
            self._loop.call_soon(self._flush_due)

    def send_socket(self, uint8_t kind, sock):
        """Send a frame with a socket for the other end; False where that cannot be done now."""
        self.flush()
        if self._transport is None or self._transport.get_write_buffer_size():
            return False  # it would come in the middle of a frame
        descriptor = self._transport.get_extra_info("socket").fileno()
        with socket.socket(fileno=os.dup(descriptor)) as channel:
            try:
                socket.send_fds(channel, [frame(kind, b"")], [sock.fileno()])
            except OSError:
                return False
        return True

    def flush(self):
        """Write what has been gathered."""
        if self._gathered.size() and self._transport is not None:
            data = to_bytes(self._gathered)
            self._gathered.clear()
            self._transport.write(data)

    def _flush_due(self):
        self._flush_is_due = False
        self.flush()

    def close(self):
        """Close this end once everything is written."""
        self.flush()
        if self._transport is not None:
            self._transport.close()
