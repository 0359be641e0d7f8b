"""C view of the two classes of stream.pyx, for the server's token loop."""

from libc.stdint cimport int32_t, int64_t, uint8_t, uint32_t
from libcpp.string cimport string
from libcpp.vector cimport vector

from minisgl_fast.text.stop_regex cimport StopRegex


cdef struct StopString:
    string text
    vector[uint32_t] fallback  # fallback[k]: longest proper border of text[:k + 1]
    uint32_t matched           # bytes of text that the output ends with now


cdef class TokenTable:
    """The bytes of every token id, and which ids are special; immutable."""
    cdef string data
    cdef vector[uint32_t] starts   # num_tokens + 1 offsets into data
    cdef vector[uint8_t] special   # 1 for special tokens
    cdef readonly int32_t num_tokens
    cdef readonly int32_t max_token_bytes


cdef class TextStream:
    """The text of one generation; see stream.pyx."""
    cdef TokenTable table
    cdef object window             # decodes where bytes do not simply concatenate, or None
    cdef string pending            # bytes not taken yet; the last num_held may start a stop string
    cdef size_t num_held
    cdef vector[StopString] stops
    cdef StopRegex regex           # looks for patterns, or None
    cdef uint8_t starts_stop[256]  # 1 for bytes that a stop string begins with
    cdef bint matching             # some stop string has begun
    cdef int32_t num_unstoppable   # so many more tokens are not looked at for stop strings
    cdef bint skip_special
    cdef bint include_stop
    cdef readonly bint finished
    cdef readonly int64_t num_taken  # bytes that left pending, as they came
    cdef readonly int32_t matched  # index of the stop that ended the text, or -1

    cpdef TextStream fresh(self)
    cdef bint push(self, int32_t token) except -1
    cdef void push_bytes(self, const char *data, size_t size) noexcept nogil
    cdef void _push_some(self, const char *data, size_t size) noexcept
    cdef void _push_matching(self, const char *data, size_t size) noexcept
    cdef void drain(self, string &out, bint json) noexcept nogil
    cdef bint _match(self, uint8_t byte) noexcept nogil
    cdef int _push_text(self, str text) except -1
    cdef bytes _take(self, bint json)
