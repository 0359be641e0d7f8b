"""FrameReader: the frames of wire.pyx out of a byte stream, however it is cut.

Rules: a frame is never split or merged for its reader. One longer than ``MAX_FRAME_BYTES`` means
that the stream is out of step, and ends the channel.
"""

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from libc.stdint cimport uint8_t, uint32_t
from libc.string cimport memcpy

from minisgl_fast.errors import EngineError

cdef enum:
    LENGTH_BYTES = 4
    HEADER_BYTES = 5
    # The longest real frame is an ADD at 4 bytes a prompt token: room for 64 million tokens.
    MAX_LENGTH = 1 << 28
    # What a long frame has left behind beyond this is given back.
    KEPT_CAPACITY = 1 << 20

MAX_FRAME_BYTES = MAX_LENGTH


cdef class FrameReader:

    cpdef list feed(self, bytes data):
        """The (kind, payload) of every frame that ``data`` completes."""
        cdef list frames = []
        cdef const char *start = PyBytes_AS_STRING(data)
        cdef size_t size = <size_t>PyBytes_GET_SIZE(data)
        cdef size_t taken
        if self.unfinished.empty():
            taken = self._cut(start, size, frames)
            self.unfinished.append(start + taken, size - taken)
            return frames
        self.unfinished.append(start, size)
        taken = self._cut(self.unfinished.data(), self.unfinished.size(), frames)
        if taken:
            self.unfinished.erase(0, taken)
            if self.unfinished.capacity() > KEPT_CAPACITY:
                self.unfinished.shrink_to_fit()
        return frames

    cdef size_t _cut(self, const char *data, size_t size, list frames) except? 0:
        """Append the whole frames in ``data``; how many bytes they are."""
        cdef size_t start = 0
        cdef uint32_t length
        while size - start >= HEADER_BYTES:
            memcpy(&length, data + start, LENGTH_BYTES)
            if not 0 < length <= MAX_LENGTH:
                raise EngineError(f"A frame of {length} bytes arrived: the channel is out of step.")
            if size - start < LENGTH_BYTES + length:
                break
            payload = PyBytes_FromStringAndSize(
                data + start + HEADER_BYTES, <Py_ssize_t>length - 1
            )
            frames.append((<uint8_t>data[start + LENGTH_BYTES], payload))
            start += LENGTH_BYTES + length
        return start
