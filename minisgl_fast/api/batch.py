"""Batch: several generations, each with parameters of its own, as one HTTP answer.

Each generation is a session with a ``Part`` for its exchange; what the parts say is joined here.

Rules: a batch is answered when all its parts are, in their order, or streamed with the events of
all parts as they come; nothing begins before everything that can be refused has been; the first
error of a part is the answer, and ends the others; a client that goes ends all.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import cast

from minisgl_fast.api.response_format import DONE
from minisgl_fast.api.session import Session
from minisgl_fast.errors import MinisglError
from minisgl_fast.server.exchange import JSON, Exchange, Headers


class Batch:
    """One answer made of ``num_parts`` others. ``parts`` are exchanges for their sessions."""

    def __init__(self, exchange: Exchange, num_parts: int) -> None:
        self.exchange = exchange
        self.has_failed = False
        self._parts = [Part(self, index) for index in range(num_parts)]
        self._sessions: Sequence[Session] = ()
        self._bodies: list[bytes] = [b""] * num_parts
        self._num_open = num_parts
        self._events: list[bytes] = []
        self._flush_is_due = False

    @property
    def parts(self) -> list[Exchange]:
        return [cast(Exchange, part) for part in self._parts]

    def start(self, sessions: Sequence[Session]) -> None:
        """Run the sessions; there is room for all their choices."""
        self._sessions = sessions
        self.exchange.on_disconnect = self._disconnected
        self.exchange.on_resume = self._resumed
        for session in sessions:
            session.start()

    # From the parts

    def respond(self, index: int, status: int, body: bytes) -> None:
        self._bodies[index] = body
        self._num_open -= 1
        if not self._num_open:
            self._release()
            self.exchange.respond(status, b"[%b]" % b",".join(self._bodies))

    def fail(self, error: MinisglError) -> None:
        self._end_others(error)
        self.exchange.fail(error)

    def start_stream(self, content_type: bytes) -> None:
        if not self.exchange.started:
            self.exchange.start_stream(content_type)

    def write(self, events: bytes) -> None:
        """Keep the events until the end of this turn of the loop: one write for all parts."""
        self._events.append(events)
        if not self._flush_is_due:
            self._flush_is_due = True
            asyncio.get_running_loop().call_soon(self._flush)

    def finish(self, last: bytes, close: bool) -> None:
        """``close``: with an error, which ends the other parts, too."""
        self._events.append(last)
        self._num_open -= 1
        if close:
            self._end_others(MinisglError("Another part of the batch failed."))
            self.exchange.finish(self._take(), close=True)
        elif self._num_open:
            self.write(b"")
        else:
            self._release()
            self.exchange.finish(self._take() + DONE)

    # Private

    def _flush(self) -> None:
        self._flush_is_due = False
        if self._num_open and not self.has_failed and self._events:
            self.exchange.write(self._take())

    def _take(self) -> bytes:
        events = b"".join(self._events)
        self._events.clear()
        return events

    def _end_others(self, error: MinisglError) -> None:
        self.has_failed = True
        sessions = self._sessions
        self._release()
        for session in sessions:
            session.fail(error)

    def _disconnected(self) -> None:
        self._release()
        for part in self._parts:
            if part.on_disconnect is not None:
                part.on_disconnect()

    def _resumed(self) -> None:
        for part in self._parts:
            if part.on_resume is not None:
                part.on_resume()

    def _release(self) -> None:
        self.exchange.on_disconnect = None
        self.exchange.on_resume = None
        self._sessions = ()


class Part:
    """What a session takes for its Exchange; see there. After a failure of the batch it says
    nothing any more."""

    def __init__(self, batch: Batch, index: int) -> None:
        self._batch = batch
        self._index = index
        self.request = batch.exchange.request
        self.names: Sequence[str | None] = ()
        self.on_disconnect: Callable[[], None] | None = None
        self.on_resume: Callable[[], None] | None = None

    @property
    def started(self) -> bool:
        return self._batch.exchange.started

    @property
    def closed(self) -> bool:
        return self._batch.exchange.closed

    @property
    def paused(self) -> bool:
        return self._batch.exchange.paused

    def descriptor(self) -> int:
        return -1

    def respond(
        self, status: int, body: bytes, content_type: bytes = JSON, headers: Headers = ()
    ) -> None:
        if not self._batch.has_failed:
            self._batch.respond(self._index, status, body)

    def fail(self, error: MinisglError, headers: Headers = ()) -> None:
        if not self._batch.has_failed:
            self._batch.fail(error)

    def start_stream(self, content_type: bytes, headers: Headers = ()) -> None:
        if not self._batch.has_failed:
            self._batch.start_stream(content_type)

    def write(self, chunk: bytes) -> None:
        if not self._batch.has_failed:
            self._batch.write(chunk)

    def finish(self, last: bytes = b"", *, close: bool = False) -> None:
        if not self._batch.has_failed:
            self._batch.finish(last, close)
