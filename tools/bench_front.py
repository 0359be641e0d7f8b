#!/usr/bin/env python3
"""The frontend alone: what a streamed token and a request cost, beside peers and a bare C writer.

    tools/bench_front.py                              every figure, about five minutes
    tools/bench_front.py stream lag --rounds 5        only some sections
    tools/bench_front.py --markdown docs/benchmarks.md    and write the tables into that page

The server is ``minisgl-fast --fake-engine`` with Qwen3's tokenizer, alone on --server-cpu; its
engine and the client, ``minisgl-fast bench``, are on --client-cpu. Peers, where gcc and FastAPI are
there: a bare epoll writer in C (front/floor.c), the floor, and FastAPI in the chunk shapes of vLLM
and SGLang (front/fastapi_app.py); they take turns in every round. Medians over the rounds; CPU is
the server process's. The last table has each figure beside its target.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tools" / "front"))

from front_figures import Output, at_least, at_most  # noqa: E402
from front_loads import SENTENCE, Loads, Row, median, percentile  # noqa: E402
from front_servers import OURS, available_peers, started  # noqa: E402

# Tokens of one run: enough for the kernel's ticks, which tell user from system time.
FAST_TOKENS, PEER_TOKENS = 800_000, 60_000
TICK_US, TICK_TOKENS = 2000, 3000
FAST_ENGINE_PER_S = 1_280_000  # tokens a second of an engine that is faster than any writer
NUM_IDLE = 10_000
NUM_MANY = 2_000
MANY_TICK_US = 50_000
STREAM_HEADS = (
    "server", "streams", "tokens/s", "CPU us", "user", "system", "of floor", "tokens/event",
    "TTFT p50", "p99 ms", "ITL p50", "p99 ms", "client us/event",
)  # fmt: skip


class Bench:
    """The sections, and what they share."""

    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        self.options = options
        self.folder = folder
        self.loads = Loads(folder, options.client_cpu)
        self.out = Output()
        self.peers = [] if options.no_peers else available_peers()

    def server(self, name: str = OURS, tick_us: int = 0, **more: bool) -> Any:
        options = self.options
        cpus = options.server_cpu, options.client_cpu
        return started(name, self.folder, *cpus, tick_us, **more)

    # Sections

    def stream(self) -> None:
        """Streams as fast as they are taken, one event a token."""
        for n in (64, 256):
            found = self._streams([OURS, *self.peers], n, FAST_TOKENS)
            ours, what = found[OURS], f"{n} streams, one event a token"
            self.out.add(
                at_least(f"{what}: tokens a second", ours["per_s"], 200_000),
                at_most(f"{what}: user-mode CPU a token", ours["user_us"], 0.8, " us", 2),
            )
            if "floor" in found:
                ratio = ours["cpu_us"] / found["floor"]["cpu_us"]
                self.out.add(at_most(f"{what}: CPU, of the C floor's", ratio, 1.3, "x", 2))
            for peer, shape, target in (("vllm", "vLLM", 4.0), ("sglang", "SGLang", 2.3)):
                if f"fastapi-{peer}" in found:
                    ratio = ours["per_s"] / found[f"fastapi-{peer}"]["per_s"]
                    name = f"{what}: tokens a second, of FastAPI's in {shape}'s shape"
                    self.out.add(at_least(name, ratio, target, "x", 2))

    def ticks(self) -> None:
        """A token for each of 256 streams every 2 ms."""
        names = [OURS, *(name for name in self.peers if name == "floor")]
        found = self._streams(names, 256, 256 * TICK_TOKENS, TICK_US)[OURS]
        share = found["cpu_us"] * found["per_s"] / 1e6
        self.out.text(f"Server: {share:.2f} of a core.")
        what = "256 streams at 2 ms ticks"
        self.out.add(
            at_most(f"{what}: tokens an event", found["merged"], 1.0, "", 2),
            at_least(f"{what}: tokens a second of 128,000", found["per_s"], 126_000),
            at_most(f"{what}: inter-token p99", found["itl_p99"], 2.8, " ms", 2),
        )

    def lag(self) -> None:
        """An engine of 1,280,000 tokens a second: what the loop or a client lags is merged."""
        for n in (64, 256):
            tick_us = n * 1_000_000 // FAST_ENGINE_PER_S
            found = self._streams([OURS], n, 2 * FAST_ENGINE_PER_S, tick_us)[OURS]
            what = f"{n} streams that lag"
            self.out.add(
                at_least(f"{what}: tokens a second", found["per_s"], 800_000),
                at_most(f"{what}: CPU a token", found["cpu_us"], 1.2, " us", 2),
            )

    def requests(self) -> None:
        """Requests of one token that are not streamed, 64 connections."""
        chat = {"messages": [{"role": "user", "content": SENTENCE}], "temperature": 0.7}
        cases: tuple[tuple[str, str, dict[str, Any], int], ...] = (
            ("token ids, no text", "/v1/completions", {"prompt": list(range(100, 108))}, 50_000),
            ("short chat", "/v1/chat/completions", chat, 20_000),
        )
        names = [OURS, *(name for name in self.peers if name == "floor")]
        lines = []
        with ExitStack() as stack:
            servers = {name: stack.enter_context(self.server(name)) for name in names}
            for case, path, fields, target in cases:
                rows: dict[str, list[Row]] = {name: [] for name in names}
                for _ in range(self.options.rounds):
                    for name in names:
                        found = self.loads.requests(
                            servers[name], self.options.requests, path, fields
                        )
                        rows[name].append(found)
                for name, several in rows.items():
                    row = median(several)
                    costs = [f"{row[key]:.1f}" for key in ("cpu_us", "user_us", "system_us")]
                    lines.append([case, name, f"{row['per_s']:,.0f}", *costs])
                    if name == OURS:
                        what = f"requests of one token a second, {case}"
                        self.out.add(at_least(what, row["per_s"], target))
        self.out.table(["request", "server", "a second", "CPU us", "user", "system"], lines)

    def long(self) -> None:
        """A chat of a thousand tokens: from the bytes of its body to ids, in this process."""
        from minisgl_fast.api.openai_request import parse_chat
        from minisgl_fast.text.template import ChatTemplate
        from minisgl_fast.text.tokenizer import Tokenizer

        with self.server() as _:
            pass  # unpacks the tokenizer
        tokenizer = Tokenizer.load(self.folder / "qwen3")
        is_fast = tokenizer.accelerate()
        template = ChatTemplate.load(self.folder / "qwen3")
        source = Path(argparse.__file__).read_text()
        costs, walls, lengths = [], [], []
        for index in range(200):
            content = source[index * 211 : index * 211 + 4700]
            body = json.dumps({"messages": [{"role": "user", "content": content}]}).encode()
            cpu_s, wall_s = time.thread_time(), time.perf_counter()
            _, messages = parse_chat(body)
            ids = tokenizer.encode(template.render(messages))
            walls.append((time.perf_counter() - wall_s) * 1e6)
            costs.append((time.thread_time() - cpu_s) * 1e6)
            lengths.append(len(ids))
        tokenizer.close()
        cost, stall = statistics.median(costs), percentile(walls, 99)
        self.out.text(
            f"Chat of {statistics.median(lengths):.0f} tokens, body to ids "
            f"({'fastokens' if is_fast else 'tokenizers'}): {cost:.0f} us of CPU; the call, in the "
            f"loop: p99 {stall:.0f} us, longest of {len(walls)} {max(walls):.0f} us."
        )
        self.out.add(
            at_most("chat of 1,000 tokens, body to ids: CPU", cost, 100, " us"),
            at_most("chat of 1,000 tokens: stall of the loop, p99", stall, 300, " us"),
        )

    def burst(self) -> None:
        """64 chats of a thousand tokens at once, 2 ms ticks."""
        words = ["--dataset", "random", "--input-len", "1000"]
        with self.server(tick_us=TICK_US) as server:
            self.loads.bench(server, 64, 20, words)  # warm: every code path, not these prompts
            reports = [
                self.loads.bench(server, 64, 20, [*words, "--seed", str(seed + 1)])
                for seed in range(self.options.rounds)
            ]
        p50, p99 = (
            statistics.median(report[f"{name}_ttft_ms"] for report in reports)
            for name in ("median", "p99")
        )
        self.out.text(f"TTFT p50 {p50:.1f} ms, p99 {p99:.1f} ms.")
        self.out.add(at_most("burst of 64 chats of 1,000 tokens: TTFT p50", p50, 12, " ms", 1))

    def idle(self) -> None:
        """Memory of idle connections, of the second half of them: the first fills what was free."""
        clients: list[socket.socket] = []

        def connect(num: int) -> None:
            for _ in range(num):
                client = socket.create_connection(("127.0.0.1", server.port))
                client.sendall(b"GET /health HTTP/1.1\r\nHost: a\r\n\r\n")
                clients.append(client)
            for client in clients[-num:]:
                client.recv(4096)
            time.sleep(0.5)

        with self.server(small=True) as server:
            connect(NUM_IDLE // 2)
            before = server.rss_kb()
            connect(NUM_IDLE // 2)
            each = (server.rss_kb() - before) * 1024 / (NUM_IDLE // 2)
            for client in clients:
                client.close()
        self.out.text(
            f"{NUM_IDLE:,} idle connections after a request each: {each:,.0f} bytes each."
        )
        self.out.add(at_most(f"{NUM_IDLE:,} idle connections: each", each, 8_000, " bytes"))

    def many(self) -> None:
        """2,000 streams at once."""
        with self.server(tick_us=MANY_TICK_US) as server:
            report = self.loads.bench(server, NUM_MANY, 40)
        self.out.text(
            f"{NUM_MANY:,} streams at once: {report['completed']} completed, {report['failed']} "
            f"failed, {report['output_throughput']:,.0f} tokens/s."
        )
        self.out.add(at_most(f"{NUM_MANY:,} concurrent streams: errors", report["failed"], 0))

    def cache(self) -> None:
        """The prefix cache, by bench_sched.py."""
        command = [sys.executable, str(ROOT / "tools" / "bench_sched.py")]
        lines = subprocess.run(command, stdout=subprocess.PIPE, text=True).stdout.splitlines()
        for line in lines:
            if line.startswith("trace") and "all" in line:
                what, costs = line[:58].strip(), line[58:].split()
                self.out.add(at_most(f"prefix cache, {what}", float(costs[0]), 8, " us", 1))

    # Parts

    def _streams(
        self, names: Sequence[str], n: int, num_tokens: int, tick_us: int = 0
    ) -> dict[str, Row]:
        """Runs of n streams, in turns; prints the medians and returns them by server."""
        rows: dict[str, list[Row]] = {name: [] for name in names}
        with ExitStack() as stack:
            servers = {
                name: stack.enter_context(self.server(name, tick_us, paced=not tick_us))
                for name in names
            }
            for server in servers.values():
                self.loads.bench(server, n, 20)
            for _ in range(self.options.rounds):
                for name, server in servers.items():
                    num = PEER_TOKENS if name.startswith("fastapi") else num_tokens
                    rows[name].append(self.loads.streams(server, n, num // n))
        found = {name: median(several) for name, several in rows.items()}
        floor = found["floor"]["cpu_us"] if "floor" in found else 0.0
        lines = []
        for name, row in found.items():
            costs = [f"{row[key]:.2f}" for key in ("cpu_us", "user_us", "system_us")]
            ratio = f"{row['cpu_us'] / floor:.2f}" if floor else ""
            keys = ("merged", "ttft_p50", "ttft_p99", "itl_p50", "itl_p99", "client_us")
            rest = [f"{row[key]:.2f}" for key in keys]
            lines.append([name, str(n), f"{row['per_s']:,.0f}", *costs, ratio, *rest])
        self.out.table(STREAM_HEADS, lines)
        return found


SECTIONS: tuple[Callable[[Bench], None], ...] = (
    Bench.stream, Bench.ticks, Bench.lag, Bench.requests, Bench.long, Bench.burst, Bench.idle,
    Bench.many, Bench.cache,
)  # fmt: skip


def main() -> None:
    names = [section.__name__ for section in SECTIONS]
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("sections", nargs="*", choices=[[], *names], default=[])
    parser.add_argument("--requests", type=int, default=20_000, help="of each case, not streamed")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--server-cpu", type=int, default=0)
    parser.add_argument("--client-cpu", type=int, default=min(1, (os.cpu_count() or 1) - 1))
    parser.add_argument("--no-peers", action="store_true")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="a page with marks for it")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bench-front-") as folder:
        bench = Bench(options, Path(folder))
        for section in SECTIONS:
            if not options.sections or section.__name__ in options.sections:
                bench.out.text((section.__doc__ or "").partition("\n")[0])
                section(bench)
    bench.out.text("Beside the targets:")
    bench.out.summary()
    if options.markdown is not None:
        bench.out.write_into(options.markdown, "bench_front.py")


if __name__ == "__main__":
    main()
