"""C view of what the connections of a server share; see http_state.pyx."""

from minisgl_fast.server.head_cache cimport HeadCache


cdef class HttpState:
    cdef public object handler
    cdef public object admit
    cdef readonly object limits
    cdef readonly HeadCache heads
    cdef readonly set connections
    cdef readonly dict refusals
    cdef public Py_ssize_t num_exchanges
    cdef public Py_ssize_t num_stalled
    cdef public Py_ssize_t num_buffered_body_bytes
    cdef public bint draining
    cdef public bytes date_line
    # Of ``limits``, those that every request looks at.
    cdef Py_ssize_t max_body
    cdef Py_ssize_t max_buffered_bodies
    cdef Py_ssize_t max_pipelined
    cdef double keep_alive_timeout_s
    cdef double max_turn_s
    cdef object _loop
    cdef object _loop_time
    cdef double _turn_start     # of the first request of this turn; 0 before it
    cdef object _waiting        # connections with a request for the next turn, first come first

    cdef double now(self) except? -1
    cdef bint has_time(self) except -1
    cdef int wait_for_turn(self, object connection) except -1
