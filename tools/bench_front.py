#!/usr/bin/env python3
"""The frontend alone: streamed tokens a second and their cost, with an engine that only counts.

    tools/bench_front.py -n 64 --tokens 2000            as fast as the frontend takes them
    tools/bench_front.py -n 256 --tick-us 2000          one token per stream every 2 ms
    tools/bench_front.py --client DIR                   with the C client sseload.c found in DIR

Three processes: the real frontend (HTTP, template, tokenizer, token loop) pinned to --server-cpu; a
fake engine speaking frames over the real channel, and N streaming clients in one epoll loop, both
on --client-cpu. Saturated, the engine sends the next step when the frontend has read the last one
and no client lacks more than --window tokens. If FastAPI is installed, a bare FastAPI server whose
engine is a loop in its own process (no hop, no tokenizer) runs in turn with ours. Medians over
--repeat rounds.

Printed: tokens/s of the whole run; server CPU in us per token (all, user, system); tokens per event
(1 unless tokens were merged); time to first token and between events, p50 / p99 in ms.
"""

from __future__ import annotations

import argparse
import array
import fcntl
import gzip
import importlib.util
import json
import mmap
import os
import select
import socket
import statistics
import struct
import subprocess
import sys
import tempfile
import termios
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
TOKENIZER = ROOT / "tests" / "data" / "qwen3-tokenizer"
MODEL = "bench"
TOKEN = 38835  # " fox" in Qwen3's vocabulary
TOKEN_TEXT = b" fox"
EVENT = b'"content":" fox'
TICKS_PER_SECOND = os.sysconf("SC_CLK_TCK")
LONGEST_RUN_S = 120.0
LONGEST_WAIT_S = 0.02


def main() -> None:
    arguments = parse()
    if arguments.role == "frontend":
        serve_frontend(arguments)
    elif arguments.role == "engine":
        run_engine(arguments)
    elif arguments.role == "fastapi":
        serve_fastapi(arguments)
    else:
        compare(arguments)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("-n", "--streams", default="64", help="numbers of clients, comma-separated")
    parser.add_argument("--tokens", type=int, default=1000, help="per stream")
    parser.add_argument("--tick-us", type=int, default=0, help="0: saturated")
    parser.add_argument("--window", type=int, default=8, help="tokens a stream may be behind")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--prompt-words", type=int, default=12)
    parser.add_argument("--client", metavar="DIR", help="folder with sseload.c")
    parser.add_argument("--server-cpu", type=int, default=0)
    parser.add_argument("--client-cpu", type=int, default=1)
    parser.add_argument("--no-peers", action="store_true")
    parser.add_argument("--json", metavar="FILE")
    for name in ("role", "credit"):
        parser.add_argument(f"--{name}", help=argparse.SUPPRESS)
    parser.add_argument("--fd", type=int, help=argparse.SUPPRESS)
    return parser.parse_args()


# The comparison


def compare(arguments: argparse.Namespace) -> None:
    os.sched_setaffinity(0, {arguments.client_cpu % (os.cpu_count() or 1)})
    peers = ["minisgl_fast"]
    if not arguments.no_peers and not arguments.tick_us and _installed("fastapi", "uvicorn"):
        peers.append("fastapi")
    rows = []
    print(f"{'server':13} {'N':>4} {'tokens/s':>9} {'us/token':>9} {'user':>6} {'system':>7}"
          f" {'merged':>7} {'ttft ms':>14} {'itl ms':>14}")  # fmt: skip
    for n in map(int, arguments.streams.split(",")):
        results: dict[str, list[dict[str, float]]] = {peer: [] for peer in peers}
        for _ in range(arguments.repeat):
            for peer in peers:
                results[peer].append(measure(peer, n, arguments))
        for peer, runs in results.items():
            row = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
            rows.append({"server": peer, "n": n, **row})
            print(
                f"{peer:13} {n:4} {row['tokens_per_s']:9,.0f} {row['us']:9.2f}"
                f" {row['user_us']:6.2f} {row['system_us']:7.2f} {row['merged']:7.2f}"
                f" {row['ttft_p50']:6.2f}/{row['ttft_p99']:7.2f}"
                f" {row['itl_p50']:6.2f}/{row['itl_p99']:7.2f}",
                flush=True,
            )
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(rows, indent=1) + "\n")


