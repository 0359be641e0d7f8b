"""The load: requests sent at their times over keep-alive connections, answers read and timed.

One event loop, one protocol object per connection, no task per request or event; connections that
are idle are used again, the last one first. A request's clock starts when it is sent, and where no
connection is idle before it is opened.

Rules:
- Each request ends exactly once: completed, or failed with a kind that is counted.
- A connection that was used before and closes before any byte of an answer has simply timed out on
  the server: its request is sent once more on a new one, and ``num_resent`` counts it.
- Requests are encoded before the run, up to ``PREPARED_BYTES`` of them; the rest as they are sent.
- How late the loop runs and how much CPU it takes is measured all the time.
"""

from __future__ import annotations

import asyncio
import itertools
import ssl
import sys
import time
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from minisgl_fast.bench.connection import Connection, fault
from minisgl_fast.bench.datasets import Sample
from minisgl_fast.bench.endpoint import Endpoint
from minisgl_fast.bench.limits import ClientCost, raise_file_limit, user_s
from minisgl_fast.bench.poller import Poller
from minisgl_fast.bench.reader import ProtocolError, ResponseReader
from minisgl_fast.bench.results import Results
from minisgl_fast.bench.samples import Distribution
from minisgl_fast.errors import ConfigError

PREPARED_BYTES = 256 << 20
MAX_SENT_PER_TURN = 64
MAX_OPENING = 128
SWEEP_INTERVAL_S = 0.25
LAG_INTERVAL_S = 0.02
SETTLE_S = 0.05  # for the server to accept connections that were opened ahead


@dataclass(slots=True)
class Job:
    """One request on its way."""

    sample: Sample
    data: bytes
    due_s: float
    index: int = -1
    start_s: float = 0.0
    is_resent: bool = False


@dataclass(slots=True)
class Load:
    """What to send: samples and the seconds from the start at which each is due, in order.

    num_samples: how many there are; their later turns come on top.
    """

    samples: Iterable[tuple[Sample, float]]
    num_samples: int
    max_concurrency: int | None = None
    timeout_s: float = 600.0
    think_time_s: float = 0.0
    credit: memoryview | None = None  # 8 bytes that count the events read, for who wants to know


