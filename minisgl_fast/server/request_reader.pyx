"""RequestReader: takes the bytes that come on one connection apart into requests.

It reads a head (no ``request`` then), has the server judge it, and reads its body (``request``
is set), one request at a time: ``read`` is called again once that one is answered.

Rules:
- A head that came before is known by its bytes (head_cache.pyx), and judged once.
- A request that is refused keeps the connection usable, if its body is small enough to be read to
  its end; what breaks the framing raises the error to answer with, and nothing is read after it.
- The bytes of bodies under way count for the server until a handler has them.
"""

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE

from minisgl_fast.server.head_cache cimport Known
from minisgl_fast.server.http_request cimport HttpRequest
from minisgl_fast.server.http_state cimport HttpState

from minisgl_fast.errors import OverloadedError
from minisgl_fast.server.http_rules import (
    ChunkedBody,
    body_too_large,
    check_partial_head,
    unread_request,
)

cdef extern from "<string.h>" nogil:
    void *memmem(const void *where, size_t size, const void *what, size_t what_size)

cdef enum:
    # A refused body up to this size is read to its end, so that the connection stays usable.
    MAX_DROPPED_BODY = 64 * 1024


cdef class RequestReader:

    cdef HttpRequest read(self):
        """The next request, its body with it; None until more bytes have come.

        ``refusal`` is what it must be answered with instead of being handled. Raises MinisglError
        where nothing can be read any further.
        """
        cdef HttpRequest request
        if self.request is None:
            request = self._read_head()
            if request is not None:
                return request
        if self.request is not None and self.input:
            return self._read_body()
        return None

    cdef HttpRequest give_up(self):
        """Read no further: what stands for the request that was being read."""
        cdef HttpRequest request = self.request or unread_request(self.input)
        self.clear()
        return request

    cdef int clear(self) except -1:
        """Forget all that came and was not returned."""
        self.input = b""
        self.request = None
        self.refusal = None
        self._release_body()
        return 0

    cdef HttpRequest _read_head(self):
        """Parse one head from the input. A request that came whole is returned at once."""
        cdef HttpState server = self._server
        cdef HttpRequest request
        cdef Py_ssize_t end, left, length
        cdef bytes data = self.input
        cdef bytes body
        if not self._scanned and PyBytes_AS_STRING(data)[0] <= c"\r":
            data = self.input = data.lstrip(b"\r\n")  # RFC 9112 2.2: empty lines before a request
            if not data:
                return None
        request = self._parse_head(data, &end)
        if request is None:
            return None
        self.request = request
        self._judge(request)
        length = request.content_length
        if self.refusal is None and length > server.max_body:  # rule 5
            raise body_too_large(server.limits)
        left = PyBytes_GET_SIZE(data) - end
        body = PyBytes_FromStringAndSize(PyBytes_AS_STRING(data) + end, left) if left else b""
        if length == 0:
            self.input = body
            self.request = None
            return request
        if (  # as most requests come
            length == left
            and self.refusal is None
            and server.num_buffered_body_bytes <= server.max_buffered_bodies
        ):
            self.input = b""
            self.request = None
            request.body = body
            return request
        self.input = body
        self._start_body(request)
        return None

    cdef HttpRequest _parse_head(self, bytes data, Py_ssize_t *end):
        """A request of the head at the start of ``data``, and where that ends; None: not whole."""
        cdef const char *start = PyBytes_AS_STRING(data)
        cdef Py_ssize_t size = PyBytes_GET_SIZE(data)
        cdef Py_ssize_t length, skipped
        cdef HttpRequest request
        cdef const char *found
        if self._known is not None:
            end[0] = self._known.match(start, size, &length)
            if end[0]:
                self._scanned = 0
                return self._known.request(length)
        skipped = max(self._scanned - 3, 0)
        found = <const char *>memmem(start + skipped, <size_t>(size - skipped), b"\r\n\r\n", 4)
        if found == NULL:
            check_partial_head(data, self._server.limits)
            if not self._scanned:
                self.deadline = self._server.now() + self._server.limits.header_timeout_s
            self._scanned = size
            return None
        self._scanned = 0
        end[0] = found - start + 4
        request = self._server.heads.parse(data[:end[0]])
        self._known = self._server.heads.last
        return request

    cdef int _judge(self, HttpRequest request) except -1:
        """Whether the request is let in: a head that was let in before is not judged anew."""
        cdef HttpState server = self._server
        cdef Known known = self._known
        if known is not None and known.is_admitted and not server.draining:
            request.is_admin = known.is_admin
            request.extra_head = known.extra_head
            self.refusal = None
            return 0
        self.refusal = server.refusal(request)
        if self.refusal is None and known is not None:
            known.is_admitted = True
            known.is_admin = request.is_admin
            known.extra_head = request.extra_head
        return 0

    cdef int _start_body(self, HttpRequest request) except -1:
        cdef HttpState server = self._server
        if server.num_buffered_body_bytes > server.max_buffered_bodies:
            self.refusal = self.refusal or OverloadedError("Too many request bodies under way.")
        if self.refusal is not None and (
            request.expects_continue or not 0 < request.content_length <= MAX_DROPPED_BODY
        ):
            raise self.refusal
        self.wants_continue = request.expects_continue and not self.input
        self._body = ChunkedBody(server.limits) if request.content_length < 0 else b""
        self._body_start_time = server.now()
        self.deadline = self._body_start_time + server.limits.body_timeout_s
        return 0

    cdef HttpRequest _read_body(self):
        """Move input into the body; the request, once it is complete."""
        cdef HttpRequest request = self.request
        cdef bint complete
        cdef Py_ssize_t taken, missing
        cdef bytes data = self.input
        body = self._body
        if isinstance(body, ChunkedBody):
            complete, taken = body.feed(data)
            self.input = data[taken:]
        else:
            missing = request.content_length - self._num_received
            piece = data[:missing]
            taken = len(piece)
            complete = taken == missing
            self.input = data[missing:]
            if not body:
                self._body = piece
            else:
                if isinstance(body, bytes):
                    body = self._body = bytearray(body)
                body += piece
        self._num_received += taken
        self._server.num_buffered_body_bytes += taken
        if complete:
            body = self._body
            if isinstance(body, ChunkedBody):
                body = body.data
            request.body = bytes(body)
            self.request = None
            self._release_body()
            return request
        limits = self._server.limits
        self.deadline = limits.body_timeout_s + min(
            self._server.now(), self._body_start_time + self._num_received / limits.min_body_rate
        )
        return None

    cdef int _release_body(self) except -1:
        self._server.num_buffered_body_bytes -= self._num_received
        self._num_received = 0
        if isinstance(self._body, ChunkedBody):
            self._body.close()
        self._body = b""
        return 0


cdef RequestReader start_reader(HttpState server):
    """The reader of a new connection."""
    cdef RequestReader reader = RequestReader.__new__(RequestReader)
    reader._server = server
    reader.input = b""
    reader._body = b""
    return reader
