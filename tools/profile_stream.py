#!/usr/bin/env python3
"""Where the time of a streamed token goes in the frontend: microseconds by step, from perf.

    tools/profile_stream.py -n 64            as fast as tokens are taken
    tools/profile_stream.py -n 256 --tick-us 2000

Starts ``minisgl-fast --fake-engine`` on one core, N streams and the engine on another, and samples
the frontend with ``perf record`` (Linux). The server's CPU time per token comes from the
scheduler's clock, the shares from the samples: kernel time by the system call it was spent in, user
time by the function.
"""

from __future__ import annotations

import argparse
import array
import json
import mmap
import os
import re
import select
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

# What a sample counts as: the first pattern that its symbol or its library matches.
STEPS = (
    ("system call wrappers, the ring of sends", r"^__send$|^syscall$|asynccancel|^ring\."
     r"|SendRing|Outbox_send"),
    ("token to text", r"_token|TextStream_push|_find|Histogram|Dispatcher_\d*deliver"),
    ("mark for writing", r"_mark$|_take_dirty|vector|Response__mark"),
    ("event and chunk framing", r"_compose|append_event|TextStream_drain|_write_text|Outbox"
     r"|memmove|memcpy|basic_string|Dispatcher_\d*flush"),
    ("uvloop", r"^loop\."),
    ("Python: channel, callbacks", r"libpython|^deliver\.|malloc|free|Py"),
)  # fmt: skip
# Kernel time by what the process had called: that in the first functions but not in the others,
# which they call. The receiving end of loopback runs inside the send.
SEND = ("sock_sendmsg", "__x64_sys_sendto")
CALLS = (
    ("send: to the receiver's socket (loopback)", ("net_rx_action",), ()),
    ("send: TCP, IP, system call if alone", SEND, ("net_rx_action",)),
    ("many sends as one call (io_uring)", ("__do_sys_io_uring_enter",), ("sock_sendmsg",)),
    ("read a step", ("ksys_read",), ()),
    ("wait for events", ("do_epoll_wait",), ()),
)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("-n", "--streams", type=int, default=64)
    parser.add_argument("--tick-us", type=int, default=0, help="0: saturated")
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--server-cpu", type=int, default=0)
    parser.add_argument("--client-cpu", type=int, default=1)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        profile(arguments, Path(name))


def profile(arguments: argparse.Namespace, folder: Path) -> None:
    credit_file = folder / "credit"
    credit_file.write_bytes(bytes(8))
    command = [sys.executable, "-m", "minisgl_fast", "--fake-engine", "--port", "0"]
    command += ["--tick-us", str(arguments.tick_us)]
    if not arguments.tick_us:
        command += ["--credit-file", str(credit_file)]
    server = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert server.stderr is not None and server.stdout is not None
    try:
        port = int(server.stderr.readline().rpartition(":")[2])
        server.stdout.readline()
        children = Path(f"/proc/{server.pid}/task/{server.pid}/children").read_text().split()
        os.sched_setaffinity(0, {arguments.client_cpu})
        os.sched_setaffinity(int(children[0]), {arguments.client_cpu})
        for task in Path(f"/proc/{server.pid}/task").iterdir():
            os.sched_setaffinity(int(task.name), {arguments.server_cpu})
        with credit_file.open("r+b") as file:
            clients = Clients(port, arguments.streams, mmap.mmap(file.fileno(), 8))
        clients.read(1.0)
        data = folder / "perf.data"
        perf = subprocess.Popen(
            ["perf", "record", "-q", "-F", "2000", "-g", "-p", str(server.pid), "-o", str(data)],
            stderr=subprocess.DEVNULL,
        )
        clients.read(0.5)
        tokens, cpu_s, start = clients.num_tokens, cpu_seconds(server.pid), time.perf_counter()
        clients.read(arguments.seconds)
        tokens = clients.num_tokens - tokens
        cpu_s = cpu_seconds(server.pid) - cpu_s
        wall_s = time.perf_counter() - start
        perf.send_signal(2)
        perf.wait()
        print_table(data, cpu_s / tokens * 1e6, tokens / wall_s)
    finally:
        server.kill()
        server.wait()


class Clients:
    """N endless streams, read in one epoll loop."""

    def __init__(self, port: int, n: int, credit: mmap.mmap) -> None:
        body = json.dumps(
            {"prompt": "x", "stream": True, "max_tokens": 100_000, "ignore_eos": True}
        ).encode()
        self.num_tokens = 0
        self._credit = credit
        self._poll = select.epoll()
        self._sockets = {}
        for _ in range(n):
            sock = socket.create_connection(("127.0.0.1", port))
            sock.sendall(
                b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
                b"Content-Length: %d\r\n\r\n%b" % (len(body), body)
            )
            self._poll.register(sock, select.EPOLLIN)
            self._sockets[sock.fileno()] = sock
        self._buffer = array.array("B", bytes(1 << 18))

    def read(self, seconds: float) -> None:
        """Read for so long; events that a read cuts in two are counted at their beginning."""
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            for descriptor, _ in self._poll.poll(0.1):
                size = self._sockets[descriptor].recv_into(self._buffer)
                self.num_tokens += bytes(memoryview(self._buffer)[:size]).count(b'"text":" ')
            struct.pack_into("<Q", self._credit, 0, self.num_tokens)


def cpu_seconds(pid: int) -> float:
    tasks = Path(f"/proc/{pid}/task").iterdir()
    return sum(int((task / "schedstat").read_text().split()[0]) for task in tasks) / 1e9


def print_table(data: Path, us: float, tokens_per_s: float) -> None:
    shares: dict[str, float] = defaultdict(float)
    inclusive: dict[str, float] = defaultdict(float)
    kernel = 0.0
    for share, dso, symbol in report(data, "--no-children"):
        if dso.startswith(("[kernel", "[guest")):
            kernel += share
            continue
        for step, pattern in STEPS:
            if re.search(pattern, symbol) or re.search(pattern, dso):
                shares[step] += share
                break
        else:
            shares["other"] += share
    for share, _, symbol in report(data, "--children"):
        inclusive[symbol] += share
    user = sum(shares.values())
    total = user + kernel
    for step, symbols, others in CALLS:
        share = sum(inclusive[symbol] for symbol in symbols)
        share -= sum(inclusive[symbol] for symbol in others)
        shares["kernel, " + step] = share
        kernel -= share
    shares["kernel, other"] = kernel
    print(f"{tokens_per_s:,.0f} tokens a second; server CPU {us:.2f} us a token,"
          f" of which user {us * user / total:.2f}")  # fmt: skip
    for step, share in sorted(shares.items(), key=lambda entry: -entry[1]):
        print(f"{step:50} {us * share / total:7.3f}")


def report(data: Path, mode: str) -> list[tuple[float, str, str]]:
    """(share, library, symbol) of every line of a perf report."""
    text = subprocess.run(
        ["perf", "report", "-i", data, mode, "--sort", "dso,symbol", "-g", "none", "-t", "|"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    rows = []
    for line in text.splitlines():
        fields = [field.strip() for field in line.split("|")]
        if line.startswith("#") or len(fields) < 3:
            continue
        # With --children there is a column of the function's own share in between.
        dso, symbol = (fields[2:4] if mode == "--children" else fields[1:3])[:2]
        rows.append((float(fields[0].rstrip("%")), dso, symbol.partition("] ")[2]))
    return rows


if __name__ == "__main__":
    main()
