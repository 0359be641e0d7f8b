"""C view of the ring; see ring.pyx."""

from libc.stdint cimport int32_t
from libcpp.vector cimport vector


cdef struct Send:
    int descriptor
    const char *data
    size_t size
    int32_t result      # the bytes sent, or minus an errno


cdef class SendRing:
    """Many ``send(2)`` as one system call."""
    cdef bint is_open
    cdef void *_ring

    cdef void send(self, vector[Send] &sends) noexcept nogil
