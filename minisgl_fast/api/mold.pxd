"""C view of molds; see mold.pyx."""

from libcpp.string cimport string
from libcpp.vector cimport vector

cdef enum Gap:
    REQUEST_ID  # of the request, where the answer's id is made of it
    CREATED     # seconds since 1970
    TEXT        # JSON-escaped
    END         # the keys that say what ended a choice
    USAGE
    NUM_GAPS


cdef class Mold:
    """Bytes that are the same for many answers, with gaps for what is not."""
    cdef string first
    cdef vector[Gap] gaps
    cdef vector[string] behind  # what follows each of the gaps

    cdef void fill(self, const vector[string] &values, string &out) noexcept
