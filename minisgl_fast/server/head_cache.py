"""HeadCache: request heads that came before are not parsed again.

A client sends the same head with every request, but for the length of the body. So a parsed head is
kept under its bytes without that number, and an equal one becomes a request of its own at once.

Rules: only what ``parse_head`` accepted is kept, and only if the number was all that it made of the
Content-Length line; heads with a request id are each their own, and too many or too long ones are
not worth their memory.
"""

from __future__ import annotations

import re
from collections.abc import Hashable
from typing import NamedTuple

from minisgl_fast.server.http_rules import HttpLimits, HttpRequest, parse_head

MAX_HEADS = 512
MAX_HEAD_BYTES = 2048
_LENGTH = re.compile(rb"\r\ncontent-length: ([1-9][0-9]{0,8})\r\n", re.IGNORECASE)


class Known(NamedTuple):
    """What one head says, but for the length."""

    method: str
    path: str
    query: str
    headers: dict[bytes, bytes]
    http_1_0: bool
    keep_alive: bool
    expects_continue: bool


class HeadCache:
    """Parses heads for all connections of a server."""

    def __init__(self, limits: HttpLimits) -> None:
        self._limits = limits
        self._known: dict[Hashable, Known] = {}

    def __len__(self) -> int:
        return len(self._known)

    def parse(self, head: bytes) -> HttpRequest:
        """``parse_head``, and its errors."""
        found = _LENGTH.search(head)
        key: Hashable
        if found is None:
            length, key = 0, head
        else:
            length = int(found[1])
            key = head[: found.start(1)], head[found.end(1) :]
        known = self._known.get(key)
        if known is not None:
            return _made(known, length)
        request = parse_head(head, self._limits)
        if (
            request.content_length == length
            and len(head) <= MAX_HEAD_BYTES
            and b"x-request-id" not in request.headers
        ):
            if len(self._known) >= MAX_HEADS:
                self._known.clear()
            self._known[key] = Known(
                request.method,
                request.path,
                request.query,
                request.headers.copy(),
                request.http_1_0,
                request.keep_alive,
                request.expects_continue,
            )
        return request


def _made(known: Known, length: int) -> HttpRequest:
    headers = known.headers.copy()
    if length:
        headers[b"content-length"] = b"%d" % length
    request = HttpRequest(known.method, known.path, known.query, headers)
    request.http_1_0 = known.http_1_0
    request.keep_alive = known.keep_alive
    request.content_length = length
    request.expects_continue = known.expects_continue
    return request
