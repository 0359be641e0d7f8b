"""The HTTP/1.1 server: bytes to requests, answers to bytes, on asyncio transports (uvloop's).

    server = HttpServer(handler)                      handler(request, exchange) -> None
    server.start(loop)
    listener = await loop.create_server(server.connection, host, port)

Rules:
- A handler is called once per request, from the loop, and answers by its Exchange now or later.
- Requests of one connection are answered in the order they came, one at a time.
- ``admit`` runs when a head is complete, before its body is read and before ``100 Continue``.
  It and the router see the same ``request.path``: this is the place for keys and origins. It judges
  by the head alone: one that it has let in is let in again without asking, if it is remembered.
- A client that closes, even one direction only, before its answer is complete is gone:
  ``on_disconnect`` is called at once.
- One sweep a second keeps every timeout of every connection.

Files: http_rules.py judges requests (no I/O), head_cache.pyx remembers heads, http_state.pyx is
what connections share, connection.pyx the state machine of one, request_reader.pyx takes its bytes
apart, exchange.pyx makes the answers, router.py finds handlers.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Container
from email.utils import formatdate

from minisgl_fast.errors import MinisglError, OverloadedError
from minisgl_fast.server.connection import HttpConnection
from minisgl_fast.server.exchange import EVENT_STREAM, JSON, Exchange
from minisgl_fast.server.http_rules import HttpLimits, HttpRequest
from minisgl_fast.server.http_state import HttpState
from minisgl_fast.server.router import Handler, Router

__all__ = [
    "EVENT_STREAM",
    "JSON",
    "Exchange",
    "Handler",
    "HttpConnection",
    "HttpLimits",
    "HttpRequest",
    "HttpServer",
    "Router",
]

log = logging.getLogger("minisgl_fast.http")

Admit = Callable[[HttpRequest], MinisglError | None]


class HttpServer(HttpState):
    """What all connections share: the handler, the limits, the sweep, and the counts for metrics.

    handler   called with every complete request; see ``Exchange`` for how it answers. An exception
              becomes an error answer (its own status for a MinisglError, a plain 500 otherwise)
    admit     called with every request head; an error returned refuses the request unread
    refusals  answers given here without the handler: status -> count
    """

    def __init__(
        self, handler: Handler, limits: HttpLimits | None = None, admit: Admit | None = None
    ) -> None:
        super().__init__(handler, limits or HttpLimits(), admit)
        self.date_line = _date_line()
        self._paths_open_in_drain: Container[str] = ()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._sweep_timer: asyncio.TimerHandle | None = None

    @property
    def num_connections(self) -> int:
        """Open connections, idle ones included."""
        return len(self.connections)

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        """Begin the sweep that keeps every timeout. Once, before the first connection."""
        self.use_loop(loop)
        self._loop = loop
        self._sweep_timer = loop.call_later(self.limits.sweep_interval_s, self._sweep)

    def connection(self) -> HttpConnection:
        """The protocol factory for ``loop.create_server``."""
        return HttpConnection(self)

    def exchanges(self) -> list[Exchange]:
        """Every exchange that is not complete."""
        return [c.exchange for c in self.connections if c.exchange is not None]

    def drain(self, open_paths: Container[str] = ()) -> None:
        """Take no more work: new requests get 503, every answer says ``Connection: close``.

        Idle connections are closed now. Requests for ``open_paths`` (health) still reach the
        handler. Exchanges under way go on: the caller watches ``num_exchanges`` and closes the
        listener.
        """
        self.draining = True
        self._paths_open_in_drain = open_paths
        for connection in tuple(self.connections):
            connection.close_if_idle()

    def close(self) -> None:
        """Cut every connection and stop the sweep."""
        if self._sweep_timer is not None:
            self._sweep_timer.cancel()
            self._sweep_timer = None
        for connection in tuple(self.connections):
            connection.drop()

    def refusal(self, request: HttpRequest) -> MinisglError | None:
        """Why this request is not taken, judged by its head; None when it is."""
        refusal = None if self.admit is None else self.admit(request)
        if refusal is None and self.draining and request.path not in self._paths_open_in_drain:
            return OverloadedError("The server is shutting down.")
        return refusal

    def _sweep(self) -> None:
        loop = self._loop
        assert loop is not None
        self._sweep_timer = loop.call_later(self.limits.sweep_interval_s, self._sweep)
        self.date_line = _date_line()
        now = loop.time()
        for connection in [c for c in self.connections if c.deadline < now]:
            try:
                connection.expire()
            except Exception:
                log.exception("a connection failed in its timeout")
                connection.drop()


def _date_line() -> bytes:
    return b"date: %b\r\n" % formatdate(usegmt=True).encode("ascii")
