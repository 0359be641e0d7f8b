#!/usr/bin/env python3
"""Where the time of a request that is not streamed goes in the frontend: microseconds by step.

    tools/profile_request.py                    completions of one token, the prompt as token ids
    tools/profile_request.py --case chat        a short chat, with template and tokenizer
    tools/profile_request.py --case long        a chat of a thousand tokens
    tools/profile_request.py --seeds            each request with a seed of its own

The whole way from the bytes of a request to the bytes of its answer runs in this process, without
sockets and without an engine: HTTP connections get their bytes from here, frames to the engine are
answered here, --at-once requests in one turn of the loop. So it shows user-mode time alone, and
hardly depends on what else the machine does: the quickest of many turns counts. Steps are
timed by wrapping functions, and what the wrapping costs is taken off; the sum of the steps may
differ from the whole, which is measured without.
"""

from __future__ import annotations

import argparse
import asyncio
import functools
import gc
import gzip
import itertools
import json
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import uvloop

from minisgl_fast.api.app import Api
from minisgl_fast.api.pipeline import Pipeline
from minisgl_fast.config import Config
from minisgl_fast.server import access, frontend, http
from minisgl_fast.server.http_rules import HttpLimits
from minisgl_fast.server.metrics import Metrics
from minisgl_fast.text.template import ChatTemplate
from minisgl_fast.text.tokenizer import Tokenizer
from minisgl_fast.wire import FinishReason, FrameKind, add_summary, pack_step

TOKENIZER = Path(__file__).parents[1] / "tests" / "data" / "qwen3-tokenizer"
SENTENCE = "the quick brown fox jumps over the lazy dog while a small server streams tokens to many"
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "ids": ("/v1/completions", {"prompt": list(range(100, 108))}),
    "chat": (
        "/v1/chat/completions",
        {"messages": [{"role": "user", "content": SENTENCE}], "temperature": 0.7},
    ),
    "long": (
        "/v1/chat/completions",
        {"messages": [{"role": "user", "content": Path(argparse.__file__).read_text()[:4700]}]},
    ),
}


class Transport:
    """What a connection writes to."""

    def __init__(self) -> None:
        self.written: list[bytes] = []

    def write(self, data: bytes) -> None:
        self.written.append(data)

    def get_extra_info(self, name: str) -> None:
        return None

    def set_write_buffer_limits(self, high: int) -> None:
        pass

    def abort(self) -> None:
        pass


class Engine:
    """The channel's other end: every request ends with its first token."""

    def __init__(self) -> None:
        self.rids: list[int] = []

    def send(self, kind: int, payload: bytes) -> None:
        if kind == FrameKind.ADD:
            self.rids.append(add_summary(payload)[0])

    def close(self) -> None:
        pass

    def step(self) -> bytes:
        rids, self.rids = self.rids, []
        return pack_step(
            [(rid, 279, FinishReason.LENGTH) for rid in rids], [(rid, 0) for rid in rids]
        )


class Clock:
    """Time by step: that in a wrapped function counts for its step, until it calls another."""

    def __init__(self) -> None:
        self.ns: dict[str, int] = {}
        self.calls: dict[str, int] = {}
        self._stack: list[str] = []
        self._since = 0

    def _switch(self, now: int) -> None:
        if self._stack:
            self.ns[self._stack[-1]] = self.ns.get(self._stack[-1], 0) + now - self._since

    def wrap(self, step: str, function: Callable[..., Any]) -> Callable[..., Any]:
        clock = time.perf_counter_ns

        @functools.wraps(function)
        def timed(*arguments: Any, **named: Any) -> Any:
            self._switch(clock())
            self._stack.append(step)
            self.calls[step] = self.calls.get(step, 0) + 1
            self._since = clock()
            try:
                return function(*arguments, **named)
            finally:
                self._switch(clock())
                self._stack.pop()
                self._since = clock()

        return timed

    @contextmanager
    def installed(self) -> Iterator[None]:
        before = [(owner, name, vars(owner)[name]) for _, owner, name in STEPS]
        for (step, owner, name), (_, _, function) in zip(STEPS, before, strict=True):
            setattr(owner, name, self.wrap(step, function))
        try:
            yield
        finally:
            for owner, name, function in before:
                setattr(owner, name, function)

    def overhead_ns(self) -> float:
        """What a wrapped call of nothing counts for its step, at the quickest."""
        totals = []
        for _ in range(200):
            other = Clock()
            nothing = other.wrap("nothing", lambda: None)
            for _ in range(100):
                nothing()
            totals.append(other.ns["nothing"])
        return min(totals) / 100