def measure(peer: str, n: int, arguments: argparse.Namespace) -> dict[str, float]:
    """One run of one server: start, warm up, stream, stop."""
    with started(peer, arguments) as (port, pid, credit_file):
        with open(credit_file, "r+b") as opened:
            credit = mmap.mmap(opened.fileno(), 8)
        request = chat_request(port, arguments)
        stream(port, n, request(50), credit)
        struct.pack_into("<Q", credit, 0, 0)
        before = cpu_times(pid)
        if arguments.client:
            result = stream_with_c(port, n, request(arguments.tokens), arguments, credit_file)
        else:
            result = stream(port, n, request(arguments.tokens), credit)
        after = cpu_times(pid)
    tokens = n * arguments.tokens
    total, user, system = (b - a for a, b in zip(before, after, strict=True))
    share = user / (user + system) if user + system else 0.0
    us = total / tokens * 1e6
    return {**result, "us": us, "user_us": us * share, "system_us": us * (1 - share)}


@contextmanager
def started(peer: str, arguments: argparse.Namespace) -> Iterator[tuple[int, int, Path]]:
    """A server, and its engine where it has one: (port, pid, file of the clients' count)."""
    listener = socket.create_server(("127.0.0.1", 0), backlog=1024)
    port = listener.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "credit"
        file.write_bytes(bytes(8))
        ours, theirs = socket.socketpair()
        servers = [_spawn(peer_role(peer), listener, ours, file, arguments)]
        if peer == "minisgl_fast":
            servers.append(_spawn("engine", theirs, theirs, file, arguments))
        for sock in (listener, ours, theirs):
            sock.close()
        try:
            _wait_for(port)
            yield port, servers[0].pid, file
        finally:
            for server in servers:
                server.terminate()
            for server in servers:
                server.wait()


def peer_role(peer: str) -> str:
    return "frontend" if peer == "minisgl_fast" else peer


def _spawn(
    role: str,
    sock: socket.socket,
    channel: socket.socket,
    credit: Path,
    arguments: argparse.Namespace,
) -> subprocess.Popen[bytes]:
    command = [sys.executable, __file__, "--role", role, "--fd", str(sock.fileno())]
    command += ["--credit", f"{credit}:{channel.fileno()}"]
    for name in ("tick_us", "window", "server_cpu", "client_cpu"):
        command += [f"--{name.replace('_', '-')}", str(getattr(arguments, name))]
    return subprocess.Popen(command, pass_fds=(sock.fileno(), channel.fileno()))


def _wait_for(port: int) -> None:
    deadline = time.monotonic() + LONGEST_RUN_S
    while time.monotonic() < deadline:
        with socket.create_connection(("127.0.0.1", port)) as sock:
            sock.settimeout(LONGEST_RUN_S)
            sock.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
            if sock.recv(4096).startswith(b"HTTP/1.1 200"):
                return
        time.sleep(0.02)
    raise TimeoutError("the server did not become ready")


def _installed(*packages: str) -> bool:
    return all(importlib.util.find_spec(package) for package in packages)


def cpu_times(pid: int) -> tuple[float, float, float]:
    """Seconds of CPU of all threads: total by the scheduler's clock, user and system by ticks."""
    total = 0
    for task in Path(f"/proc/{pid}/task").iterdir():
        total += int((task / "schedstat").read_text().split()[0])
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return total / 1e9, int(fields[11]) / TICKS_PER_SECOND, int(fields[12]) / TICKS_PER_SECOND


# The clients


def chat_request(port: int, arguments: argparse.Namespace) -> Callable[[int], bytes]:
    content = " ".join(["word"] * arguments.prompt_words)

    def request(num_tokens: int) -> bytes:
        body = json.dumps(
            {
                "model": MODEL,
                "messages": [{"role": "user", "content": content}],
                "stream": True,
                "max_tokens": num_tokens,
                "ignore_eos": True,
            }
        ).encode()
        return (
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1:%d\r\n"
            b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n%b"
            % (port, len(body), body)
        )

    return request


