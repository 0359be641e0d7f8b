"""An engine without a model, to measure frontends: ``python -m minisgl_fast.engine.fake FD ...``.

It speaks worker.py's frames over the same channels and gives every request the words of one text,
up to its ``max_tokens`` and never an end of text; what is drawn, banned or biased is ignored. Log
probabilities, embeddings and scores it refuses.

Pace: with a tick, every request gets a token each tick, and a frontend that does not keep up finds
many steps at once. Without, a frontend gets the next step as soon as it has read the last one, so
it is never the engine that limits. A load client that writes how many tokens it has read into the
credit file (8 bytes, little-endian) is kept from falling behind too: loopback TCP that is overrun
drops packets, and then that is what gets measured.

Rules: no torch; a step costs a few microseconds whatever the number of requests, for its rows are
kept from step to step and ends are known in advance.
"""

from __future__ import annotations

import array
import fcntl
import heapq
import json
import mmap
import select
import signal
import socket
import struct
import sys
import termios
import time
from pathlib import Path

from minisgl_fast.channel import EngineChannel
from minisgl_fast.wire import FinishReason, FrameKind, Task, add_summary

STATS_INTERVAL_S = 0.1
MAX_MODEL_LEN = 1 << 17
PAGE_SIZE = 64
NUM_PAGES = 1 << 20
# How far a stream may be behind the engine by the credit file, and for how long: who reads several
# tokens as one event may count too few.
MAX_TOKENS_BEHIND = 8
LONGEST_WAIT_S = 0.02
# How long ticks that are late are made up for before the engine looks at what has come.
LONGEST_RUN_S = 0.0005


class Lane:
    """The requests of one frontend, and how many steps they have had."""

    def __init__(self, sock: socket.socket, tokens: list[int], waits: bool) -> None:
        """``waits``: for its frontend to read each step before the next."""
        self.channel = EngineChannel(sock)
        self._socket = sock
        self._tokens = tokens
        self._waits = waits
        self._places: dict[int, int] = {}  # rid -> its row
        self._rids = array.array("I")
        self._first: list[int] = []
        self._refused: list[int] = []
        self._ends: list[tuple[int, int]] = []  # (number of the last step, rid), a heap
        self._unread = array.array("i", [0])
        self._frame_size = 0
        self.num_steps = 0
        self.num_tokens = 0  # since it was last idle
        self.num_generated = 0
        self.next_token = 0

    def fileno(self) -> int:
        """The socket's, to wait for it."""
        return self._socket.fileno()

    def __len__(self) -> int:
        """How many requests run."""
        return len(self._places) + len(self._refused)

    def receive(self) -> None:
        """Take what the frontend has sent."""
        for kind, payload in self.channel.receive():
            if kind == FrameKind.ADD:
                rid, max_tokens, task, num_top_logprobs, prompt_logprobs_from = add_summary(payload)
                if task != Task.GENERATE or max(num_top_logprobs, prompt_logprobs_from) >= 0:
                    self._refused.append(rid)
                    continue
                self._places[rid] = len(self._rids)
                self._rids.append(rid)
                self._first.append(rid)
                heapq.heappush(self._ends, (self.num_steps + max_tokens, rid))
            elif kind == FrameKind.ABORT:
                self._remove(int.from_bytes(payload, "little"))
            elif kind == FrameKind.FLUSH:
                self.channel.send(FrameKind.FLUSHED, payload + bytes((not len(self),)))
        if self._waits:
            self._set_buffer()
        if self.channel.has_unsent:
            self.channel.flush()

    def step(self) -> None:
        """One token for every request."""
        self.num_steps += 1
        rids = self._rids
        num_rows = len(rids)
        reasons = bytearray(num_rows)
        ended = []
        while self._ends and self._ends[0][0] <= self.num_steps:
            _, rid = heapq.heappop(self._ends)
            if rid in self._places:  # an aborted one is not
                reasons[self._places[rid]] = FinishReason.LENGTH
                ended.append(rid)
        tokens = array.array("i", [self._tokens[self.next_token]]) * num_rows
        self.next_token = (self.next_token + 1) % len(self._tokens)
        if self._refused:
            rids = rids + array.array("I", self._refused)
            tokens.extend([-1] * len(self._refused))
            reasons += bytes([FinishReason.ERROR]) * len(self._refused)
        first = array.array("I", self._first + [0] * len(self._first))
        head = struct.pack("<II", len(rids), len(self._first))
        payload = b"".join((head, rids, tokens, first, reasons))
        self.channel.send(FrameKind.STEP, payload)
        self.num_tokens += num_rows
        self.num_generated += num_rows
        self._first.clear()
        self._refused.clear()
        for rid in ended:
            self._remove(rid)

    def was_read(self) -> bool:
        """Whether the frontend has taken everything that was sent."""
        fcntl.ioctl(self._socket, termios.TIOCOUTQ, self._unread)
        return self._unread[0] == 0 and not self.channel.has_unsent

    def _remove(self, rid: int) -> None:
        place = self._places.pop(rid, None)
        if place is None:
            return
        last = self._rids.pop()
        if last != rid:
            self._rids[place] = last
            self._places[last] = place
        if rid in self._first:
            self._first.remove(rid)
        if not self._places:
            self.num_tokens = 0

    def _set_buffer(self) -> None:
        """A buffer of little more than a frame can be written only when the last one was read."""
        size = 32 + 9 * len(self._rids)
        if size > self._frame_size or size < self._frame_size // 2:
            self._frame_size = size
            # Linux doubles it; a socket counts as writable when a quarter of it is in use.
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, size * 3 // 2)


