"""Connection: one kept connection of the load client, and the request that is on it.

A plain socket is read by the client's poller, TLS by its transport, which connects, writes and
closes in both cases.

Rules: bytes go to the reader and nowhere else, so no Python object is made per event; a request
ends exactly once, by one call of the client: ``answered``, ``failed`` or ``resend``.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, cast

from minisgl_fast.bench.poller import Poller
from minisgl_fast.bench.reader import ProtocolError, ResponseReader

if TYPE_CHECKING:
    from minisgl_fast.bench.client import Client, Job


class Connection(asyncio.Protocol):
    """One connection, and the request on it if there is one."""

    __slots__ = (
        "_client",
        "_clock",
        "_descriptor",
        "_poller",
        "_reader",
        "_transport",
        "_was_used",
        "job",
    )

    def __init__(self, client: Client) -> None:
        self.job: Job | None = None
        self._client = client
        self._clock = client.clock
        self._reader = ResponseReader(client.endpoint.reader_api, client.credit)
        self._was_used = False
        self._transport: asyncio.Transport
        self._poller: Poller | None = None
        self._descriptor = -1

    @property
    def num_events(self) -> int:
        """Events with text of the request that is under way."""
        return self._reader.num_events if self.job is not None else 0

    def is_closing(self) -> bool:
        return self._transport.is_closing()

    def read_directly(self, poller: Poller) -> None:
        """Have the poller read, from a time on when nothing has come yet."""
        if not self._transport.is_closing():
            self._transport.pause_reading()
            self._descriptor = self._transport.get_extra_info("socket").fileno()
            self._poller = poller
            poller.watch(self._descriptor, self._reader, self)

    def abort(self) -> None:
        self._leave_poller()
        self._transport.abort()

    def send(self, job: Job) -> None:
        """Send a request; the connection must be idle."""
        if self._transport.is_closing():
            self._client.failed(job, "connect", "closed as soon as it was opened")
            return
        self.job = job
        self._reader.begin(job.start_s, job.sample.next_turn is not None)
        self._transport.write(job.data)

    def give_up(self, kind: str, message: str) -> None:
        """End the request, if there is one, and the connection."""
        self.abort()
        job, self.job = self.job, None
        if job is not None:
            self._client.failed(job, kind, message)

    # What the poller calls

    def answered(self) -> None:
        """The response is complete."""
        job, self.job = self.job, None
        assert job is not None
        self._was_used = True
        reusable = self._reader.keep_alive and not self._transport.is_closing()
        if not reusable:
            self._leave_poller()
            self._transport.close()
        self._client.answered(job, self._reader, self if reusable else None)

    def read_by_transport(self) -> None:
        """The peer has closed: the transport finds out how."""
        self._leave_poller()
        if not self._transport.is_closing():
            self._transport.resume_reading()

    def _leave_poller(self) -> None:
        if self._poller is not None:
            self._poller.forget(self._descriptor, self)
            self._poller = None

    # asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is none by its class
        self._client.opened(self)

    def data_received(self, data: bytes) -> None:
        try:
            if self._reader.feed(data, self._clock()):
                self.answered()
        except ProtocolError as error:
            self.give_up("protocol", str(error))

    def connection_lost(self, error: Exception | None) -> None:
        self._leave_poller()
        self._client.closed(self, self._reader.num_reads)
        if self.job is None:
            return
        if self._reader.feed_eof(self._clock()):
            self.answered()
            return
        job, self.job = self.job, None
        if self._was_used and self._reader.num_bytes == 0 and not job.is_resent:
            self._client.resend(job)
        else:
            after = f"after {self._reader.num_events} events"
            self._client.failed(job, "cut", f"{error or 'closed by the server'} {after}")


def fault(reader: ResponseReader, api: str) -> tuple[str, str]:
    """(kind, message) of a response that is whole but no good answer; ("", "") if it is good."""
    said = reader.error.decode("utf-8", "replace")
    if reader.status != 200:
        return f"HTTP {reader.status}", said
    if said:
        return ("stream error" if reader.num_bytes and said.startswith("{") else "no stream"), said
    if api != "generate" and not reader.done:
        return "cut", f"the stream ended without [DONE], after {reader.num_events} events"
    if reader.num_events == 0:
        return "empty", "no event with text"
    return "", ""