def stream(port: int, n: int, request: bytes, credit: mmap.mmap) -> dict[str, float]:
    """N streams at once to their ends, in one epoll loop."""
    poll = select.epoll()
    clients: dict[int, tuple[socket.socket, list[bytes]]] = {}
    for _ in range(n):
        sock = socket.create_connection(("127.0.0.1", port))
        sock.setblocking(False)
        poll.register(sock.fileno(), select.EPOLLIN)
        clients[sock.fileno()] = (sock, [b""])
    last = dict.fromkeys(clients, 0.0)
    first_gaps, gaps = array.array("d"), array.array("d")
    num_tokens = num_events = 0
    start = time.perf_counter()
    for sock, _ in clients.values():
        sock.sendall(request)
    while clients:
        ready = poll.poll(LONGEST_RUN_S)
        if not ready:
            raise TimeoutError(f"{len(clients)} streams stand still after {num_tokens} tokens")
        for fd, _ in ready:
            sock, tail = clients[fd]
            data = sock.recv(1 << 18)
            now = time.perf_counter()
            text = tail[0] + data
            found = text.count(TOKEN_TEXT)
            if found:
                num_tokens += found
                num_events += text.count(EVENT)
                (gaps if last[fd] else first_gaps).append(now - (last[fd] or start))
                last[fd] = now
            # A token may be cut between two reads; what is kept holds no whole one.
            tail[0] = text[-len(TOKEN_TEXT) + 1 :]
            if not data or b"[DONE]" in text:
                poll.unregister(fd)
                sock.close()
                del clients[fd]
        struct.pack_into("<Q", credit, 0, num_tokens)
    return {
        "tokens_per_s": num_tokens / (time.perf_counter() - start),
        "merged": num_tokens / max(num_events, 1),
        **_percentiles("ttft", first_gaps),
        **_percentiles("itl", gaps),
    }


