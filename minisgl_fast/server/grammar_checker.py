"""GrammarChecker: whether a grammar can be followed, asked of processes that may be killed.

Rules: the caller's thread, and so the event loop, only waits; at most ``NUM_PROCESSES`` grammars
are compiled at a time, in processes that start with the first; one that takes too long, or ends,
fails its own grammar alone and is replaced. Answers, good and bad, are kept, up to
``MAX_CACHED_BYTES``.
"""

from __future__ import annotations

import json
import queue
import socket
import subprocess
import sys
import threading
import time
from collections import OrderedDict
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from minisgl_fast.errors import OverloadedError
from minisgl_fast.vocabulary import Vocabulary

COMPILE_TIMEOUT_S = 2.0
START_TIMEOUT_S = 30.0
NUM_PROCESSES = 2
MAX_WAITING = 64
MAX_CACHED_BYTES = 16 << 20


class GrammarError(Exception):
    """What is wrong with a grammar, in words for the client."""


class GrammarChecker:
    """Checks grammars for one vocabulary. ``lookup`` and ``check`` are for one thread."""

    def __init__(self, vocab_size: int, special_ids: list[int]) -> None:
        settings = {"vocab_size": vocab_size, "special_ids": special_ids}
        self._settings = json.dumps(settings).encode()
        self._pool: ThreadPoolExecutor | None = None
        # The last one used first: the others may never have to start.
        self._idle: queue.LifoQueue[_Process] = queue.LifoQueue()
        self._processes: list[_Process] = []
        self._waiting: dict[str, Future[str]] = {}
        self._known: OrderedDict[str, str | GrammarError] = OrderedDict()
        self._num_bytes = 0

    def lookup(self, grammar: str) -> str | None:
        """The engine's text of a grammar that was checked before, else None. GrammarError."""
        known = self._known.get(grammar)
        if known is None:
            return None
        self._known.move_to_end(grammar)
        if isinstance(known, GrammarError):
            raise known
        return known

    def check(self, grammar: str) -> Future[str]:
        """The engine's text of a grammar, or GrammarError. OverloadedError if too many wait."""
        waiting = self._waiting.get(grammar)
        if waiting is not None:
            return waiting
        if len(self._waiting) >= MAX_WAITING:
            raise OverloadedError("Too many grammars are being compiled. Please try again later.")
        if self._pool is None:
            self._pool = ThreadPoolExecutor(NUM_PROCESSES, thread_name_prefix="grammar")
            for _ in range(NUM_PROCESSES):
                self._processes.append(_Process(self._settings))
                self._idle.put(self._processes[-1])
        future = self._pool.submit(self._compile, grammar)
        self._waiting[grammar] = future
        return future

    def learn(self, grammar: str, future: Future[str]) -> str:
        """The result of a finished ``check``, which is kept. GrammarError."""
        self._waiting.pop(grammar, None)
        error = future.exception()
        if error is not None and not isinstance(error, GrammarError):
            raise error
        if grammar not in self._known:
            self._known[grammar] = future.result() if error is None else error
            self._num_bytes += len(grammar)
            while self._num_bytes > MAX_CACHED_BYTES:
                self._num_bytes -= len(self._known.popitem(last=False)[0])
        return future.result()

    def close(self) -> None:
        """End the processes."""
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)
        for process in self._processes:
            process.end()

    def _compile(self, grammar: str) -> str:
        process = self._idle.get()
        try:
            return process.ask(grammar)
        finally:
            self._idle.put(process)


class _Process:
    """One compiling process; started when it is needed. ``ask`` is for one thread at a time."""

    def __init__(self, settings: bytes) -> None:
        self._settings = settings
        self._process: subprocess.Popen[bytes] | None = None
        self._channel: socket.socket | None = None
        self._lock = threading.Lock()  # of start and end
        self._has_ended = False

    def ask(self, grammar: str) -> str:
        try:
            if self._process is None:
                self._start()
            answer = self._exchange(grammar.encode(), COMPILE_TIMEOUT_S)
        except TimeoutError:
            self._kill()
            raise GrammarError("it takes too long to compile") from None
        except OSError:
            self._kill()
            raise GrammarError("it is nested too deeply or takes too much memory") from None
        result: dict[str, Any] = json.loads(answer)
        if "error" in result:
            raise GrammarError(result["error"])
        return str(result["grammar"])

    def end(self) -> None:
        self._has_ended = True
        self._kill()

    def _start(self) -> None:
        ours, theirs = socket.socketpair()
        with self._lock:
            if self._has_ended:
                raise OSError("closed")
            self._channel = ours
            self._process = subprocess.Popen(
                [
                    sys.executable,
                    "-m",
                    "minisgl_fast.engine.grammar_check",
                    str(theirs.fileno()),
                ],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
        theirs.close()
        self._exchange(self._settings, START_TIMEOUT_S)

    def _exchange(self, payload: bytes, timeout_s: float) -> bytes:
        channel = self._channel
        if channel is None:
            raise OSError("closed")
        deadline = time.monotonic() + timeout_s
        channel.settimeout(timeout_s)
        channel.sendall(len(payload).to_bytes(4, "little") + payload)
        data = b""
        while len(data) < 4 or len(data) - 4 < int.from_bytes(data[:4], "little"):
            channel.settimeout(max(deadline - time.monotonic(), 0.001))
            more = channel.recv(1 << 20)
            if not more:
                raise OSError("the process ended")
            data += more
        return data[4:]

    def _kill(self) -> None:
        with self._lock:
            if self._process is not None:
                self._process.kill()
                self._process.wait()
                self._process = None
            if self._channel is not None:
                self._channel.close()
                self._channel = None


def make_checker(vocabulary: Vocabulary) -> GrammarChecker:
    return GrammarChecker(len(vocabulary), sorted(vocabulary.special_ids))