class FakeEngine:
    """All lanes, and the pace."""

    def __init__(self, sockets: list[socket.socket]) -> None:
        self._sockets = sockets
        self._lanes: list[Lane] = []
        self._tokens: list[int] = []
        self._facts = b""
        self._tick_s = 0.0
        self._credit: mmap.mmap | None = None
        self._credit_before = 0  # what it said when the engine was last idle
        self._next_tick = 0.0  # 0 while idle
        self._last_step = 0.0
        self._last_stats = 0.0

    def start(self) -> bool:
        """Wait for CONFIG and answer READY; False when the frontend went away instead."""
        first = EngineChannel(self._sockets[0])
        frames: list[tuple[int, bytes]] = []
        while not frames:
            select.select([first], [], [])
            frames = first.receive()
            if first.closed:
                return False
        settings = json.loads(frames[0][1])
        config = settings["config"]
        self._tick_s = config["tick_us"] / 1e6
        if config["credit_file"] is not None:
            with Path(config["credit_file"]).open("r+b") as file:
                self._credit = mmap.mmap(file.fileno(), 8)
        self._tokens = settings["fake_tokens"]
        self._lanes = [self._lane(sock) for sock in self._sockets]
        facts = {
            "max_model_len": config["max_model_len"] or MAX_MODEL_LEN,
            "vocab_size": settings["vocab_limit"],
            "hidden_size": 1,
            "num_pages": NUM_PAGES,
            "page_size": PAGE_SIZE,
            "max_running_requests": config["max_queued_requests"],
            "dtype": "none",
            "device": "fake",
            "grammars": False,
        }
        self._facts = json.dumps(facts).encode()
        for lane in self._lanes:
            lane.channel.send(FrameKind.READY, self._facts)
        return True

    def serve(self) -> None:
        """Work until every frontend is gone."""
        touched = self._lanes
        while True:
            for lane in touched:
                lane.receive()
            for sock in [sock for lane in touched for sock in lane.channel.take_sockets()]:
                self._lanes.append(self._lane(sock))
                self._lanes[-1].channel.send(FrameKind.READY, self._facts)
            self._lanes = [lane for lane in self._lanes if not lane.channel.closed]
            if not self._lanes:
                return
            busy = [lane for lane in self._lanes if len(lane)]
            if not busy:
                self._next_tick = 0.0
                if self._credit is not None:
                    self._credit_before = int.from_bytes(self._credit[:8], "little")
            now = time.perf_counter()
            if now - self._last_stats >= STATS_INTERVAL_S or not busy:
                self._last_stats = now
                self._send_stats()
            if not busy:
                touched = self._wait(None)
            elif self._tick_s:
                touched = self._wait(self._tick(busy, now))
            else:
                self._step_where_read(busy, now)
                touched = self._lanes

    def _wait(self, wait_s: float | None) -> list[Lane]:
        """The frontends that have sent something, or have room for what is unsent, and until then
        sleep, but not longer than that."""
        unsent = [lane for lane in self._lanes if lane.channel.has_unsent]
        readable, writable, _ = select.select(self._lanes, unsent, [], wait_s)
        return [*readable, *(lane for lane in writable if lane not in readable)]

    def _tick(self, busy: list[Lane], now: float) -> float:
        """The steps that are due, for some time at most; how long it is until the next one."""
        until = now + LONGEST_RUN_S
        while self._next_tick <= now < until and all(map(len, busy)):
            # A late tick is made up for by the next one; the first has no one to be late for.
            self._next_tick = max((self._next_tick or now) + self._tick_s, now)
            for lane in busy:
                lane.step()
            now = time.perf_counter()
        return max(self._next_tick - now, 0.0)

    def _lane(self, sock: socket.socket) -> Lane:
        return Lane(sock, self._tokens, waits=not self._tick_s)

    def _step_where_read(self, busy: list[Lane], now: float) -> None:
        """The next step for every frontend that has read its last one."""
        if self._credit is not None and now < self._last_step + LONGEST_WAIT_S:
            behind = sum(lane.num_tokens for lane in busy) - self._num_read()
            if behind > MAX_TOKENS_BEHIND * sum(map(len, busy)):
                time.sleep(0)
                return
        ready = [lane for lane in busy if lane.was_read()]
        for lane in ready:
            lane.step()
        self._last_step = now
        if not ready:
            sockets = [lane.channel for lane in self._lanes]
            _, writable, _ = select.select(sockets, [lane.channel for lane in busy], [])
            if writable:  # a frame so small that the buffer has room for another
                time.sleep(0)

    def _num_read(self) -> int:
        """How many tokens clients have read by the credit file since the engine was idle."""
        assert self._credit is not None
        credit = int.from_bytes(self._credit[:8], "little")
        if credit < self._credit_before:  # the client has begun to count anew
            self._credit_before = 0
        return credit - self._credit_before

    def _send_stats(self) -> None:
        running = sum(map(len, self._lanes))
        stats = {
            "running": running,
            "queued": 0,
            "pages_total": NUM_PAGES,
            "pages_free": NUM_PAGES - running,
            "pages_cached": 0,
            "pages_used": running,
            "preemptions": 0,
            "steps": max(lane.num_steps for lane in self._lanes),
            "prompt_tokens": 0,
            "cached_tokens": 0,
            "generated_tokens": sum(lane.num_generated for lane in self._lanes),
        }
        for lane in self._lanes:
            lane.channel.send(FrameKind.STATS, json.dumps(stats).encode())


def main(arguments: list[str]) -> int:
    """Serve the channels given as file descriptors; the exit code."""
    for number in (signal.SIGINT, signal.SIGTERM):  # as in worker.py
        signal.signal(number, signal.SIG_IGN)
    engine = FakeEngine([socket.socket(fileno=int(descriptor)) for descriptor in arguments])
    if engine.start():
        engine.serve()
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
