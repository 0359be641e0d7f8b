"""HttpConnection: one client connection, its state machine and its deadlines.

Theory of operation. A connection is in one of these states, and does nothing else meanwhile:

    head      reading a request head (idle when no byte of it has come)
    body      the head was admitted, its body is being read
    exchange  a handler has the request; bytes that arrive are kept unread, at most
              ``max_pipelined`` plus one read, so requests are answered in the order they came
    closing   the last answer is written; input is dropped

Rules:
- A request that breaks the framing is answered with an error, then the connection is closed, with
  time for the client to read the answer (closing with unread input would reset the connection).
- No timer per connection or request: a state sets ``deadline`` and the server's sweep looks at it.
- While the client does not read its answers, no further request is parsed.
- ``send`` is the only place where answers leave, on the socket itself while the transport has
  nothing unsent; ``descriptor`` lets the token loop do the same. A transport closes its socket only
  after ``connection_lost``, so until then the number means no other client.
- A head is taken only while this turn of the loop has time for it (http_state.pyx).
"""

import logging

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE

from minisgl_fast.server.exchange cimport Exchange, start_exchange
from minisgl_fast.server.head_cache cimport Known
from minisgl_fast.server.http_request cimport HttpRequest
from minisgl_fast.server.http_state cimport HttpState

from minisgl_fast.errors import MinisglError, OverloadedError, RequestTimeoutError
from minisgl_fast.server.http_rules import (
    ChunkedBody,
    body_too_large,
    check_partial_head,
    unread_request,
)

log = logging.getLogger("minisgl_fast.http")

cdef extern from "<sys/socket.h>" nogil:
    ssize_t c_send "send"(int descriptor, const void *data, size_t size, int flags)
    int MSG_DONTWAIT
    int MSG_NOSIGNAL

cdef extern from "<string.h>" nogil:
    void *memmem(const void *where, size_t size, const void *what, size_t what_size)

cdef double NEVER = float("inf")
cdef bytes CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"

cdef enum:
    # A refused body up to this size is read to its end, so that the connection stays usable.
    MAX_DROPPED_BODY = 64 * 1024


