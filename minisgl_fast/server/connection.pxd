"""C view of a connection; see connection.pyx."""

from minisgl_fast.server.exchange cimport Carrier, Exchange
from minisgl_fast.server.head_cache cimport Known
from minisgl_fast.server.http_request cimport HttpRequest


cdef class HttpConnection(Carrier):
    cdef readonly Exchange exchange   # the answer under way, or None
    cdef readonly double deadline     # of the present state, by the loop's clock
    cdef readonly object _transport
    cdef bytes _input                 # bytes that arrived and belong to nothing yet
    cdef Py_ssize_t _scanned          # how much of it has been searched for the end of a head
    cdef Known _known                 # what the last head was, if the server remembers it
    cdef HttpRequest _request         # its body is being read
    cdef object _refusal              # what to answer it with once its body is read
    cdef object _body                 # bytes, bytearray or ChunkedBody
    cdef Py_ssize_t _num_received     # bytes of this body, framing included
    cdef double _body_start_time
    cdef bint _running
    cdef bint _broken
    cdef bint _closing
    cdef bint _read_paused
    cdef bint _write_paused
    cdef bint _is_waiting             # for the next turn of the loop, to take a request
    cdef int _socket                  # to send answers on past the transport, or -1

    cdef int _run(self) except -1
    cdef bint _has_turn(self) except -1
    cdef bint _read_head(self) except -1
    cdef Py_ssize_t _parse_head(self, bytes data) except -1
    cdef int _judge(self) except -1
    cdef int _start_body(self, HttpRequest request) except -1
    cdef bint _read_body(self) except -1
    cdef int _dispatch(self, bytes body) except -1
    cdef bint _is_plain(self) except -1
    cdef int _handler_failed(self, Exchange exchange, error) except -1
    cdef int _refuse(self, error) except -1
    cdef int _count_refusal(self, error) except -1
    cdef Exchange _start_exchange(self, HttpRequest request)
    cdef int _end_exchange(self) except -1
    cdef int _release_body(self) except -1
    cdef int _stalled(self) except -1
    cdef int _control_reading(self) except -1
    cdef int _close_after_answer(self) except -1
