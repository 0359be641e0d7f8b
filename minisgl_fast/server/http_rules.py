"""The rules of HTTP/1.x that a request must keep, without any I/O.

``parse_head`` takes the bytes of one complete head and returns an ``HttpRequest`` or raises the
error to answer with. llhttp (through httptools, in its strict mode) checks the grammar; this file
adds what llhttp leaves to its users, each at the place named by its number:

     1. exactly one Host field, and a host in it (RFC 9112 3.2)   7. CONNECT and Upgrade
     2. versions other than 1.0 and 1.1                           8. absolute-form targets
     3. Transfer-Encoding on HTTP/1.0                             9. the target ``*``
     4. transfer codings other than chunked                      10. a fragment in the target
     5. a Content-Length over the body limit                     11. more than one space
     6. sizes of request line and header block, field count      12. no ``_`` becomes ``-``

Rules: a head is parsed in one piece by a parser of its own and a body by another, so no answer
depends on how the bytes were cut into reads and no state crosses from one request to the next; the
path that is routed (and later authorised) is the one string made here; ``HttpLimits`` bounds all
sizes.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import httptools

from minisgl_fast.errors import (
    HeadersTooLargeError,
    HttpVersionError,
    MinisglError,
    NotImplementedByServerError,
    PayloadTooLargeError,
    RequestError,
    UriTooLongError,
)
from minisgl_fast.server.http_request import HttpRequest

__all__ = [
    "ChunkedBody",
    "HttpLimits",
    "HttpRequest",
    "body_too_large",
    "check_partial_head",
    "parse_head",
]


@dataclass(frozen=True, slots=True)
class HttpLimits:
    """Every limit of the HTTP layer; sizes in bytes, times in seconds.

    A request line is counted without its CRLF, a header block from the end of the request line to
    the end of the empty line. Timers are kept by a sweep every ``sweep_interval_s``, so each may
    come that much late. A body must keep ``min_body_rate`` bytes/s on average after its first
    ``body_timeout_s``.
    """

    max_request_line: int = 8 * 1024
    max_header_block: int = 32 * 1024
    max_header_fields: int = 100
    max_body: int = 8 * 1024 * 1024
    max_buffered_bodies: int = (
        1024 * 1024 * 1024
    )  # over all connections, bodies not yet handed over
    max_pipelined: int = 64 * 1024  # bytes read ahead of the answer under way; then reading pauses
    max_connections: int = 16_384
    max_write_backlog: int = 1024 * 1024  # unsent bytes of a stream whose client does not read
    tls_high_water: int = 64 * 1024  # unsent bytes at which an exchange over TLS is marked paused
    min_body_rate: int = 1024
    header_timeout_s: float = 10.0
    body_timeout_s: float = 10.0
    keep_alive_timeout_s: float = 75.0
    client_stall_timeout_s: float = 30.0
    linger_s: float = 2.0  # after an error: time for the client to read the answer before the close
    sweep_interval_s: float = 1.0
    max_turn_s: float = 0.002  # of taking requests, before the loop looks at all else


# One space each side of the target (rule 11) and an upper-case method; llhttp takes several spaces.
_REQUEST_LINE = re.compile(rb"([A-Z][A-Z-]*) ([!-~]+) HTTP/(\d)\.(\d)\r\n")
_ABSOLUTE_FORM = re.compile(r"https?://[^/?]+", re.IGNORECASE)
_HOST = re.compile(rb"(?:\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._~!$&'()*+,;=%-]+)(?::[0-9]*)?")
_SANE_REQUEST_ID = re.compile(rb"[A-Za-z0-9._:-]{1,128}")

MALFORMED_REQUEST_LINE = "The request line is malformed."
MALFORMED_HEAD = "The request head is malformed."


class _HeadFields:
    """What llhttp reports of one head."""

    __slots__ = ("headers", "keep_alive", "num_host_fields", "parser")

    def __init__(self) -> None:
        self.headers: dict[bytes, bytes] = {}
        self.num_host_fields = 1  # until a Host field is repeated
        self.keep_alive: bool | None = None
        self.parser = httptools.HttpRequestParser(self)

    def on_header(self, name: bytes, value: bytes) -> None:
        name = name.lower()
        headers = self.headers
        if name not in headers:
            headers[name] = value
            return
        headers[name] += b", " + value
        if name == b"host":
            self.num_host_fields += 1

    def on_headers_complete(self) -> None:
        self.keep_alive = self.parser.should_keep_alive()


def check_partial_head(data: bytes, limits: HttpLimits) -> None:
    """Refuse a head that is still incomplete and can no longer become a good one.

    So a peer that talks something else (TLS, bare line feeds), or too much, is answered at once.
    """
    line_end = data.find(b"\n")
    _check_request_line_size(data, line_end, limits)
    if line_end >= 0:
        _match_request_line(data, line_end)
        _check_header_block(data, line_end, limits)


def parse_head(head: bytes, limits: HttpLimits) -> HttpRequest:
    """Parse one complete head, from the method to the CRLF of the empty line."""
    line_end = head.find(b"\n")
    _check_request_line_size(head, line_end, limits)
    line = _match_request_line(head, line_end)
    num_lines = _check_header_block(head, line_end, limits)
    if num_lines - 2 > limits.max_header_fields:  # the request line and the empty line
        raise HeadersTooLargeError(f"More than {limits.max_header_fields} header fields.")

    fields = _parse_fields(head)
    headers = fields.headers
    method = line[1].decode("ascii")
    path, query = _split_target(method, line[2].decode("ascii"))
    http_1_0 = line[4] == b"0"
    _check_host(headers, fields.num_host_fields, http_1_0)

    request_id = headers.get(b"x-request-id", b"")
    sane = _SANE_REQUEST_ID.fullmatch(request_id) is not None
    request = HttpRequest(
        method, path, query, headers, request_id=request_id.decode("ascii") if sane else ""
    )
    request.http_1_0 = http_1_0
    # A CONNECT is answered 405, and what follows it is not HTTP (rule 7). Upgrade is ignored.
    request.keep_alive = bool(fields.keep_alive) and method != "CONNECT"
    request.content_length = _content_length(headers, http_1_0)
    expect = headers.get(b"expect")
    request.expects_continue = (
        expect is not None and not http_1_0 and expect.strip().lower() == b"100-continue"
    )
    return request


def unread_request(data: bytes) -> HttpRequest:
    """What stands for a request whose head was no good, so that the error has the shape of its
    path, where the request line tells one."""
    line = _REQUEST_LINE.match(data)
    path = line[2].decode("ascii").partition("?")[0] if line is not None else ""
    return HttpRequest("GET", path if path.startswith("/") else "*")


def _parse_fields(head: bytes) -> _HeadFields:
    fields = _HeadFields()
    try:
        fields.parser.feed_data(head)
    except httptools.HttpParserUpgrade:
        pass  # rule 7: the body, if any, is read as if Upgrade were not there
    except httptools.HttpParserInvalidMethodError:
        raise NotImplementedByServerError("Unknown method.") from None
    except httptools.HttpParserError:
        raise RequestError(MALFORMED_HEAD) from None
    finally:
        del fields.parser  # it holds us by its callbacks: no cycle is left for the collector
    if fields.keep_alive is None:
        raise RequestError(MALFORMED_HEAD)
    return fields


def _check_request_line_size(data: bytes, line_end: int, limits: HttpLimits) -> None:
    if not b"A" <= data[:1] <= b"Z":
        raise RequestError(MALFORMED_REQUEST_LINE)
    size = len(data) if line_end < 0 else line_end
    if size > limits.max_request_line + 1:  # 1: the CR
        raise UriTooLongError(f"The request line is over {limits.max_request_line} bytes.")


def _match_request_line(data: bytes, line_end: int) -> re.Match[bytes]:
    line = _REQUEST_LINE.match(data)
    if line is None or line.end() != line_end + 1:
        raise RequestError(MALFORMED_REQUEST_LINE)
    if line[3] != b"1" or line[4] not in b"01":  # rule 2
        raise HttpVersionError("This server speaks HTTP/1.1 and HTTP/1.0.")
    return line


def _check_header_block(data: bytes, line_end: int, limits: HttpLimits) -> int:
    """Returns the number of lines."""
    num_lines = data.count(b"\n")
    if num_lines != data.count(b"\r\n"):
        raise RequestError(MALFORMED_HEAD)
    if len(data) - line_end - 1 > limits.max_header_block:  # rule 6
        raise HeadersTooLargeError(f"The header block is over {limits.max_header_block} bytes.")
    return num_lines


def body_too_large(limits: HttpLimits) -> PayloadTooLargeError:
    """The 413 of this server."""
    return PayloadTooLargeError(f"The body is over {limits.max_body} bytes.")


def _split_target(method: str, target: str) -> tuple[str, str]:
    if "#" in target:  # rule 10
        raise RequestError("The request target holds a fragment.")
    if target[0] != "/":
        if method == "CONNECT" or (target == "*" and method == "OPTIONS"):  # rules 7 and 9
            return target, ""
        authority = _ABSOLUTE_FORM.match(target)  # rule 8: routed by its path alone
        if authority is None:
            raise RequestError("The request target is malformed.")
        target = target[authority.end() :]
        if not target.startswith("/"):
            target = "/" + target
    path, _, query = target.partition("?")
    return path, query


def _check_host(headers: dict[bytes, bytes], num_host_fields: int, http_1_0: bool) -> None:
    host = headers.get(b"host")
    if host is None and http_1_0:
        return
    if host is None or num_host_fields != 1:  # rule 1
        raise RequestError("A request needs exactly one Host header field.")
    if _HOST.fullmatch(host.strip(b" \t")) is None:
        raise RequestError("The Host header field is malformed.")


def _content_length(headers: dict[bytes, bytes], http_1_0: bool) -> int:
    """Bytes of the body, -1 for a chunked one; llhttp has refused bad numbers and both at once."""
    coding = headers.get(b"transfer-encoding")
    if coding is not None:
        if http_1_0:  # rule 3
            raise RequestError("HTTP/1.0 has no Transfer-Encoding.")
        if coding.strip(b" \t").lower() != b"chunked":  # rule 4
            raise NotImplementedByServerError("The only transfer coding spoken here is chunked.")
        return -1
    return int(headers.get(b"content-length", b"0"))


class ChunkedBody:
    """Decodes one chunked body. ``feed`` never takes a byte of the next request.

    llhttp does the decoding but does not say where in its input a message ended. A chunked message
    can end only after CRLF CRLF, so the input is handed to it in pieces that end there.
    """

    __slots__ = (
        "_complete",
        "_error",
        "_limits",
        "_num_bytes",
        "_num_chunks",
        "_parser",
        "_tail",
        "data",
    )

    def __init__(self, limits: HttpLimits) -> None:
        self.data = bytearray()
        self._limits = limits
        self._complete = False
        self._error: MinisglError | None = None
        self._num_bytes = 0
        self._num_chunks = 0
        self._tail = b""
        self._parser = httptools.HttpRequestParser(self)
        self._parser.feed_data(b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n")

    def on_chunk_header(self) -> None:
        self._num_chunks += 1

    def on_body(self, data: bytes) -> None:
        if len(self.data) + len(data) > self._limits.max_body:
            self._error = body_too_large(self._limits)
            raise self._error
        self.data += data

    def on_message_complete(self) -> None:
        self._complete = True

    def feed(self, data: bytes) -> tuple[bool, int]:
        """Decode; returns (the body is complete, bytes of ``data`` taken)."""
        taken = 0
        view = memoryview(data)
        while taken < len(data) and not self._complete:
            end = self._next_boundary(data, taken)
            try:
                self._parser.feed_data(view[taken:end])
            except httptools.HttpParserError:
                raise self._error or RequestError("The chunked body is malformed.") from None
            self._num_bytes += end - taken
            taken = end
            # Chunk extensions and trailers are dropped, but they cost memory and time all the same.
            # 24 bytes: a chunk's size of up to 16 digits and its two CRLFs, with room.
            overhead = self._num_bytes - len(self.data) - 24 * self._num_chunks
            if overhead > self._limits.max_header_block:
                raise HeadersTooLargeError("Too many bytes in chunk extensions or trailer fields.")
        if not self._complete:
            self._tail = (self._tail + data[-3:])[-3:]
        return self._complete, taken

    def close(self) -> None:
        """Free the parser, which holds this object by its callbacks."""
        del self._parser

    def _next_boundary(self, data: bytes, start: int) -> int:
        if start == 0 and self._tail:
            joint = (self._tail + data[:3]).find(b"\r\n\r\n")
            if joint >= 0:
                return joint + 4 - len(self._tail)
        found = data.find(b"\r\n\r\n", start)
        return len(data) if found < 0 else found + 4