class Client:
    """One run of a load against an endpoint. Make a new one for the next run."""

    def __init__(
        self,
        endpoint: Endpoint,
        load: Load,
        results: Results,
    ) -> None:
        self.results = results
        self.cost = ClientCost()
        self.num_running = 0
        self.total = load.num_samples
        self.is_interrupted = False
        self.clock = time.perf_counter
        self.endpoint = endpoint
        self.credit = load.credit
        self._load = load
        self._limit = load.max_concurrency or sys.maxsize
        self._jobs: Iterator[Job] = iter(())
        self._next: Job | None = None
        self._error: ConfigError | None = None
        self._follow_ups: deque[Job] = deque()
        self._num_thinking = 0
        self._idle: list[Connection] = []
        self._connections: set[Connection] = set()
        self._opening: dict[asyncio.Task[None], Job] = {}
        self._gate = asyncio.Semaphore(MAX_OPENING)
        self._tls = ssl.create_default_context() if endpoint.is_tls else None
        self._poller = None if endpoint.is_tls else Poller()
        self._address: str | None = None
        self._start_s = 0.0
        self._done = asyncio.Event()
        self._timer: asyncio.TimerHandle | None = None
        self._pump_is_due = False
        self.num_ended = 0

    @property
    def num_events(self) -> int:
        """Events with text so far, of requests that are done or under way."""
        under_way = sum(connection.num_events for connection in self._connections)
        return self.results.num_events + under_way

    async def run(self) -> float:
        """Send everything and wait for the ends; the duration in seconds. ConfigError."""
        self._loop = asyncio.get_running_loop()
        raise_file_limit(min(self._load.max_concurrency or 0, self.total))
        if self._poller is not None:
            self._loop.add_reader(self._poller.fileno(), self._poller.read_ready)
        try:
            duration_s = await self._run()
        finally:
            self._close()
            await asyncio.sleep(0)  # lets the connections end
            if self._poller is not None:
                self._loop.remove_reader(self._poller.fileno())
                self._poller.close()
        if self._error is not None:
            raise self._error
        return duration_s

    async def _run(self) -> float:
        self._jobs = self._prepared(self._load.samples)
        if self._load.max_concurrency is not None:
            await self._connect_ahead(min(self._load.max_concurrency, self.total))
        self._advance()
        lag = Distribution()
        watchers = [asyncio.create_task(self._sweep())]
        watchers.append(asyncio.create_task(self._measure_lag(lag)))
        cpu_s, in_user_s = time.process_time(), user_s()
        self._start_s = self.clock()
        try:
            if self._next is not None:
                self._pump()
                await self._done.wait()
        finally:
            duration_s = self.clock() - self._start_s
            self.cost.user_s = user_s() - in_user_s
            self.cost.cpu_share = (time.process_time() - cpu_s) / max(duration_s, 1e-9)
            self.cost.lag_p99_s, self.cost.lag_max_s = lag.percentiles([99, 100])
            for watcher in watchers:
                watcher.cancel()
        return duration_s

    def interrupt(self) -> None:
        """Send nothing more and give up what is under way: it counts as cancelled."""
        self.is_interrupted = True
        self._next = None
        self._follow_ups.clear()
        self._num_thinking = 0
        for task in self._opening:
            task.cancel()
        for connection in list(self._connections):
            connection.give_up("cancelled", "interrupted by the user")
        self._check_done()

    # Sending

    def _prepared(self, samples: Iterable[tuple[Sample, float]]) -> Iterator[Job]:
        """All jobs; those at the front are encoded here and now."""
        front: deque[Job] = deque()
        num_bytes = 0
        jobs = (self._job(sample, due_s) for sample, due_s in samples)
        for job in jobs:
            front.append(job)
            num_bytes += len(job.data)
            if num_bytes > PREPARED_BYTES:
                break
        return itertools.chain(_popped(front), jobs)

    def _job(self, sample: Sample, due_s: float) -> Job:
        return Job(sample, self.endpoint.encode(sample), due_s)

    def _pump(self) -> None:
        """Send what is due, as far as --max-concurrency lets it, a slice at a time."""
        self._pump_is_due = False
        for _ in range(MAX_SENT_PER_TURN):
            if self.num_running >= self._limit:
                return
            if self._follow_ups:
                self._send(self._follow_ups.popleft())
                continue
            if self._next is None:
                return
            wait_s = self._next.due_s - (self.clock() - self._start_s)
            if wait_s > 0:
                if self._timer is not None:
                    self._timer.cancel()
                self._timer = self._loop.call_later(wait_s, self._pump)
                return
            job = self._next
            self._advance()
            self._send(job)
        self._pump_soon()

    def _advance(self) -> None:
        try:
            self._next = next(self._jobs, None)
        except ConfigError as error:  # a data set that goes wrong in its middle
            self._next, self._error = None, error

    def _pump_soon(self) -> None:
        if not self._pump_is_due:
            self._pump_is_due = True
            self._loop.call_soon(self._pump)

    def _send(self, job: Job) -> None:
        self.num_running += 1
        job.start_s = self.clock()
        queue_s = max(0.0, job.start_s - self._start_s - job.due_s)
        job.index = self.results.begin(job.sample.num_input, job.start_s, queue_s)
        self._put_on_connection(job)

    def _put_on_connection(self, job: Job) -> None:
        while self._idle and not job.is_resent:
            connection = self._idle.pop()
            if not connection.is_closing():
                connection.send(job)
                return
        task = asyncio.create_task(self._open_for(job))
        self._opening[task] = job
        task.add_done_callback(self._opening_ended)

    def _opening_ended(self, task: asyncio.Task[None]) -> None:
        job = self._opening.pop(task)
        if task.cancelled():
            self._end(job, "cancelled", "interrupted by the user")

    async def _open_for(self, job: Job) -> None:
        left_s = job.start_s + self._load.timeout_s - self.clock()
        try:
            connection = await asyncio.wait_for(self._connect(), max(left_s, 0.001))
        except asyncio.TimeoutError:
            self._end(job, "timeout", "no connection in time")
        except OSError as error:
            self._end(job, "connect", str(error))
        else:
            connection.send(job)

    async def _connect(self) -> Connection:
        async with self._gate:
            host = self._address or self.endpoint.host
            transport, connection = await self._loop.create_connection(
                lambda: Connection(self),
                host,
                self.endpoint.port,
                ssl=self._tls,
                server_hostname=self.endpoint.host if self._tls else None,
            )
        if self._address is None:  # the name is resolved once
            self._address = transport.get_extra_info("peername")[0]
        if self._poller is not None:
            connection.read_directly(self._poller)
        return connection

    async def _connect_ahead(self, num_connections: int) -> None:
        """Open connections for a run of known concurrency; what fails will fail again and count."""
        attempts = (self._connect() for _ in range(num_connections))
        found = await asyncio.gather(*attempts, return_exceptions=True)
        self._idle += [item for item in found if isinstance(item, Connection)]
        await asyncio.sleep(SETTLE_S)

    # Ends

    def opened(self, connection: Connection) -> None:
        self._connections.add(connection)

    def closed(self, connection: Connection, num_reads: int) -> None:
        self._connections.discard(connection)
        self.cost.num_reads += num_reads

    def resend(self, job: Job) -> None:
        """The idle connection was closed as the request was on its way."""
        self.cost.num_resent += 1
        job.is_resent = True
        self._put_on_connection(job)

    def answered(self, job: Job, reader: ResponseReader, connection: Connection | None) -> None:
        """A whole response has come; ``connection`` is free again, unless it is None."""
        if connection is not None:
            self._idle.append(connection)
        kind, message = fault(reader, self.endpoint.api)
        if kind:
            self._end(job, kind, message)
            return
        self.results.succeed(job.index, reader)
        follow = job.sample.next_turn
        if follow is not None and not self.is_interrupted:
            try:
                answer = reader.text
            except ProtocolError:
                answer = ""
            self.total += 1
            sample = follow(answer)
            if self._load.think_time_s > 0:
                self._num_thinking += 1
                self._loop.call_later(self._load.think_time_s, self._thought, sample)
            else:
                self._follow_up(sample)
        self._ended()

    def failed(self, job: Job, kind: str, message: str) -> None:
        self._end(job, kind, message)

    def _thought(self, sample: Sample) -> None:
        if not self.is_interrupted:
            self._num_thinking -= 1
            self._follow_up(sample)
            self._pump_soon()

    def _follow_up(self, sample: Sample) -> None:
        self._follow_ups.append(self._job(sample, self.clock() - self._start_s))

    def _end(self, job: Job, kind: str, message: str) -> None:
        self.results.fail(job.index, kind, message)
        self._ended()

    def _ended(self) -> None:
        self.num_running -= 1
        self.num_ended += 1
        if not self._check_done():
            self._pump_soon()

    def _check_done(self) -> bool:
        if self.num_running or self._next or self._follow_ups or self._num_thinking:
            return False
        self._done.set()
        return True

    # Watching

    async def _sweep(self) -> None:
        """Fail the requests that take too long."""
        while True:
            await asyncio.sleep(SWEEP_INTERVAL_S)
            oldest_s = self.clock() - self._load.timeout_s
            for connection in list(self._connections):
                if connection.job is not None and connection.job.start_s < oldest_s:
                    connection.give_up("timeout", f"no end within {self._load.timeout_s:g} s")

    async def _measure_lag(self, lag: Distribution) -> None:
        while True:
            due_s = self.clock() + LAG_INTERVAL_S
            await asyncio.sleep(LAG_INTERVAL_S)
            lag.add(max(0.0, self.clock() - due_s))

    def _close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        for task in list(self._opening):
            task.cancel()
        for connection in list(self._connections):
            connection.abort()


def _popped(jobs: deque[Job]) -> Iterator[Job]:
    while jobs:
        yield jobs.popleft()
