"""C view of a connection; see connection.pyx."""

from minisgl_fast.server.exchange cimport Carrier, Exchange
from minisgl_fast.server.http_request cimport HttpRequest
from minisgl_fast.server.request_reader cimport RequestReader


cdef class HttpConnection(Carrier):
    cdef readonly Exchange exchange   # the answer under way, or None
    cdef readonly double deadline     # of the present state, by the loop's clock
    cdef readonly object _transport
    cdef RequestReader _reader        # of what the client sends
    cdef bint _running
    cdef bint _broken
    cdef bint _closing
    cdef bint _read_paused
    cdef bint _write_paused
    cdef bint _is_waiting             # for the next turn of the loop, to take a request
    cdef int _socket                  # to send answers on past the transport, or -1

    cdef int _run(self) except -1
    cdef int _wait_for_more(self) except -1
    cdef bint _has_turn(self) except -1
    cdef int _dispatch(self, HttpRequest request) except -1
    cdef bint _is_plain(self) except -1
    cdef int _handler_failed(self, Exchange exchange, error) except -1
    cdef int _refuse(self, error) except -1
    cdef int _count_refusal(self, error) except -1
    cdef Exchange _start_exchange(self, HttpRequest request)
    cdef int _end_exchange(self) except -1
    cdef int _stalled(self) except -1
    cdef int _control_reading(self) except -1
    cdef int _close_after_answer(self) except -1
