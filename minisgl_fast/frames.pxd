"""C view of the frame reader; see frames.pyx."""

from libcpp.string cimport string


cdef class FrameReader:
    """Cuts a byte stream into frames."""
    cdef string unfinished   # the first part of a frame

    cpdef list feed(self, bytes data)
    cdef size_t _cut(self, const char *data, size_t size, list frames) except? 0