class Bench:
    """A frontend with ``num`` connections, and one request for all of them."""

    def __init__(self, folder: Path, case: str, num: int, with_seeds: bool = False) -> None:
        config = Config(model="fake", served_model_name="fake", fake_engine=True)
        tokenizer = Tokenizer.load(folder)
        tokenizer.accelerate()
        self.engine = Engine()
        self.frontend = frontend.Frontend(config, tokenizer, ChatTemplate.load(folder))
        self.frontend.connect(self.engine)
        facts = {
            "max_model_len": 1 << 17,
            "vocab_size": tokenizer.vocab_size,
            "num_pages": 1,
            "page_size": 64,
            "max_running_requests": 4096,
            "hidden_size": 1,
        }
        self.frontend.on_frame(FrameKind.READY, json.dumps(facts).encode())
        rules = access.Access.load(config)
        handler = rules.guard(Api(config, self.frontend))
        self.server = http.HttpServer(handler, HttpLimits(max_turn_s=60.0), rules.admit)
        self.server.start(asyncio.get_running_loop())
        self.transports = [Transport() for _ in range(num)]
        self.connections = []
        for transport in self.transports:
            connection = self.server.connection()
            connection.connection_made(transport)  # type: ignore[arg-type]
            self.connections.append(connection)
        self.path, self.fields = CASES[case]
        self.seeds = itertools.count(10**9) if with_seeds else None
        self.requests = [self.request() for _ in self.connections]

    def request(self) -> bytes:
        seed = {} if self.seeds is None else {"seed": next(self.seeds)}
        body = json.dumps({"model": "fake", "max_tokens": 1, **self.fields, **seed}).encode()
        return (
            b"POST %b HTTP/1.1\r\nHost: 127.0.0.1:8000\r\nContent-Type: application/json\r\n"
            b"Content-Length: %d\r\n\r\n%b" % (self.path.encode(), len(body), body)
        )

    def receive(self, connection: http.HttpConnection, request: bytes) -> None:
        connection.data_received(request)

    async def turn(self) -> float:
        """A request on every connection; CPU microseconds each, without what the engine does."""
        if self.seeds is not None:
            self.requests = [self.request() for _ in self.connections]
        start = time.thread_time_ns()
        for connection, request in zip(self.connections, self.requests, strict=True):
            self.receive(connection, request)
        await asyncio.sleep(0)
        ns = time.thread_time_ns() - start
        payload = self.engine.step()
        start = time.thread_time_ns()
        self.frontend.on_frame(FrameKind.STEP, payload)
        await asyncio.sleep(0)
        ns += time.thread_time_ns() - start
        for transport in self.transports:
            (answer,) = transport.written
            assert answer.startswith(b"HTTP/1.1 200 OK\r\n"), answer
            transport.written = []
        return ns / 1e3 / len(self.connections)

    async def best(self, num_turns: int) -> float:
        """The quickest of many turns: what other work on the machine has slowed least."""
        return min([await self.turn() for _ in range(num_turns)])


# What the time in a function counts as, but for that in a function of another step.
STEPS: tuple[tuple[str, object, str], ...] = (
    ("HTTP: connection, head", Bench, "receive"),
    ("HTTP: access rules", access.Access, "admit"),
    ("request: route, plain lane, session", Api, "__call__"),
    ("request: admitted", Pipeline, "admit"),
    ("request: template", ChatTemplate, "render"),
    ("request: text to ids", Tokenizer, "encode_array"),
    ("request: ADD frame", frontend.Frontend, "submit"),
    ("answer: step, text, body, HTTP", frontend.Frontend, "on_frame"),
    ("answer: step, text, body, HTTP", frontend.Frontend, "_flush"),
    ("answer: metrics", Metrics, "count_request"),
    ("answer: metrics", Metrics, "observe_end_to_end"),
)


async def profile(arguments: argparse.Namespace, folder: Path) -> None:
    (folder / "tokenizer.json").write_bytes(
        gzip.decompress((TOKENIZER / "tokenizer.json.gz").read_bytes())
    )
    shutil.copy(TOKENIZER / "tokenizer_config.json", folder)
    bench = Bench(folder, arguments.case, arguments.at_once, arguments.seeds)
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000)  # as in service.py
    await bench.best(20)
    print(f"{await bench.best(arguments.turns):.1f} us a request, user mode; by step:")
    clock = Clock()
    with clock.installed():
        await bench.best(5)
        clock.ns.clear()
        clock.calls.clear()
        turns = []
        for _ in range(arguments.turns):
            before = dict(clock.ns)
            await bench.turn()
            turns.append({step: ns - before.get(step, 0) for step, ns in clock.ns.items()})
    overhead = clock.overhead_ns()
    for step in dict.fromkeys(step for step, _, _ in STEPS):
        if step in clock.ns:
            ns = min(turn.get(step, 0) for turn in turns)
            calls = clock.calls[step] / len(turns)
            print(f"{step:40} {max(ns - calls * overhead, 0) / 1e3 / arguments.at_once:7.2f}")
    bench.server.close()
    bench.frontend.tokenizer.close()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--case", choices=CASES, default="ids")
    parser.add_argument("--at-once", type=int, default=16, help="requests in a turn of the loop")
    parser.add_argument("--seeds", action="store_true", help="each request has its own")
    parser.add_argument("--turns", type=int, default=400)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        uvloop.run(profile(arguments, Path(name)))


if __name__ == "__main__":
    main()