def _percentiles(name: str, seconds: array.array[float]) -> dict[str, float]:
    ordered = sorted(seconds) or [0.0]
    return {
        f"{name}_p{percent}": ordered[min(len(ordered) * percent // 100, len(ordered) - 1)] * 1e3
        for percent in (50, 99)
    }


def stream_with_c(
    port: int, n: int, request: bytes, arguments: argparse.Namespace, credit: Path
) -> dict[str, float]:
    """The same with sseload.c, which counts events, and leaves its count in the credit file."""
    with tempfile.TemporaryDirectory() as folder:
        client, body = Path(folder) / "sseload", Path(folder) / "request"
        source = Path(arguments.client) / "sseload.c"
        subprocess.run(["gcc", "-O2", "-o", str(client), str(source)], check=True)
        body.write_bytes(request)
        command = [client, "127.0.0.1", port, n, 1, body, LONGEST_RUN_S, credit]
        command += [arguments.client_cpu, 0]
        process = subprocess.run(list(map(str, command)), check=True, stdout=subprocess.PIPE)
    found: dict[str, Any] = json.loads(process.stdout)
    if found["errors"] or found["timed_out"]:
        raise RuntimeError(f"sseload failed: {found}")
    num_tokens = n * arguments.tokens
    return {
        "tokens_per_s": num_tokens / found["wall_s"],
        "merged": num_tokens / found["chunks"],
        **{
            f"{name}_p{percent}": found[f"{name}_us"][f"p{percent}"] / 1e3
            for name in ("ttft", "itl")
            for percent in (50, 99)
        },
    }


# The fake engine


def run_engine(arguments: argparse.Namespace) -> None:
    from minisgl_fast.channel import EngineChannel
    from minisgl_fast.wire import FrameKind

    os.sched_setaffinity(0, {arguments.client_cpu % (os.cpu_count() or 1)})
    sock = socket.socket(fileno=arguments.fd)
    channel = EngineChannel(sock)
    facts = {
        "max_model_len": 1 << 20, "vocab_size": 151936, "num_pages": 1, "page_size": 16,
        "dtype": "none", "device": "none", "max_running_requests": 4096,
    }  # fmt: skip
    channel.send(FrameKind.READY, json.dumps(facts).encode())
    with open(arguments.credit.partition(":")[0], "r+b") as file:
        credit = mmap.mmap(file.fileno(), 8)
    unread = array.array("i", [0])
    running: dict[int, int] = {}
    new: list[int] = []
    steady = b""
    num_sent = 0
    next_tick = last_sent = 0.0
    while not channel.closed:
        for kind, payload in channel.receive():
            rid = int.from_bytes(payload[:4], "little")
            if kind == FrameKind.ADD:
                if not running:
                    num_sent = 0
                # max_tokens stands behind rid, flags, seed, salt, six floats and top_k.
                running[rid] = int.from_bytes(payload[52:56], "little")
                new.append(rid)
            else:
                running.pop(rid, None)
            steady = b""
        if not running:
            select.select([sock], [], [])
            continue
        if arguments.tick_us:
            now = time.perf_counter()
            if now < next_tick:
                select.select([sock], [], [], next_tick - now)
                continue
            next_tick = max(next_tick + arguments.tick_us / 1e6, now)
        else:
            fcntl.ioctl(sock, termios.TIOCOUTQ, unread)
            behind = num_sent - int.from_bytes(credit[:8], "little")
            is_behind = behind > arguments.window * len(running)
            # Events that hold several tokens count once with the C client: never wait for long.
            if unread[0] or (is_behind and time.perf_counter() < last_sent + LONGEST_WAIT_S):
                time.sleep(0)
                continue
            last_sent = time.perf_counter()
        if not steady or min(running.values()) == 1:
            steady = b""
            payload = _step(running, new)
        else:
            payload = steady
        channel.send(FrameKind.STEP, payload)
        num_sent += len(running)
        if not new and not steady:
            steady = payload
        new = []
        for rid in [rid for rid, left in running.items() if left == 1]:
            del running[rid]
            steady = b""
        for rid in running:
            running[rid] -= 1


def _step(running: dict[int, int], new: list[int]) -> bytes:
    from minisgl_fast.wire import FinishReason, pack_step

    rows = [
        (rid, TOKEN, FinishReason.LENGTH if left == 1 else FinishReason.RUNNING)
        for rid, left in running.items()
    ]
    return pack_step(rows, [(rid, 0) for rid in new])


# The servers


def serve_frontend(arguments: argparse.Namespace) -> None:
    import asyncio
    import gc

    import uvloop

    from minisgl_fast.api.app import Api
    from minisgl_fast.channel import FrontendChannel
    from minisgl_fast.config import Config
    from minisgl_fast.server.frontend import Frontend
    from minisgl_fast.server.http import HttpServer
    from minisgl_fast.text.template import ChatTemplate
    from minisgl_fast.text.tokenizer import Tokenizer

    os.sched_setaffinity(0, {arguments.server_cpu % (os.cpu_count() or 1)})
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        text = gzip.decompress((TOKENIZER / "tokenizer.json.gz").read_bytes())
        (folder / "tokenizer.json").write_bytes(text)
        settings = (TOKENIZER / "tokenizer_config.json").read_bytes()
        (folder / "tokenizer_config.json").write_bytes(settings)
        tokenizer, template = Tokenizer.load(folder), ChatTemplate.load(folder)

    async def serve() -> None:
        loop = asyncio.get_running_loop()
        config = Config(model=MODEL)
        frontend = Frontend(config, tokenizer, template)
        server = HttpServer(Api(config, frontend))
        server.start(loop)
        channel = FrontendChannel(frontend.on_frame, loop.stop)
        frontend.connect(channel)
        ours = socket.socket(fileno=int(arguments.credit.rpartition(":")[2]))
        await loop.create_connection(lambda: channel, sock=ours)
        listener = socket.socket(fileno=arguments.fd)
        await loop.create_server(server.connection, sock=listener)
        gc.collect()
        gc.freeze()
        await asyncio.Event().wait()

    uvloop.run(serve())


def serve_fastapi(arguments: argparse.Namespace) -> None:
    """A bare FastAPI stream: json.dumps per token, each waiting until the last was taken."""
    import asyncio
    from collections.abc import AsyncIterator

    import uvicorn
    from fastapi import FastAPI
    from fastapi.responses import StreamingResponse

    os.sched_setaffinity(0, {arguments.server_cpu % (os.cpu_count() or 1)})
    app = FastAPI()

    async def events(num_tokens: int) -> AsyncIterator[str]:
        for _ in range(num_tokens):
            await asyncio.sleep(0)
            choice = {"index": 0, "delta": {"content": " fox"}, "finish_reason": None}
            chunk = {
                "id": "chatcmpl-0",
                "object": "chat.completion.chunk",
                "created": 0,
                "model": MODEL,
                "choices": [choice],
            }
            yield f"data: {json.dumps(chunk, separators=(',', ':'))}\n\n"
        yield "data: [DONE]\n\n"

    @app.get("/health")
    def health() -> dict[str, str]:
        return {"state": "ready"}

    @app.post("/v1/chat/completions")
    async def chat(body: dict[str, Any]) -> StreamingResponse:
        return StreamingResponse(events(body["max_tokens"]), media_type="text/event-stream")

    settings = uvicorn.Config(app, log_level="error", loop="uvloop", http="httptools")
    listener = socket.socket(fileno=arguments.fd)
    uvicorn.Server(settings).run(sockets=[listener])


if __name__ == "__main__":
    main()
