#!/usr/bin/env python3
"""The frontend alone: what a streamed token and a request cost, beside peers and a bare C writer.

    tools/bench_front.py                              every figure, about five minutes
    tools/bench_front.py stream lag --rounds 5        only some sections
    tools/bench_front.py --markdown docs/benchmarks.md    and write the tables into that page

The server is ``minisgl-fast --fake-engine`` with Qwen3's tokenizer, alone on --server-cpu; its
engine and the client, ``minisgl-fast bench``, are on --client-cpu. Peers, where gcc and FastAPI are
there: a bare epoll writer in C (front/floor.c), the floor, and FastAPI in the chunk shapes of vLLM
and SGLang (front/fastapi_app.py); they take turns in every round. Medians over the quietest rounds
(front/front_rounds.py: one that lost much of its time to others is made again); CPU is the
server process's. The last table has each figure beside its target.
"""

from __future__ import annotations

import argparse
import itertools
import json
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tools" / "front"))

from front_figures import at_least, at_most  # noqa: E402
from front_loads import SENTENCE, median, percentile  # noqa: E402
from front_main import Bench, make_parser, run  # noqa: E402
from front_rounds import LOST, Row, lost_text  # noqa: E402
from front_servers import FLOOR, FLOOR_MERGED, OURS, Server, available_peers  # noqa: E402

# Tokens of one run: enough for the kernel's ticks, which tell user from system time.
FAST_TOKENS, PEER_TOKENS = 600_000, 60_000
TICK_US, TICK_TOKENS = 2000, 2500
FAST_ENGINE_PER_S = 1_280_000  # tokens a second of an engine that is faster than any writer
NUM_IDLE = 10_000
NUM_MANY = 2_000
MANY_TICK_US = 50_000
STREAM_HEADS = (
    "server", "streams", "tokens/s", "CPU us", "user", "system", "of floor", "tokens/event",
    "TTFT p50", "p99 ms", "ITL p50", "p99 ms", "client us/event", "its core", "lost",
)  # fmt: skip


