"""Exchange: the one answer to one request, and the bytes that it becomes.

Life:   waiting --respond/fail--> done
        waiting --start_stream--> streaming --write*--> --finish--> done
        waiting or streaming --client gone, stalled, or abort()--> closed

Rules: exactly one answer per exchange; an error answer always has a Content-Length; every call on a
closed exchange is a silent no-op (the client may go at any moment), while a call that is out of
order on a live one raises RuntimeError (a bug of ours). No byte of a request is put into an
answer's head except a checked request id. The token loop sends most chunks of a stream by itself,
past ``write``, on the socket that ``descriptor`` names.
"""

from collections.abc import Sequence
from http import HTTPStatus

cimport cython
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from cpython.unicode cimport PyUnicode_AsUTF8AndSize
from libc.string cimport memcpy
from libcpp.string cimport string, to_string

from minisgl_fast.server.http_request cimport HttpRequest
from minisgl_fast.server.http_state cimport HttpState
from minisgl_fast.server.string_bytes cimport append, to_bytes

from minisgl_fast.server.error_shapes import name_request, shaped_error
from minisgl_fast.server.errors_json import error_headers

JSON = b"application/json"
EVENT_STREAM = b"text/event-stream; charset=utf-8"

cdef dict _STATUS_LINES = {
    status.value: b"HTTP/1.1 %d %b\r\n" % (status.value, status.phrase.encode("ascii"))
    for status in HTTPStatus
}
# Most events are a few hundred bytes.
cdef list _CHUNK_HEADS = [b"%x\r\n" % size for size in range(4096)]

Headers = Sequence[tuple[bytes, bytes]]

cdef enum:
    HEAD_ROOM = 256  # most heads are shorter

cdef enum:
    WAITING
    STREAMING
    DONE
    CLOSED


cdef class Carrier:

    cdef int send(self, bytes data) except -1:
        """Send bytes of an answer behind those before."""
        raise TypeError("a Carrier must have send")

    cdef int descriptor(self) except? -1:
        """The socket that plain bytes may be sent on while nothing waits unsent, or -1."""
        return -1

    cdef int check_backlog(self) except -1:
        """Too much may wait for a client that does not read: cut it off then."""
        return 0

    cdef int exchange_done(self, bint keep_alive) except -1:
        """The answer is complete."""
        raise TypeError("a Carrier must have exchange_done")

    cdef int cut(self) except -1:
        """The answer will never be complete."""
        raise TypeError("a Carrier must have cut")


