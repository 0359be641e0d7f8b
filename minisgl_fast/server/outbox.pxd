"""C view of the outbox; see outbox.pyx."""

from libcpp.string cimport string
from libcpp.vector cimport vector

from minisgl_fast.server.ring cimport Send, SendRing


cdef struct Chunk:
    void *owner      # whose it is, for the caller
    int descriptor
    size_t start     # in ``data``
    size_t size
    size_t num_sent


cdef class Outbox:
    """HTTP chunks that wait for one ``send``, and the sockets they go to."""
    cdef string data              # append events here between begin and end
    cdef vector[Chunk] chunks
    cdef vector[Send] sends
    cdef SendRing ring

    cdef void begin(self) noexcept
    cdef void end(self, int descriptor, void *owner) noexcept
    cdef void send(self) noexcept
    cdef bytes rest(self, size_t index)
    cdef void clear(self) noexcept