class Front(Bench):
    """The sections, and what they share."""

    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        super().__init__(options, folder)
        self.peers = [] if options.no_peers else available_peers()

    # Sections

    def stream(self) -> None:
        """Streams as fast as they are taken, one event a token."""
        for n in (64, 256):
            found = self._streams([OURS, *self.peers], n, FAST_TOKENS)
            ours, floor = found[OURS], found.get(FLOOR, {})
            what = f"{n} streams, one event a token"
            per_s, user_us = floor.get("per_s"), floor.get("user_us")
            self.out.add(
                at_least(f"{what}: tokens a second", ours["per_s"], 200_000, floor=per_s),
                at_most(f"{what}: user-mode CPU a token", ours["user_us"], 0.8, " us", 2, user_us),
            )
            if floor:
                ratio = ours["cpu_us"] / floor["cpu_us"]
                self.out.add(at_most(f"{what}: CPU, of the C floor's", ratio, 1.3, "x", 2))
            for peer, shape, target in (("vllm", "vLLM", 4.0), ("sglang", "SGLang", 2.3)):
                if f"fastapi-{peer}" in found:
                    ratio = ours["per_s"] / found[f"fastapi-{peer}"]["per_s"]
                    name = f"{what}: tokens a second, of FastAPI's in {shape}'s shape"
                    self.out.add(at_least(name, ratio, target, "x", 2))

    def ticks(self) -> None:
        """A token for each of 256 streams every 2 ms."""
        rows = self._streams(self.with_floor, 256, 256 * TICK_TOKENS, TICK_US)
        found, floor = rows[OURS], rows.get(FLOOR, {})
        share = found["cpu_us"] * found["per_s"] / 1e6
        self.out.text(f"Server: {share:.2f} of a core.")
        what = "256 streams at 2 ms ticks"
        per_s, p99 = floor.get("per_s"), floor.get("itl_p99")
        self.out.add(
            at_most(f"{what}: tokens an event", found["merged"], 1.0, "", 2, floor.get("merged")),
            at_least(f"{what}: tokens a second of 128,000", found["per_s"], 126_000, floor=per_s),
            at_most(f"{what}: inter-token p99", found["itl_p99"], 2.8, " ms", 2, p99),
        )

    def lag(self) -> None:
        """An engine of 1,280,000 tokens a second: what the loop or a client lags is merged."""
        names = [OURS, *(FLOOR_MERGED for name in self.peers if name == FLOOR)]
        for n in (64, 256):
            tick_us = n * 1_000_000 // FAST_ENGINE_PER_S
            rows = self._streams(names, n, 2 * FAST_ENGINE_PER_S, tick_us)
            found, floor = rows[OURS], rows.get(FLOOR_MERGED, {})
            what = f"{n} streams that lag"
            per_s, cpu_us = floor.get("per_s"), floor.get("cpu_us")
            self.out.add(
                at_least(f"{what}: tokens a second", found["per_s"], 800_000, floor=per_s),
                at_most(f"{what}: CPU a token", found["cpu_us"], 1.2, " us", 2, cpu_us),
            )

    def requests(self) -> None:
        """Requests of one token that are not streamed, 64 connections."""
        chat = {"messages": [{"role": "user", "content": SENTENCE}], "temperature": 0.7}
        cases: tuple[tuple[str, str, dict[str, Any], int], ...] = (
            ("token ids, no text", "/v1/completions", {"prompt": list(range(100, 108))}, 50_000),
            ("short chat", "/v1/chat/completions", chat, 20_000),
        )
        lines = []
        with ExitStack() as stack:
            servers = {name: stack.enter_context(self.server(name)) for name in self.with_floor}
            for case, path, fields, target in cases:
                run_of = partial(self._requests, path=path, fields=fields)
                taken = self.rounds.take({name: partial(run_of, s) for name, s in servers.items()})
                found = {name: median(several) for name, several in taken.items()}
                for name, row in found.items():
                    costs = [f"{row[key]:.1f}" for key in ("cpu_us", "user_us", "system_us")]
                    lines.append([case, name, f"{row['per_s']:,.0f}", *costs, lost_text(row)])
                what = f"requests of one token a second, {case}"
                floor = found.get(FLOOR, {}).get("per_s")
                self.out.add(at_least(what, found[OURS]["per_s"], target, floor=floor))
        heads = ["request", "server", "a second", "CPU us", "user", "system", "lost"]
        self.out.table(heads, lines)

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
        seeds = itertools.count()

        def run_of(server: Server) -> Row:
            before = server.cpu_s()
            report = self.loads.bench(server, 64, 20, [*words, "--seed", str(next(seeds))])
            lost = server.cpu_s().since(before).waited / report["duration"]
            return {"p50": report["median_ttft_ms"], "p99": report["p99_ttft_ms"], LOST: lost}

        with ExitStack() as stack:
            servers = {
                name: stack.enter_context(self.server(name, TICK_US, paced=False))
                for name in self.with_floor
            }
            for server in servers.values():
                run_of(server)  # warm: every code path, not these prompts
            taken = self.rounds.take({name: partial(run_of, s) for name, s in servers.items()})
        found = {name: median(several) for name, several in taken.items()}
        heads = ["server", "TTFT p50 ms", "p99 ms", "lost"]
        lines = [
            [name, f"{row['p50']:.1f}", f"{row['p99']:.1f}", lost_text(row)]
            for name, row in found.items()
        ]
        self.out.table(heads, lines)
        what, floor = "burst of 64 chats of 1,000 tokens: TTFT p50", found.get(FLOOR, {})
        self.out.add(at_most(what, found[OURS]["p50"], 12, " ms", 1, floor.get("p50")))

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

    @property
    def with_floor(self) -> list[str]:
        """This server, and the floor where it can be built."""
        return [OURS, *(name for name in self.peers if name == FLOOR)]

    def _requests(self, server: Server, path: str, fields: dict[str, Any]) -> Row:
        return self.loads.requests(server, self.options.requests, path, fields)

    def _streams(
        self, names: Sequence[str], n: int, num_tokens: int, tick_us: int = 0
    ) -> dict[str, Row]:
        """Runs of n streams, in turns; prints the medians and returns them by server."""
        cases: dict[str, Callable[[], Row]] = {}
        with ExitStack() as stack:
            for name in names:
                server = stack.enter_context(self.server(name, tick_us, paced=not tick_us))
                self.loads.bench(server, n, 20)
                num = PEER_TOKENS if name.startswith("fastapi") else num_tokens
                cases[name] = partial(self.loads.streams, server, n, num // n)
            taken = self.rounds.take(cases)
        found = {name: median(several) for name, several in taken.items()}
        floor = sum(row["cpu_us"] for name, row in found.items() if name.startswith(FLOOR))
        lines = []
        for name, row in found.items():
            costs = [f"{row[key]:.2f}" for key in ("cpu_us", "user_us", "system_us")]
            ratio = f"{row['cpu_us'] / floor:.2f}" if floor else ""
            keys = (
                *("merged", "ttft_p50", "ttft_p99", "itl_p50", "itl_p99"),
                *("client_us", "client_share"),
            )
            rest = [*(f"{row[key]:.2f}" for key in keys), lost_text(row)]
            lines.append([name, str(n), f"{row['per_s']:,.0f}", *costs, ratio, *rest])
        self.out.table(STREAM_HEADS, lines)
        return found


SECTIONS: tuple[Callable[[Front], None], ...] = (
    Front.stream, Front.ticks, Front.lag, Front.requests, Front.long, Front.burst, Front.idle,
    Front.many, Front.cache,
)  # fmt: skip


def main() -> None:
    parser = make_parser(__doc__, [section.__name__ for section in SECTIONS])
    parser.add_argument("--requests", type=int, default=50_000, help="of each case, not streamed")
    parser.add_argument("--no-peers", action="store_true")
    run(parser, Front, SECTIONS)


if __name__ == "__main__":
    main()
