"""C view of an answer; see exchange.pyx."""

from libcpp.string cimport string

from minisgl_fast.server.http_request cimport HttpRequest
from minisgl_fast.server.http_state cimport HttpState


cdef class Carrier:
    """What carries an answer to its client: a connection, as its exchange knows it."""
    cdef readonly HttpState server

    cdef int send(self, bytes data) except -1
    cdef int descriptor(self) except? -1
    cdef int check_backlog(self) except -1
    cdef int exchange_done(self, bint keep_alive) except -1
    cdef int cut(self) except -1


cdef class Exchange:
    cdef readonly Carrier _connection
    cdef int _state
    cdef bint _chunked
    cdef bint _bodiless
    cdef bint _keep_alive
    cdef bytes _unsent_head
    cdef readonly HttpRequest request
    cdef public object on_disconnect
    cdef public object on_resume
    cdef public bint paused
    cdef public object names
    cdef readonly int status

    cdef bint _may(self, int expected) except -1
    cdef int _append_head(
        self, string &out, int status, const string &framing, headers
    ) except -1


cdef Exchange start_exchange(Carrier connection, HttpRequest request)
