"""HeadCache: request heads that came before are not parsed again.

A client sends the same head with every request, but for the length of the body. So a parsed head is
kept under its bytes without that number, and an equal one becomes a request of its own at once.

Rules: only what ``parse_head`` accepted is kept, and only if the number was all that it made of the
Content-Length line; heads with a request id are each their own, and too many or too long ones are
not worth their memory.
"""

import re

from minisgl_fast.server.http_request cimport HttpRequest

from minisgl_fast.server.http_rules import parse_head

MAX_HEADS = 512
MAX_HEAD_BYTES = 2048
_LENGTH = re.compile(rb"\r\ncontent-length: ([1-9][0-9]{0,8})\r\n", re.IGNORECASE)


cdef class Known:
    """What one head says, but for the length."""

    cdef str method
    cdef str path
    cdef str query
    cdef dict headers
    cdef bint http_1_0
    cdef bint keep_alive
    cdef bint expects_continue

    def __init__(self, HttpRequest request not None):
        self.method = request.method
        self.path = request.path
        self.query = request.query
        self.headers = request.headers.copy()
        self.http_1_0 = request.http_1_0
        self.keep_alive = request.keep_alive
        self.expects_continue = request.expects_continue

    cdef HttpRequest request(self, Py_ssize_t length):
        """A request of its own."""
        cdef dict headers = self.headers.copy()
        if length:
            headers[b"content-length"] = b"%d" % length
        cdef HttpRequest request = HttpRequest(self.method, self.path, self.query, headers)
        request.http_1_0 = self.http_1_0
        request.keep_alive = self.keep_alive
        request.content_length = length
        request.expects_continue = self.expects_continue
        return request


cdef class HeadCache:
    """Parses heads for all connections of a server."""

    cdef object _limits
    cdef dict _known  # by the head, in two parts around its length

    def __init__(self, limits):
        self._limits = limits
        self._known = {}

    def __len__(self):
        return len(self._known)

    cpdef HttpRequest parse(self, bytes head):
        """``parse_head``, and its errors."""
        cdef Known known
        cdef HttpRequest request
        cdef Py_ssize_t length = 0
        cdef Py_ssize_t start, end
        key = head
        found = _LENGTH.search(head)
        if found is not None:
            start, end = found.span(1)
            length = int(head[start:end])
            key = head[:start], head[end:]
        known = self._known.get(key)
        if known is not None:
            return known.request(length)
        request = parse_head(head, self._limits)
        if (
            request.content_length == length
            and len(head) <= MAX_HEAD_BYTES
            and b"x-request-id" not in request.headers
        ):
            if len(self._known) >= MAX_HEADS:
                self._known.clear()
            self._known[key] = Known(request)
        return request
