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

from __future__ import annotations

from collections.abc import Callable, Sequence
from http import HTTPStatus
from typing import TYPE_CHECKING

from minisgl_fast.errors import MinisglError
from minisgl_fast.server.error_shapes import shaped_error
from minisgl_fast.server.errors_json import error_headers

if TYPE_CHECKING:
    from minisgl_fast.server.http import HttpConnection
    from minisgl_fast.server.http_rules import HttpRequest

JSON = b"application/json"
EVENT_STREAM = b"text/event-stream; charset=utf-8"

_STATUS_LINES = {
    status.value: b"HTTP/1.1 %d %b\r\n" % (status.value, status.phrase.encode("ascii"))
    for status in HTTPStatus
}
_CHUNK_HEADS = [b"%x\r\n" % size for size in range(4096)]  # most events are a few hundred bytes
_NO_BODY_STATUSES = frozenset((204, 304))

Headers = Sequence[tuple[bytes, bytes]]

_WAITING, _STREAMING, _DONE, _CLOSED = range(4)


class Exchange:
    """One response under way. Made by the connection, used by a handler and what it hands it to.

    paused         the client does not read: keep the text and write nothing until ``on_resume``
    on_disconnect  called once, at once, when the client is gone (or was cut off for stalling)
                   before the answer is complete; the exchange is closed by then
    on_resume      called when ``paused`` went back to False
    request        the request answered; set ``request.body`` to b"" once it is parsed
    names          what the client calls the request in its body, for a handler that aborts it
    status         the status that was answered, 0 before
    """

    __slots__ = (
        "_bodiless",
        "_chunked",
        "_connection",
        "_keep_alive",
        "_state",
        "_unsent_head",
        "names",
        "on_disconnect",
        "on_resume",
        "paused",
        "request",
        "status",
    )

    def __init__(self, connection: HttpConnection, request: HttpRequest) -> None:
        self._connection = connection
        self._state = _WAITING
        self._chunked = not request.http_1_0
        self._bodiless = request.method == "HEAD"
        self._keep_alive = request.keep_alive
        self._unsent_head = b""
        self.request = request
        self.on_disconnect: Callable[[], None] | None = None
        self.on_resume: Callable[[], None] | None = None
        self.paused = False
        self.names: Sequence[str | None] = ()
        self.status = 0

    @property
    def started(self) -> bool:
        """Whether a status has been sent; from then on an error can only go into the stream."""
        return self.status != 0

    @property
    def closed(self) -> bool:
        """Whether the client is gone; nothing that is written reaches anybody."""
        return self._state == _CLOSED

    @property
    def done(self) -> bool:
        """Whether the answer is complete."""
        return self._state == _DONE

    def respond(
        self, status: int, body: bytes, content_type: bytes = JSON, headers: Headers = ()
    ) -> None:
        """Answer in one piece. For HEAD the body is left out, its length is not."""
        if not self._may(_WAITING):
            return
        if status in _NO_BODY_STATUSES:
            data = self._head(status, b"", headers)
        else:
            length = b"content-type: %b\r\ncontent-length: %d\r\n" % (content_type, len(body))
            data = self._head(status, length, headers)
            if not self._bodiless:
                data += body
        self._state = _DONE
        self.status = status
        self._connection.send(data)
        self._connection.exchange_done(self._keep_alive)

    def fail(self, error: MinisglError, headers: Headers = ()) -> None:
        """Answer with an error; where a stream has begun already, cut the connection instead.

        A session that can say the error inside its stream does that and ends with ``finish``.
        """
        if self._state == _STREAMING:
            self.abort()
            return
        body = shaped_error(error, self.request.request_id, self.request.path)
        self.respond(error.http_status, body, JSON, (*error_headers(error), *headers))

    def start_stream(self, content_type: bytes = EVENT_STREAM, headers: Headers = ()) -> None:
        """Begin a 200 answer whose body follows in pieces, with chunked framing.

        The head leaves together with the first ``write``, or ``finish``. An HTTP/1.0 client gets no
        framing: its stream ends with the connection.
        """
        if not self._may(_WAITING):
            return
        framing = b"content-type: %b\r\ncache-control: no-cache\r\n" % content_type
        if self._chunked:
            framing += b"transfer-encoding: chunked\r\n"
        else:
            self._keep_alive = False
        self._unsent_head = self._head(200, framing, headers)
        self._state = _STREAMING
        self.status = 200

    def write(self, chunk: bytes) -> None:
        """Send joined events as one HTTP chunk.

        Writing on while ``paused`` is allowed up to ``max_write_backlog``; over it the client is
        cut off, and ``on_disconnect`` is called from inside this call.
        """
        if self._state != _STREAMING and not self._may(_STREAMING):
            return
        size = len(chunk)
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

    def descriptor(self) -> int:
        """The socket of a chunked stream, for a token loop that frames and sends its own chunks.

        -1 where that cannot be: then ``write`` is the way. Whoever sends on it does so only while
        everything before has left: nothing while ``paused``, and nothing after ``on_disconnect``
        or ``finish``. What the socket does not take goes to ``write_rest``.
        """
        if self._state != _STREAMING or not self._chunked or self._bodiless:
            return -1
        return self._connection.descriptor()

    def write_rest(self, data: bytes) -> None:
        """Send what is left of a chunk that was begun on the socket itself."""
        if self._may(_STREAMING):
            self._connection.send(data)

    def finish(self, last: bytes = b"", *, close: bool = False) -> None:
        """Send the last events and the end of the body in one write.

        ``close``: end the connection too, as after an error that some clients would wait behind.
        """
        if not self._may(_STREAMING):
            return
        if close:
            self._keep_alive = False
        self._state = _DONE
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

    def abort(self) -> None:
        """Drop the connection at once, unsent bytes included; ``on_disconnect`` is not called."""
        if self._state in (_WAITING, _STREAMING):
            self._state = _CLOSED
            self._connection.cut()

    def client_gone(self) -> None:
        """For the connection: close the exchange and tell its owner."""
        if self._state in (_WAITING, _STREAMING):
            self._state = _CLOSED
            if self.on_disconnect is not None:
                self.on_disconnect()

    def _may(self, expected: int) -> bool:
        """Whether a call that belongs to this state has effect; RuntimeError if it is a bug."""
        if self._state == expected:
            return True
        if self._state == _CLOSED:
            return False
        names = ("waiting", "streaming", "done")
        raise RuntimeError(
            f"the exchange is {names[self._state]}, this call needs it {names[expected]}"
        )

    def _head(self, status: int, framing: bytes, headers: Headers) -> bytes:
        """The status line and header fields up to the empty line."""
        server = self._connection.server
        if server.draining:
            self._keep_alive = False
        parts = [
            _STATUS_LINES[status],
            server.date_line,
            framing,
            b"x-request-id: ",
            self.request.request_id.encode("ascii"),
            b"\r\n",
            self.request.extra_head,
        ]
        if not self._keep_alive:
            parts.append(b"connection: close\r\n")
        elif self.request.http_1_0:
            parts.append(b"connection: keep-alive\r\n")
        for name, value in headers:
            if b"\r" in value or b"\n" in value:
                raise ValueError(f"a line end in the response field {name.decode('ascii')}")
            parts += (name, b": ", value, b"\r\n")
        parts.append(b"\r\n")
        return b"".join(parts)
