"""HeadCache: request heads that came before are not parsed again.

A client sends the same head with every request, but for the length of the body. So a parsed head is
kept under its bytes without that number, and an equal one becomes a request of its own at once: it
is looked up here, and a connection compares its next head with its last one before that.

Rules: only what ``parse_head`` accepted is kept, and only if the number was all that it made of the
Content-Length line; heads with a request id are each their own, and too many or too long ones are
not worth their memory. How long two heads take to compare does not tell where they differ: a key
may be in them, and a proxy may send the heads of several clients on one connection.
"""

import re

from minisgl_fast.server.http_request cimport HttpRequest, known_request

from minisgl_fast.server.http_rules import parse_head

MAX_HEADS = 512
MAX_HEAD_BYTES = 2048
_LENGTH = re.compile(rb"\r\ncontent-length: ([1-9][0-9]{0,8})\r\n", re.IGNORECASE)

cdef enum:
    MAX_DIGITS = 9  # as above


cdef class Known:

    def __init__(self, HttpRequest request not None, bytes before not None, bytes after not None):
        self.method = request.method
        self.path = request.path
        self.query = request.query
        self.headers = request.headers.copy()
        if after:
            del self.headers[b"content-length"]
        self.http_1_0 = request.http_1_0
        self.keep_alive = request.keep_alive
        self.expects_continue = request.expects_continue
        self.before = before
        self.after = after

    cdef Py_ssize_t match(
        self, const char *data, Py_ssize_t size, Py_ssize_t *length
    ) noexcept nogil:
        """How many bytes at the start of ``data`` are this head, 0 if they are not; its length."""
        cdef Py_ssize_t at = <Py_ssize_t>self.before.size()
        cdef Py_ssize_t left = <Py_ssize_t>self.after.size()
        cdef Py_ssize_t start = at
        length[0] = 0
        if size < at + left or not same(data, self.before.data(), at):
            return 0
        if left:
            while at < size and at - start <= MAX_DIGITS and c"0" <= data[at] <= c"9":
                length[0] = 10 * length[0] + data[at] - c"0"
                at += 1
            if at == start or at - start > MAX_DIGITS or data[start] == c"0":
                return 0
            if size < at + left or not same(data + at, self.after.data(), left):
                return 0
        return at + left

    cdef HttpRequest request(self, Py_ssize_t length):
        """A request of its own."""
        cdef HttpRequest request = known_request(
            self.method, self.path, self.query, self.headers, length
        )
        request.http_1_0 = self.http_1_0
        request.keep_alive = self.keep_alive
        request.expects_continue = self.expects_continue
        return request


cdef class HeadCache:
    """Parses heads for all connections of a server."""

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
        self.last = None
        key = head, b""
        found = _LENGTH.search(head)
        if found is not None:
            start, end = found.span(1)
            length = int(head[start:end])
            key = head[:start], head[end:]
        known = self._known.get(key)
        if known is not None:
            self.last = known
            return known.request(length)
        request = parse_head(head, self._limits)
        if (
            request.content_length == length
            and len(head) <= MAX_HEAD_BYTES
            and b"x-request-id" not in request.headers
        ):
            if len(self._known) >= MAX_HEADS:
                self._known.clear()
            self.last = self._known[key] = Known(request, *key)
        return request


cdef inline bint same(const char *data, const char *other, Py_ssize_t size) noexcept nogil:
    """memcmp, in a time that depends on the size alone."""
    cdef char differences = 0
    cdef Py_ssize_t i
    for i in range(size):
        differences |= data[i] ^ other[i]
    return differences == 0