cdef class HttpConnection:
    """One client connection: an asyncio.Protocol in all but its base."""

    def __init__(self, HttpState server not None):
        self.server = server
        self.deadline = NEVER
        self._socket = -1
        self._input = b""
        self._body = b""

    # What the transport calls.

    def connection_made(self, transport):
        cdef HttpState server = self.server
        self._transport = transport
        server.connections.add(self)
        if server.num_connections > server.limits.max_connections:
            self._refuse(OverloadedError("Too many connections."))
            self._transport.close()
            return
        # On a plain socket any unsent byte marks the client as slow: more text for it then waits
        # unwritten and is merged. TLS always holds some bytes back.
        high_water = 0 if self._is_plain() else server.limits.tls_high_water
        self._transport.set_write_buffer_limits(high=high_water)
        self._socket = self.descriptor()
        self.deadline = server.now() + server.keep_alive_timeout_s

    def data_received(self, bytes data not None):
        if self._closing:
            return
        self._input = self._input + data if self._input else data
        self._run()

    def eof_received(self):
        cdef Exchange exchange = self.exchange
        self._closing = True
        if exchange is not None:
            self._end_exchange()
            exchange.client_gone()
        self._socket = -1
        self.deadline = self.server.now() + self.server.limits.client_stall_timeout_s
        return False  # the transport writes what it still has, then closes

    def connection_lost(self, error):
        self._closing = True
        self._socket = -1
        self.server.connections.discard(self)
        self._release_body()
        self._input = b""
        cdef Exchange exchange = self.exchange
        if exchange is not None:
            self._end_exchange()
            exchange.client_gone()

    def pause_writing(self):
        self._write_paused = True
        self.deadline = self.server.now() + self.server.limits.client_stall_timeout_s
        if self.exchange is not None:
            self.exchange.paused = True

    def resume_writing(self):
        cdef Exchange exchange
        self._write_paused = False
        if self._closing:
            return
        exchange = self.exchange
        if exchange is None:
            self.deadline = self.server.now() + self.server.keep_alive_timeout_s
            if not self._running:
                self._run()
            return
        self.deadline = NEVER
        exchange.paused = False
        if exchange.on_resume is not None:
            exchange.on_resume()

    # What the exchange calls.

    cdef int send(self, bytes data) except -1:
        """Hand bytes of an answer to the socket, and what it does not take to the transport."""
        cdef Py_ssize_t size = PyBytes_GET_SIZE(data)
        cdef Py_ssize_t num_sent
        if self._socket >= 0 and not self._write_paused:
            num_sent = c_send(
                self._socket, PyBytes_AS_STRING(data), <size_t>size, MSG_DONTWAIT | MSG_NOSIGNAL
            )
            if num_sent == size:
                return 0
            if num_sent > 0:
                data = data[num_sent:]
        self._transport.write(data)  # a socket that is full, or broken: the transport sees which
        return 0

    cdef int descriptor(self) except? -1:
        """The socket under the transport, -1 where its bytes are not plain (TLS)."""
        sock = self._transport.get_extra_info("socket")
        return sock.fileno() if sock is not None and self._is_plain() else -1

    cdef int exchange_done(self, bint keep_alive) except -1:
        """The answer is complete: go on with the next request, or close."""
        self._end_exchange()
        cdef HttpState server = self.server
        if not keep_alive or server.draining:
            self._close_after_answer()
            return 0
        if not self._write_paused:
            self.deadline = server.now() + server.keep_alive_timeout_s
        if not self._running:
            self._run()
        return 0

    cdef int check_backlog(self) except -1:
        """Cut off a client that does not read, when too much waits for it."""
        if self._transport.get_write_buffer_size() > self.server.limits.max_write_backlog:
            self._stalled()
        return 0

    cdef int cut(self) except -1:
        """Drop the connection of an aborted exchange."""
        self._end_exchange()
        self.drop()
        return 0

    # What the server calls.

    def go_on(self):
        """The loop has time again for the request that waits."""
        self._is_waiting = False
        if not self._running and not self._closing:
            self._run()

    def close_if_idle(self):
        """Close a connection that is between two requests."""
        if self.exchange is None and self._request is None and not self._input:
            self._close_after_answer()

    def drop(self):
        """Close now, without writing what is left; an exchange under way learns of it."""
        self._closing = True
        self._socket = -1
        self._transport.abort()

    def expire(self):
        """The deadline of the present state has passed."""
        limits = self.server.limits
        if self._closing:
            self.drop()
        elif self._write_paused:
            self._stalled()
        elif self._request is not None:
            self._refuse(
                RequestTimeoutError(
                    f"The body came too slowly: {limits.body_timeout_s:g} s without a byte, or "
                    f"under {limits.min_body_rate} bytes/s."
                )
            )
        elif self._input:
            self._refuse(
                RequestTimeoutError(f"No complete head within {limits.header_timeout_s:g} s.")
            )
        else:
            self._close_after_answer()

    # The state machine.

    cdef int _run(self) except -1:
        """Take requests from the input until one is being answered or more bytes are needed."""
        cdef bint progress
        self._running = True
        try:
            while (
                self._input
                and self.exchange is None
                and not self._write_paused
                and not self._closing
            ):
                if self._request is not None:
                    progress = self._read_body()
                else:
                    progress = self._has_turn() and self._read_head()
                if not progress:
                    break
        except MinisglError as error:
            self._refuse(error)
        except Exception:  # such as a bug in ``admit``: the client must not wait for ever
            log.exception("a request could not be read")
            self._refuse(MinisglError("Internal server error."))
        finally:
            self._running = False
        self._control_reading()
        return 0

    cdef bint _has_turn(self) except -1:
        """Whether the loop has time for another request now; if not, it will come back."""
        if self._is_waiting:
            return False
        if not self.server.has_time():
            self._is_waiting = True
            self.server.wait_for_turn(self)
            return False
        return True

    cdef bint _read_head(self) except -1:
        """Parse one head from the input. False: it is not complete yet."""
        cdef HttpState server = self.server
        cdef HttpRequest request
        cdef Py_ssize_t end, left, length
        cdef bytes data = self._input
        cdef bytes body
        if not self._scanned and PyBytes_AS_STRING(data)[0] <= c"\r":
            data = self._input = data.lstrip(b"\r\n")  # RFC 9112 2.2: empty lines before a request
            if not data:
                return False
        end = self._parse_head(data)
        if end == 0:
            return False
        self._judge()
        request = self._request
        length = request.content_length
        if self._refusal is None and length > server.max_body:  # rule 5
            raise body_too_large(server.limits)
        left = PyBytes_GET_SIZE(data) - end
        body = PyBytes_FromStringAndSize(PyBytes_AS_STRING(data) + end, left) if left else b""
        if length == 0:
            self._input = body
            self._dispatch(b"")
        elif (  # as most requests come
            length == left
            and self._refusal is None
            and server.num_buffered_body_bytes <= server.max_buffered_bodies
        ):
            self._input = b""
            self._dispatch(body)
        else:
            self._input = body
            self._start_body(request)
        return True

    cdef Py_ssize_t _parse_head(self, bytes data) except -1:
        """Make a request of the head at the start of ``data``; its bytes, 0 if it is not whole."""
        cdef const char *start = PyBytes_AS_STRING(data)
        cdef Py_ssize_t size = PyBytes_GET_SIZE(data)
        cdef Py_ssize_t end = 0
        cdef Py_ssize_t length, skipped
        cdef const char *found
        if self._known is not None:
            end = self._known.match(start, size, &length)
            if end:
                self._scanned = 0
                self._request = self._known.request(length)
                return end
        skipped = max(self._scanned - 3, 0)
        found = <const char *>memmem(start + skipped, <size_t>(size - skipped), b"\r\n\r\n", 4)
        if found == NULL:
            check_partial_head(data, self.server.limits)
            if not self._scanned:
                self.deadline = self.server.now() + self.server.limits.header_timeout_s
            self._scanned = size
            return 0
        self._scanned = 0
        end = found - start + 4
        self._request = self.server.heads.parse(data[:end])
        self._known = self.server.heads.last
        return end

    cdef int _judge(self) except -1:
        """Whether the request is let in: a head that was let in before is not judged anew."""
        cdef HttpRequest request = self._request
        cdef HttpState server = self.server
        cdef Known known = self._known
        if known is not None and known.is_admitted and not server.draining:
            request.is_admin = known.is_admin
            request.extra_head = known.extra_head
            return 0
        self._refusal = server.refusal(request)
        if self._refusal is None and known is not None:
            known.is_admitted = True
            known.is_admin = request.is_admin
            known.extra_head = request.extra_head
        return 0

    cdef int _start_body(self, HttpRequest request) except -1:
        cdef HttpState server = self.server
        if server.num_buffered_body_bytes > server.max_buffered_bodies:
            self._refusal = self._refusal or OverloadedError("Too many request bodies under way.")
        if self._refusal is not None and (
            request.expects_continue or not 0 < request.content_length <= MAX_DROPPED_BODY
        ):
            raise self._refusal
        if request.expects_continue and not self._input:
            self.send(CONTINUE)
        self._body = ChunkedBody(server.limits) if request.content_length < 0 else b""
        self._num_received = 0
        self._body_start_time = server.now()
        self.deadline = self._body_start_time + server.limits.body_timeout_s
        return 0

    cdef bint _read_body(self) except -1:
        """Move input into the body. False: it is not complete yet."""
        cdef HttpRequest request = self._request
        cdef bint complete
        cdef Py_ssize_t taken, missing
        cdef bytes data = self._input
        body = self._body
        if isinstance(body, ChunkedBody):
            complete, taken = body.feed(data)
            self._input = data[taken:]
        else:
            missing = request.content_length - self._num_received
            piece = data[:missing]
            taken = len(piece)
            complete = taken == missing
            self._input = data[missing:]
            if not body:
                self._body = piece
            else:
                if isinstance(body, bytes):
                    body = self._body = bytearray(body)
                body += piece
        self._num_received += taken
        self.server.num_buffered_body_bytes += taken
        if complete:
            body = self._body
            if isinstance(body, ChunkedBody):
                body = body.data
            self._release_body()
            self._dispatch(bytes(body))
            return True
        limits = self.server.limits
        self.deadline = limits.body_timeout_s + min(
            self.server.now(), self._body_start_time + self._num_received / limits.min_body_rate
        )
        return False

    cdef int _dispatch(self, bytes body) except -1:
        """Give the complete request to the handler, or answer it with its refusal."""
        cdef HttpRequest request = self._request
        cdef Exchange exchange
        refusal = self._refusal
        self._request = None
        self._refusal = None
        request.body = body
        self.deadline = NEVER
        exchange = self._start_exchange(request)
        if refusal is not None:
            self._count_refusal(refusal)
            exchange.fail(refusal)
            return 0
        try:
            self.server.handler(request, exchange)
        except MinisglError as error:
            self._handler_failed(exchange, error)
        except Exception:
            log.exception("the handler of %s %r failed", request.method, request.path)
            self._handler_failed(exchange, MinisglError("Internal server error."))
        return 0

    cdef bint _is_plain(self) except -1:
        return self._transport.get_extra_info("sslcontext") is None

    cdef int _handler_failed(self, Exchange exchange, error) except -1:
        if not exchange.started:
            exchange.fail(error)
        elif not exchange.done:
            exchange.abort()
        return 0

    cdef int _refuse(self, error) except -1:
        """Answer what cannot be read any further, and close."""
        cdef HttpRequest request
        self._count_refusal(error)
        request = self._request or unread_request(self._input)
        request.keep_alive = False
        self._request = None
        self._release_body()
        self._input = b""
        self._broken = True
        self._start_exchange(request).fail(error)
        return 0

    cdef int _count_refusal(self, error) except -1:
        refusals = self.server.refusals
        refusals[error.http_status] = refusals.get(error.http_status, 0) + 1
        return 0

    cdef Exchange _start_exchange(self, HttpRequest request):
        cdef Exchange exchange = start_exchange(self, request)
        self.exchange = exchange
        self.server.num_exchanges += 1
        return exchange

    cdef int _end_exchange(self) except -1:
        if self.exchange is not None:
            self.exchange = None
            self.server.num_exchanges -= 1
        return 0

    cdef int _release_body(self) except -1:
        self.server.num_buffered_body_bytes -= self._num_received
        self._num_received = 0
        if isinstance(self._body, ChunkedBody):
            self._body.close()
        self._body = b""
        return 0

    cdef int _stalled(self) except -1:
        """The client has stopped reading: it counts as gone."""
        cdef Exchange exchange = self.exchange
        self.server.num_stalled += 1
        self._end_exchange()
        self.drop()
        if exchange is not None:
            exchange.client_gone()
        return 0

    cdef int _control_reading(self) except -1:
        """Stop reading ahead when enough is kept; a stopped reader cannot see a client leave."""
        if self._closing:
            return 0
        cdef bint too_much = (
            len(self._input) > 0
            and (self.exchange is not None or self._write_paused or self._is_waiting)
            and len(self._input) > self.server.max_pipelined
        )
        if too_much != self._read_paused:
            self._read_paused = too_much
            if too_much:
                self._transport.pause_reading()
            else:
                self._transport.resume_reading()
        return 0

    cdef int _close_after_answer(self) except -1:
        """Close once everything is written."""
        limits = self.server.limits
        self._closing = True
        self._socket = -1
        self._input = b""
        transport = self._transport
        # A client that does not read what is left is cut off by the sweep.
        wait_s = limits.linger_s if self._broken else limits.client_stall_timeout_s
        self.deadline = self.server.now() + wait_s
        if not self._broken or not transport.can_write_eof():
            transport.close()
            return 0
        # The client may still be sending: unread bytes at close would reset the connection and
        # could destroy the answer on its way. So end our direction only, and read on to nowhere.
        transport.write_eof()
        if self._read_paused:
            self._read_paused = False
            transport.resume_reading()
        return 0
