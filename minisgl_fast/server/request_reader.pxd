"""C view of what takes a connection's bytes apart; see request_reader.pyx."""

from minisgl_fast.server.head_cache cimport Known
from minisgl_fast.server.http_request cimport HttpRequest
from minisgl_fast.server.http_state cimport HttpState


cdef class RequestReader:
    cdef bytes input                  # bytes that arrived and belong to nothing yet
    cdef HttpRequest request          # its body is being read
    cdef object refusal               # what to answer the last request with, or None
    cdef double deadline              # when more must have come, once a request has begun
    cdef bint wants_continue          # the client waits for a 100 before it sends the body

    cdef HttpState _server
    cdef Known _known                 # what the last head was, if the server remembers it
    cdef Py_ssize_t _scanned          # how much input has been searched for the end of a head
    cdef object _body                 # bytes, bytearray or ChunkedBody
    cdef Py_ssize_t _num_received     # bytes of this body, framing included
    cdef double _body_start_time

    cdef HttpRequest read(self)
    cdef HttpRequest give_up(self)
    cdef int clear(self) except -1
    cdef HttpRequest _read_head(self)
    cdef HttpRequest _parse_head(self, bytes data, Py_ssize_t *end)
    cdef int _judge(self, HttpRequest request) except -1
    cdef int _start_body(self, HttpRequest request) except -1
    cdef HttpRequest _read_body(self)
    cdef int _release_body(self) except -1


cdef RequestReader start_reader(HttpState server)
