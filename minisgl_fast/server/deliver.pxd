"""C view of the token loop; see deliver.pyx."""

from libc.stdint cimport int32_t, int64_t, uint32_t
from libcpp.vector cimport vector

from minisgl_fast.server.histogram cimport Histogram
from minisgl_fast.server.outbox cimport Outbox
from minisgl_fast.server.response cimport Choice, Response


cdef class Dispatcher:
    """Routes the rows of STEP frames to choices; see deliver.pyx."""
    cdef readonly Histogram time_to_first_token
    cdef readonly Histogram inter_token
    cdef readonly int64_t num_generated
    cdef readonly int64_t num_cached
    cdef uint32_t next_rid
    cdef object send_abort
    cdef int32_t stream_interval
    cdef vector[void *] slots         # the open Choice with rid, at rid modulo the size; owned
    cdef size_t num_open
    cdef vector[void *] dirty         # marked Responses; owned
    cdef Outbox outbox
    cdef int32_t num_unflushed        # frames since the last flush
    cdef int32_t num_late_steps       # as MAX_LATE_STEPS says

    cdef Choice _find(self, uint32_t rid)
    cdef void _forget(self, Choice choice)
    cdef void _double_slots(self)
    cdef int _token(self, Choice choice, int32_t token, int32_t reason, double now) except -1
    cdef void _mark(self, Choice choice)
