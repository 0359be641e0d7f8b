"""What an operator does to a running server: abort requests, flush the cache, try it out.

Rules: a request is aborted by its exact name, never by a part of it; its client gets what there is
of the answer, with the finish reason ``abort``. What concerns other clients' requests or the cache
needs the admin key where there is one.
"""

from __future__ import annotations

import asyncio
import time
from urllib.parse import parse_qs

import msgspec

from minisgl_fast.api.body import read_body
from minisgl_fast.api.pipeline import Pipeline
from minisgl_fast.api.routes import Route, Routes
from minisgl_fast.errors import MinisglError, OverloadedError, RequestError
from minisgl_fast.params import SamplingParams
from minisgl_fast.server.access import check_admin
from minisgl_fast.server.exchange import Exchange
from minisgl_fast.server.http_rules import HttpRequest
from minisgl_fast.server.response import Choice, Response
from minisgl_fast.wire import AddTemplate

FLUSH_POLL_S = 0.02
MAX_FLUSH_WAIT_S = 600.0
PROBE_TIMEOUT_S = 20.0  # as SGLang's


class AbortRequest(msgspec.Struct):
    """``rid``: a request's ``rid`` or ``x-request-id``, or the ``id`` of its answer."""

    rid: str | None = None
    abort_all: bool | None = None


class Aborted(msgspec.Struct):
    """How many generations were ended."""

    num_aborted: int


class Control:
    """The routes of operators."""

    def __init__(self, pipeline: Pipeline) -> None:
        self._pipeline = pipeline
        self._probe: _Probe | None = None

    @property
    def routes(self) -> Routes:
        flush = Route(
            self.flush_cache, "Forget all cached prefixes, when idle", media_type="text/plain"
        )
        return {
            ("POST", "/abort_request"): Route(
                self.abort_request, "End requests before their time", AbortRequest, Aborted
            ),
            ("GET", "/flush_cache"): flush,
            ("POST", "/flush_cache"): flush,
            ("GET", "/health_generate"): Route(
                self.health_generate,
                "Tell whether the engine generates a token in time",
                media_type="text/plain",
            ),
        }

    def abort_request(self, request: HttpRequest, exchange: Exchange) -> None:
        """200 also where nothing was found: the request may have ended by itself."""
        body = read_body(request, AbortRequest)
        if body.abort_all:
            check_admin(request)
        elif not body.rid:
            raise RequestError("Give the rid of a request, or abort_all.", param="rid")
        name = None if body.abort_all else body.rid
        num_aborted = self._pipeline.abort(name)

        def answer(others: list[int]) -> None:
            aborted = Aborted(num_aborted + sum(others))
            self._pipeline.respond(request, exchange, msgspec.json.encode(aborted))

        self._pipeline.frontend.peers.ask("abort", name, answer)

    def flush_cache(self, request: HttpRequest, exchange: Exchange) -> None:
        """``?timeout=SECONDS`` waits so long for the requests under way to end."""
        check_admin(request)
        self._pipeline.frontend.check_ready()
        self._pipeline.run(request, exchange, self._flush(request, exchange, _timeout(request)))

    async def _flush(self, request: HttpRequest, exchange: Exchange, timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        while not await self._pipeline.frontend.flush_cache():
            if time.monotonic() >= deadline:
                raise RequestError("The cache was not flushed: there are requests under way.")
            await asyncio.sleep(FLUSH_POLL_S)
            if exchange.closed:
                return
        self._pipeline.respond(
            request, exchange, b"Cache flushed.\n", content_type=b"text/plain; charset=utf-8"
        )

    def health_generate(self, request: HttpRequest, exchange: Exchange) -> None:
        """Generate one token; whoever asks meanwhile waits for the same one."""
        self._pipeline.frontend.check_ready()
        if self._probe is None or self._probe.ended:
            self._probe = _Probe(self._pipeline)
        self._probe.waiting.append((request, exchange))


class _Probe(Response):
    """A generation of one token that shows that all of the server works."""

    def __init__(self, pipeline: Pipeline) -> None:
        super().__init__(None, False)  # type: ignore[arg-type]  # it writes nothing itself
        frontend = pipeline.frontend
        self.waiting: list[tuple[HttpRequest, Exchange]] = []
        self._pipeline = pipeline
        self._choice = Choice(
            self, 0, frontend.tokenizer.stream(), b"", b"", False, time.perf_counter()
        )
        self._timer = asyncio.get_running_loop().call_later(PROBE_TIMEOUT_S, self._time_out)
        params = SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True)
        frontend.submit(self._choice, [0], AddTemplate(params), seed=0, max_tokens=1)

    def close_choice(self, choice: Choice, text: bytes) -> bytes:
        if not choice.num_tokens:
            raise OverloadedError("The engine generated nothing.")
        return b""

    def complete(self, events: bytes) -> None:
        self._timer.cancel()
        for request, exchange in self.waiting:
            self._pipeline.respond(request, exchange, b"", content_type=b"text/plain")

    def fail(self, error: MinisglError) -> None:
        if not self.waiting:
            return
        self.ended = True
        self._timer.cancel()
        self._pipeline.frontend.abort(self._choice)
        waiting, self.waiting = self.waiting, []
        for request, exchange in waiting:
            self._pipeline.fail(request, exchange, error)

    def _time_out(self) -> None:
        self.fail(OverloadedError(f"No token was generated within {PROBE_TIMEOUT_S:g} s."))


def _timeout(request: HttpRequest) -> float:
    """The query's ``timeout`` in seconds."""
    text = parse_qs(request.query).get("timeout", ["0"])[-1]
    try:
        timeout_s = float(text)
    except ValueError:
        timeout_s = -1.0
    if not 0.0 <= timeout_s <= MAX_FLUSH_WAIT_S:
        raise RequestError(
            f"timeout must be a number of seconds in [0, {MAX_FLUSH_WAIT_S:g}].", param="timeout"
        )
    return timeout_s
