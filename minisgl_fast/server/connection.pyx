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

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_GET_SIZE

from minisgl_fast.server.exchange cimport Exchange, start_exchange
from minisgl_fast.server.http_request cimport HttpRequest
from minisgl_fast.server.http_state cimport HttpState
from minisgl_fast.server.request_reader cimport RequestReader, start_reader

from minisgl_fast.errors import MinisglError, OverloadedError, RequestTimeoutError

log = logging.getLogger("minisgl_fast.http")

cdef extern from "<sys/socket.h>" nogil:
    ssize_t c_send "send"(int descriptor, const void *data, size_t size, int flags)
    int MSG_DONTWAIT
    int MSG_NOSIGNAL

cdef double NEVER = float("inf")
cdef bytes CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"


cdef class HttpConnection:
    """One client connection: an asyncio.Protocol in all but its base."""

    def __init__(self, HttpState server not None):
        self.server = server
        self.deadline = NEVER
        self._socket = -1
        self._reader = start_reader(server)

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
        cdef RequestReader reader = self._reader
        if self._closing:
            return
        reader.input = reader.input + data if reader.input else data
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
        self._reader.clear()
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
        if self.exchange is None and self._reader.request is None and not self._reader.input:
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
        elif self._reader.request is not None:
            self._refuse(
                RequestTimeoutError(
                    f"The body came too slowly: {limits.body_timeout_s:g} s without a byte, or "
                    f"under {limits.min_body_rate} bytes/s."
                )
            )
        elif self._reader.input:
            self._refuse(
                RequestTimeoutError(f"No complete head within {limits.header_timeout_s:g} s.")
            )
        else:
            self._close_after_answer()

    # The state machine.

    cdef int _run(self) except -1:
        """Take requests from the input until one is being answered or more bytes are needed."""
        cdef RequestReader reader = self._reader
        cdef HttpRequest request
        self._running = True
        try:
            while (
                reader.input
                and self.exchange is None
                and not self._write_paused
                and not self._closing
                and (reader.request is not None or self._has_turn())
            ):
                request = reader.read()
                if request is None:
                    self._wait_for_more()
                    break
                self._dispatch(request)
        except MinisglError as error:
            self._refuse(error)
        except Exception:  # such as a bug in ``admit``: the client must not wait for ever
            log.exception("a request could not be read")
            self._refuse(MinisglError("Internal server error."))
        finally:
            self._running = False
        self._control_reading()
        return 0

    cdef int _wait_for_more(self) except -1:
        """A request has begun, and what came of it is read."""
        cdef RequestReader reader = self._reader
        if reader.wants_continue:
            reader.wants_continue = False
            self.send(CONTINUE)
        if reader.input or reader.request is not None:
            self.deadline = reader.deadline
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

    cdef int _dispatch(self, HttpRequest request) except -1:
        """Give the complete request to the handler, or answer it with its refusal."""
        cdef Exchange exchange
        refusal = self._reader.refusal
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
        cdef HttpRequest request = self._reader.give_up()
        self._count_refusal(error)
        request.keep_alive = False
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
            PyBytes_GET_SIZE(self._reader.input) > self.server.max_pipelined
            and (self.exchange is not None or self._write_paused or self._is_waiting)
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
        self._reader.clear()
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
