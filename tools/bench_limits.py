#!/usr/bin/env python3
"""What the frontend bears: lagging streams, many streams, many idle connections.

    tools/bench_limits.py

Each against a ``minisgl-fast --fake-engine`` of its own, the server pinned to one core, clients and
engine to another:

- lagging: an engine that makes tokens faster than they can be written one by one, 64 and 256
  streams; tokens a second, and how many came in an event;
- 2,000 streams at once, 64 tokens each: all of them must come whole;
- 10,000 idle keep-alive connections that have asked for something once: resident bytes each.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import select
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

SERVER_CPU, CLIENT_CPU = 0, 1
DEADLINE_S = 120.0
MAX_HEAD_SPACES = 24
WARM_CONNECTIONS = 3_000


@dataclass
class Server:
    """A running server: its port and process."""

    port: int
    pid: int

    def cpu_s(self) -> float:
        tasks = Path(f"/proc/{self.pid}/task").iterdir()
        return sum(int((task / "schedstat").read_text().split()[0]) for task in tasks) / 1e9

    def private_bytes(self) -> int:
        for line in Path(f"/proc/{self.pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Private_Dirty:"):
                return int(line.split()[1]) * 1024
        raise ValueError("no Private_Dirty")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--connections", type=int, default=10_000)
    parser.add_argument("--streams", type=int, default=2_000)
    arguments = parser.parse_args()
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    os.sched_setaffinity(0, {CLIENT_CPU})
    for n, tick_us in ((64, 40), (256, 150)):
        with started("--tick-us", str(tick_us)) as server:
            run_streams(server, n, 200)
            before = server.cpu_s()
            tokens, events, seconds = run_streams(server, n, 1_000_000 // n * 4)
            print(
                f"lagging, {n} streams: {tokens / seconds:,.0f} tokens a second,"
                f" {tokens / events:.1f} an event,"
                f" server CPU {(server.cpu_s() - before) / tokens * 1e6:.2f} us a token",
                flush=True,
            )
    with started("--tick-us", "2000") as server:
        tokens, events, seconds = run_streams(server, arguments.streams, 64)
        print(
            f"{arguments.streams} streams at once: all whole, {tokens / seconds:,.0f} tokens a"
            f" second, {tokens / events:.1f} an event",
            flush=True,
        )
    with started("--tick-us", "2000") as server:
        print(f"{arguments.connections} idle connections: "
              f"{idle_bytes(server, arguments.connections):,.0f} bytes each")  # fmt: skip


@contextmanager
def started(*flags: str) -> Iterator[Server]:
    command = [sys.executable, "-m", "minisgl_fast", "--fake-engine", "--port", "0", *flags]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stderr is not None and process.stdout is not None
    try:
        port = int(process.stderr.readline().rpartition(":")[2])
        process.stdout.readline()
        for task in Path(f"/proc/{process.pid}/task").iterdir():
            os.sched_setaffinity(int(task.name), {SERVER_CPU})
        yield Server(port, process.pid)
    finally:
        process.terminate()
        process.wait()


def run_streams(server: Server, n: int, num_tokens: int) -> tuple[int, int, float]:
    """(tokens, events, seconds) of N streams at once; RuntimeError if one is not whole."""
    body = json.dumps({"prompt": "x", "stream": True, "max_tokens": num_tokens}).encode()
    request = (
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        b"Content-Length: %d\r\n\r\n%b" % (len(body), body)
    )
    poll = select.epoll()
    clients: dict[int, tuple[socket.socket, list[bytes]]] = {}
    for _ in range(n):
        sock = socket.create_connection(("127.0.0.1", server.port))
        poll.register(sock, select.EPOLLIN)
        clients[sock.fileno()] = (sock, [b""])
    spaces = dict.fromkeys(clients, 0)
    heads = dict.fromkeys(clients, 0)
    events = 0
    start = time.perf_counter()
    for sock, _ in clients.values():
        sock.sendall(request)
    left = len(clients)
    while left:
        ready = poll.poll(DEADLINE_S)
        if not ready:
            raise RuntimeError(f"{left} streams stand still")
        for descriptor, _ in ready:
            sock, tail = clients[descriptor]
            data = sock.recv(1 << 18)
            if not data:
                raise RuntimeError("a stream was cut")
            # Each word of the fake engine's text stands behind a space. Others are only in the head
            # and in "data: ".
            spaces[descriptor] += data.count(b" ")
            joined = tail[0] + data
            events += joined.count(b'"text":"')
            heads[descriptor] += joined.count(b"data: ") - tail[0].count(b"data: ")
            tail[0] = joined[-7:]
            if joined.endswith(b"0\r\n\r\n") or b"[DONE]" in joined[-40:]:
                poll.unregister(descriptor)
                left -= 1
    seconds = time.perf_counter() - start
    for sock, _ in clients.values():
        sock.close()
    for descriptor, found in spaces.items():
        # What is over is in the head of the answer.
        if not 0 <= found - heads[descriptor] - num_tokens <= MAX_HEAD_SPACES:
            raise RuntimeError(f"{found - heads[descriptor]} words came for {num_tokens} tokens")
    return n * num_tokens, events, seconds


def idle_bytes(server: Server, num: int) -> float:
    """Growth of the server's private memory by connection."""
    request = b"GET /health HTTP/1.1\r\nHost: x\r\nUser-Agent: a client\r\n\r\n"
    clients = []

    def connect(count: int) -> None:
        for _ in range(count):
            sock = socket.create_connection(("127.0.0.1", server.port))
            sock.sendall(request)
            if not sock.recv(4096).startswith(b"HTTP/1.1 200"):
                raise RuntimeError("a connection was refused")
            clients.append(sock)

    connect(WARM_CONNECTIONS)  # what the start has left free is used up
    before = server.private_bytes()
    connect(num)
    grown = server.private_bytes() - before
    for sock in clients:
        sock.close()
    return grown / num


if __name__ == "__main__":
    main()
