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
- ``send`` is the only place where answers reach the transport; ``descriptor`` lets the token loop
  send past it while the transport has nothing unsent.
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, cast

from minisgl_fast.errors import MinisglError, OverloadedError, RequestTimeoutError
from minisgl_fast.server.exchange import Exchange
from minisgl_fast.server.http_rules import (
    ChunkedBody,
    HttpRequest,
    body_too_large,
    check_partial_head,
)

if TYPE_CHECKING:
    from minisgl_fast.server.http import HttpServer

log = logging.getLogger("minisgl_fast.http")

_NEVER = float("inf")
_CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
# A refused body up to this size is read to its end, so that the connection stays usable.
_MAX_DROPPED_BODY = 64 * 1024


class HttpConnection(asyncio.Protocol):
    """One client connection; ``server``, ``exchange`` and ``deadline`` are read by its peers."""

    __slots__ = (
        "_body",
        "_broken",
        "_closing",
        "_input",
        "_num_received",
        "_read_paused",
        "_refusal",
        "_request",
        "_running",
        "_scanned",
        "_transport",
        "_write_paused",
        "_body_start_time",
        "deadline",
        "exchange",
        "server",
    )

    def __init__(self, server: HttpServer) -> None:
        self.server = server
        self.exchange: Exchange | None = None
        self.deadline = _NEVER
        self._transport: asyncio.Transport = cast(asyncio.Transport, None)
        self._input = b""  # bytes that arrived and belong to nothing yet
        self._scanned = 0  # how much of _input has been searched for the end of a head
        self._request: HttpRequest | None = None  # its body is being read
        self._refusal: MinisglError | None = None  # what to answer it with once its body is read
        self._body: bytes | bytearray | ChunkedBody = b""
        self._num_received = 0  # bytes of this body, framing included
        self._body_start_time = 0.0
        self._running = False
        self._broken = False
        self._closing = False
        self._read_paused = False
        self._write_paused = False

    # What the transport calls.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        server = self.server
        self._transport = cast(asyncio.Transport, transport)
        server.connections.add(self)
        if server.num_connections > server.limits.max_connections:
            self._refuse(OverloadedError("Too many connections."))
            self._transport.close()
            return
        # On a plain socket any unsent byte marks the client as slow: more text for it then waits
        # unwritten and is merged. TLS always holds some bytes back.
        high_water = 0 if self._is_plain() else server.limits.tls_high_water
        self._transport.set_write_buffer_limits(high=high_water)
        self.deadline = server.now() + server.limits.keep_alive_timeout_s

    def data_received(self, data: bytes) -> None:
        if self._closing:
            return
        self._input = self._input + data if self._input else data
        self._run()

    def eof_received(self) -> bool:
        exchange = self.exchange
        self._closing = True
        if exchange is not None:
            self._end_exchange()
            exchange.client_gone()
        self.deadline = self.server.now() + self.server.limits.client_stall_timeout_s
        return False  # the transport writes what it still has, then closes

    def connection_lost(self, error: Exception | None) -> None:
        self._closing = True
        self.server.connections.discard(self)
        self._release_body()
        self._input = b""
        exchange = self.exchange
        if exchange is not None:
            self._end_exchange()
            exchange.client_gone()

    def pause_writing(self) -> None:
        self._write_paused = True
        self.deadline = self.server.now() + self.server.limits.client_stall_timeout_s
        if self.exchange is not None:
            self.exchange.paused = True

    def resume_writing(self) -> None:
        self._write_paused = False
        if self._closing:
            return
        exchange = self.exchange
        if exchange is None:
            self.deadline = self.server.now() + self.server.limits.keep_alive_timeout_s
            if not self._running:
                self._run()
            return
        self.deadline = _NEVER
        exchange.paused = False
        if exchange.on_resume is not None:
            exchange.on_resume()

    # What the exchange calls.

    def send(self, data: bytes) -> None:
        """Hand bytes of an answer to the transport: the seam of the hot path."""
        self._transport.write(data)

    def descriptor(self) -> int:
        """The socket under the transport, -1 where its bytes are not plain (TLS)."""
        sock = self._transport.get_extra_info("socket")
        return sock.fileno() if sock is not None and self._is_plain() else -1

    def exchange_done(self, keep_alive: bool) -> None:
        """The answer is complete: go on with the next request, or close."""
        self._end_exchange()
        server = self.server
        if not keep_alive or server.draining:
            self._close_after_answer()
            return
        if not self._write_paused:
            self.deadline = server.now() + server.limits.keep_alive_timeout_s
        if not self._running:
            self._run()

    def check_backlog(self) -> None:
        """Cut off a client that does not read, when too much waits for it."""
        if self._transport.get_write_buffer_size() > self.server.limits.max_write_backlog:
            self._stalled()

    def cut(self) -> None:
        """Drop the connection of an aborted exchange."""
        self._end_exchange()
        self.drop()

    # What the server calls.

    def close_if_idle(self) -> None:
        """Close a connection that is between two requests."""
        if self.exchange is None and self._request is None and not self._input:
            self._close_after_answer()

    def drop(self) -> None:
        """Close now, without writing what is left; an exchange under way learns of it."""
        self._closing = True
        self._transport.abort()

    def expire(self) -> None:
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

    def _run(self) -> None:
        """Take requests from the input until one is being answered or more bytes are needed."""
        self._running = True
        try:
            while (
                self._input
                and self.exchange is None
                and not self._write_paused
                and not self._closing
            ):
                progress = self._read_head() if self._request is None else self._read_body()
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

    def _read_head(self) -> bool:
        """Parse one head from the input. False: it is not complete yet."""
        server = self.server
        data = self._input
        if not self._scanned:
            data = self._input = data.lstrip(b"\r\n")  # RFC 9112 2.2: empty lines before a request
            if not data:
                return False
        end = data.find(b"\r\n\r\n", max(self._scanned - 3, 0)) + 4
        if end < 4:
            check_partial_head(data, server.limits)
            if not self._scanned:
                self.deadline = server.now() + server.limits.header_timeout_s
            self._scanned = len(data)
            return False
        self._scanned = 0
        self._input = data[end:]
        request = self._request = server.heads.parse(data[:end])
        self._refusal = server.refusal(request)
        if self._refusal is None and request.content_length > server.limits.max_body:  # rule 5
            raise body_too_large(server.limits)
        length = request.content_length
        if length == 0:
            self._dispatch(b"")
        elif (  # as most requests come
            length == len(self._input)
            and self._refusal is None
            and server.num_buffered_body_bytes <= server.limits.max_buffered_bodies
        ):
            body, self._input = self._input, b""
            self._dispatch(body)
        else:
            self._start_body(request)
        return True

    def _start_body(self, request: HttpRequest) -> None:
        server = self.server
        if server.num_buffered_body_bytes > server.limits.max_buffered_bodies:
            self._refusal = self._refusal or OverloadedError("Too many request bodies under way.")
        if self._refusal is not None and (
            request.expects_continue or not 0 < request.content_length <= _MAX_DROPPED_BODY
        ):
            raise self._refusal
        if request.expects_continue and not self._input:
            self.send(_CONTINUE)
        self._body = ChunkedBody(server.limits) if request.content_length < 0 else b""
        self._num_received = 0
        self._body_start_time = server.now()
        self.deadline = self._body_start_time + server.limits.body_timeout_s

    def _read_body(self) -> bool:
        """Move input into the body. False: it is not complete yet."""
        request = self._request
        assert request is not None
        data = self._input
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

    def _dispatch(self, body: bytes) -> None:
        """Give the complete request to the handler, or answer it with its refusal."""
        request = self._request
        refusal = self._refusal
        assert request is not None
        self._request = None
        self._refusal = None
        request.body = body
        self.deadline = _NEVER
        exchange = self._start_exchange(request)
        if refusal is not None:
            self._count_refusal(refusal)
            exchange.fail(refusal)
            return
        try:
            self.server.handler(request, exchange)
        except MinisglError as error:
            self._handler_failed(exchange, error)
        except Exception:
            log.exception("the handler of %s %r failed", request.method, request.path)
            self._handler_failed(exchange, MinisglError("Internal server error."))

    def _is_plain(self) -> bool:
        return self._transport.get_extra_info("sslcontext") is None

    def _handler_failed(self, exchange: Exchange, error: MinisglError) -> None:
        if not exchange.started:
            exchange.fail(error)
        elif not exchange.done:
            exchange.abort()

    def _refuse(self, error: MinisglError) -> None:
        """Answer what cannot be read any further, and close."""
        self._count_refusal(error)
        request = self._request or HttpRequest("GET", "*")
        request.keep_alive = False
        self._request = None
        self._release_body()
        self._input = b""
        self._broken = True
        self._start_exchange(request).fail(error)

    def _count_refusal(self, error: MinisglError) -> None:
        refusals = self.server.refusals
        refusals[error.http_status] = refusals.get(error.http_status, 0) + 1

    def _start_exchange(self, request: HttpRequest) -> Exchange:
        exchange = self.exchange = Exchange(self, request)
        self.server.num_exchanges += 1
        return exchange

    def _end_exchange(self) -> None:
        if self.exchange is not None:
            self.exchange = None
            self.server.num_exchanges -= 1

    def _release_body(self) -> None:
        self.server.num_buffered_body_bytes -= self._num_received
        self._num_received = 0
        if isinstance(self._body, ChunkedBody):
            self._body.close()
        self._body = b""

    def _stalled(self) -> None:
        """The client has stopped reading: it counts as gone."""
        self.server.num_stalled += 1
        exchange = self.exchange
        self._end_exchange()
        self.drop()
        if exchange is not None:
            exchange.client_gone()

    def _control_reading(self) -> None:
        """Stop reading ahead when enough is kept; a stopped reader cannot see a client leave."""
        if self._closing:
            return
        waiting = self.exchange is not None or self._write_paused
        too_much = waiting and len(self._input) > self.server.limits.max_pipelined
        if too_much != self._read_paused:
            self._read_paused = too_much
            if too_much:
                self._transport.pause_reading()
            else:
                self._transport.resume_reading()

    def _close_after_answer(self) -> None:
        """Close once everything is written."""
        limits = self.server.limits
        self._closing = True
        self._input = b""
        transport = self._transport
        # A client that does not read what is left is cut off by the sweep.
        wait_s = limits.linger_s if self._broken else limits.client_stall_timeout_s
        self.deadline = self.server.now() + wait_s
        if not self._broken or not transport.can_write_eof():
            transport.close()
            return
        # The client may still be sending: unread bytes at close would reset the connection and
        # could destroy the answer on its way. So end our direction only, and read on to nowhere.
        transport.write_eof()
        if self._read_paused:
            self._read_paused = False
            transport.resume_reading()