@cython.freelist(64)
cdef class Exchange:
    """One response under way. Made by the connection, used by a handler and what it hands it to.

    paused         the client does not read: keep the text and write nothing until ``on_resume``
    on_disconnect  called once, at once, when the client is gone (or was cut off for stalling)
                   before the answer is complete; the exchange is closed by then
    on_resume      called when ``paused`` went back to False
    request        the request answered; set ``request.body`` to b"" once it is parsed
    names          what the client calls the request in its body, for a handler that aborts it
    status         the status that was answered, 0 before
    """

    @property
    def started(self):
        """Whether a status has been sent; from then on an error can only go into the stream."""
        return self.status != 0

    @property
    def closed(self):
        """Whether the client is gone; nothing that is written reaches anybody."""
        return self._state == CLOSED

    @property
    def done(self):
        """Whether the answer is complete."""
        return self._state == DONE

    def respond(
        self, int status, bytes body not None, bytes content_type not None=JSON, headers=()
    ):
        """Answer in one piece. For HEAD the body is left out, its length is not."""
        if not self._may(WAITING):
            return
        cdef string head
        cdef string framing
        cdef bytes data
        cdef bint has_body = status != 204 and status != 304
        if has_body:
            framing.reserve(HEAD_ROOM // 2)
            framing.append(b"content-type: ")
            append(framing, content_type)
            framing.append(b"\r\ncontent-length: ")
            framing.append(to_string(PyBytes_GET_SIZE(body)))
            framing.append(b"\r\n")
        self._append_head(head, status, framing, headers)
        data = joined(head, body) if has_body and not self._bodiless else to_bytes(head)
        self._state = DONE
        self.status = status
        self._connection.send(data)
        self._connection.exchange_done(self._keep_alive)

    def fail(self, error, headers=()):
        """Answer with an error; where a stream has begun already, cut the connection instead.

        A session that can say the error inside its stream does that and ends with ``finish``.
        """
        if self._state == STREAMING:
            self.abort()
            return
        name_request(self.request)
        body = shaped_error(error, self.request.request_id, self.request.path)
        self.respond(error.http_status, body, JSON, (*error_headers(error), *headers))

    def start_stream(self, bytes content_type not None=EVENT_STREAM, headers=()):
        """Begin a 200 answer whose body follows in pieces, with chunked framing.

        The head leaves together with the first ``write``, or ``finish``. An HTTP/1.0 client gets no
        framing: its stream ends with the connection.
        """
        if not self._may(WAITING):
            return
        cdef string head
        cdef string framing = b"content-type: %b\r\ncache-control: no-cache\r\n" % content_type
        if self._chunked:
            framing.append(b"transfer-encoding: chunked\r\n")
        else:
            self._keep_alive = False
        self._append_head(head, 200, framing, headers)
        self._unsent_head = to_bytes(head)
        self._state = STREAMING
        self.status = 200

    def write(self, bytes chunk not None):
        """Send joined events as one HTTP chunk.

        Writing on while ``paused`` is allowed up to ``max_write_backlog``; over it the client is
        cut off, and ``on_disconnect`` is called from inside this call.
        """
        if self._state != STREAMING and not self._may(STREAMING):
            return
        cdef Py_ssize_t size = len(chunk)
        if not size or self._bodiless:
            return
        if self._chunked:
            head = _CHUNK_HEADS[size] if size < 4096 else b"%x\r\n" % size
            chunk = b"".join((self._unsent_head, head, chunk, b"\r\n"))
        else:
            chunk = self._unsent_head + chunk
        self._unsent_head = b""
        self._connection.send(chunk)
        if self.paused:
            self._connection.check_backlog()

    def descriptor(self):
        """The socket of a chunked stream, for a token loop that frames and sends its own chunks.

        -1 where that cannot be: then ``write`` is the way. Whoever sends on it does so only while
        everything before has left: nothing while ``paused``, and nothing after ``on_disconnect``
        or ``finish``. What the socket does not take goes to ``write_rest``.
        """
        if self._state != STREAMING or not self._chunked or self._bodiless:
            return -1
        return self._connection.descriptor()

    def write_rest(self, bytes data not None):
        """Send what is left of a chunk that was begun on the socket itself."""
        if self._may(STREAMING):
            self._connection.send(data)

    def finish(self, bytes last not None=b"", *, bint close=False):
        """Send the last events and the end of the body in one write.

        ``close``: end the connection too, as after an error that some clients would wait behind.
        """
        if not self._may(STREAMING):
            return
        if close:
            self._keep_alive = False
        self._state = DONE
        if self._bodiless:
            data = b""
        elif not self._chunked:
            data = last
        elif last:
            data = b"%x\r\n%b\r\n0\r\n\r\n" % (len(last), last)
        else:
            data = b"0\r\n\r\n"
        if data or self._unsent_head:
            self._connection.send(self._unsent_head + data)
        self._connection.exchange_done(self._keep_alive)

    def abort(self):
        """Drop the connection at once, unsent bytes included; ``on_disconnect`` is not called."""
        if self._state in (WAITING, STREAMING):
            self._state = CLOSED
            self._connection.cut()

    def client_gone(self):
        """For the connection: close the exchange and tell its owner."""
        if self._state in (WAITING, STREAMING):
            self._state = CLOSED
            if self.on_disconnect is not None:
                self.on_disconnect()

    cdef bint _may(self, int expected) except -1:
        """Whether a call that belongs to this state has effect; RuntimeError if it is a bug."""
        if self._state == expected:
            return True
        if self._state == CLOSED:
            return False
        names = ("waiting", "streaming", "done")
        raise RuntimeError(
            f"the exchange is {names[self._state]}, this call needs it {names[expected]}"
        )

    cdef int _append_head(
        self, string &out, int status, const string &framing, headers
    ) except -1:
        """The status line and header fields up to and with the empty line."""
        cdef HttpRequest request = self.request
        cdef HttpState server = self._connection.server
        cdef Py_ssize_t size
        cdef const char *request_id = PyUnicode_AsUTF8AndSize(request.request_id, &size)
        if server.draining:
            self._keep_alive = False
        out.reserve(HEAD_ROOM)
        append(out, _STATUS_LINES[status])
        append(out, server.date_line)
        out.append(framing)
        out.append(b"x-request-id: ")
        out.append(request_id, <size_t>size)
        out.append(b"\r\n")
        append(out, request.extra_head)
        if not self._keep_alive:
            out.append(b"connection: close\r\n")
        elif request.http_1_0:
            out.append(b"connection: keep-alive\r\n")
        for name, value in headers:
            if b"\r" in value or b"\n" in value:
                raise ValueError(f"a line end in the response field {name.decode('ascii')}")
            append(out, b"%b: %b\r\n" % (name, value))
        out.append(b"\r\n")
        return 0


cdef Exchange start_exchange(Carrier connection, HttpRequest request):
    """The exchange of a request."""
    cdef Exchange exchange = Exchange.__new__(Exchange)
    exchange._connection = connection
    exchange._state = WAITING
    exchange._chunked = not request.http_1_0
    exchange._bodiless = request.method == "HEAD"
    exchange._keep_alive = request.keep_alive
    exchange._unsent_head = b""
    exchange.request = request
    exchange.names = ()
    return exchange


cdef bytes joined(const string &head, bytes body):
    cdef Py_ssize_t head_size = <Py_ssize_t>head.size()
    cdef bytes whole = PyBytes_FromStringAndSize(NULL, head_size + PyBytes_GET_SIZE(body))
    memcpy(PyBytes_AS_STRING(whole), head.data(), head.size())
    memcpy(PyBytes_AS_STRING(whole) + head_size, PyBytes_AS_STRING(body), len(body))
    return whole
