#!/usr/bin/env python3
"""The frontend alone: what a streamed token and a request cost, beside peers and a bare C writer.

    tools/bench_front.py                     every figure, three interleaved rounds, some minutes
    tools/bench_front.py stream --rounds 5   only some sections: stream, ticks, lag, requests, long,
                                             burst, idle, many, cache

The server is ``minisgl-fast --fake-engine`` with Qwen3's tokenizer, alone on --server-cpu; its
engine and the client, ``minisgl-fast bench``, are on --client-cpu. Peers, where gcc and FastAPI are
there: a bare epoll writer in C (front/floor.c), the floor, and FastAPI in the chunk shapes of vLLM
and SGLang (front/fastapi_app.py). Medians over the rounds; CPU is the server process's.
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
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tools" / "front"))

from front_servers import OURS, Server, available_peers, compiled, started  # noqa: E402

Rows = dict[str, list[dict[str, float]]]
SENTENCE = "the quick brown fox jumps over the lazy dog while a small server streams tokens to many"
NUM_IDLE = 10_000


class Bench:
    """The sections, and what they share."""

    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        self.options = options
        self.folder = folder
        self.peers = [OURS] if options.no_peers else [OURS, *available_peers()]

    def server(self, name: str = OURS, tick_us: int = 0, **more: bool) -> Any:
        options = self.options
        cpus = options.server_cpu, options.client_cpu
        return started(name, self.folder, *cpus, tick_us, **more)

    # Sections

    def stream(self) -> None:
        """One event a token, as fast as they are taken."""
        self._streams("saturated", 0, self.peers)

    def ticks(self) -> None:
        """A token for every stream each 2 ms."""
        self._streams("2 ms ticks", 2000, [*self.peers[:2]], (256,))

    def lag(self) -> None:
        """An engine that does not wait for the client: what cannot be sent at once is merged."""
        self._streams("nobody waits for the client", 0, [OURS], (64,), paced=False)

    def requests(self) -> None:
        """Requests of one token that are not streamed, 64 connections."""
        chat = {"messages": [{"role": "user", "content": SENTENCE}], "temperature": 0.7}
        self._print_requests(
            "requests a second",
            (
                ("token ids, no text", "/v1/completions", {"prompt": list(range(100, 108))}),
                ("short chat", "/v1/chat/completions", chat),
            ),
        )

    def long(self) -> None:
        """A chat of a thousand tokens: bytes of the body to ids, in this process."""
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
        print(
            f"\nchat of {statistics.median(lengths):.0f} tokens, body to ids "
            f"({'fastokens' if is_fast else 'tokenizers'}): {statistics.median(costs):.0f} us of "
            f"CPU (p99 of the call, in the loop: {_percentile(walls, 99):.0f} us)",
            flush=True,
        )
        tokenizer.close()

    def burst(self) -> None:
        """64 chats of a thousand tokens at once, 2 ms ticks."""
        ttfts: list[float] = []
        for _ in range(self.options.rounds):
            with self.server(tick_us=2000) as server:
                words = ["--dataset", "random", "--input-len", "1000"]
                self._load(server, 64, 20, words)  # warm: every code path, not these prompts
                report = self._load(server, 64, 20, [*words, "--seed", "1"])
            ttfts.append(report["median_ttft_ms"])
        print(f"\nburst of 64 chats of 1,000 tokens: TTFT p50 {statistics.median(ttfts):.1f} ms")

    def idle(self) -> None:
        """Memory of idle connections: of the second half, as the first fills what was free."""
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
            each = (server.rss_kb() - before) / (NUM_IDLE // 2)
            for client in clients:
                client.close()
        print(f"\n{NUM_IDLE:,} idle connections after a request each: {each:.1f} kB each")

    def many(self) -> None:
        """2,000 streams at once."""
        with self.server(tick_us=50_000) as server:
            report = self._load(server, 2000, 40, ["--dataset", "fixed", "--prompt", SENTENCE])
        print(
            f"\n2,000 streams at once: {report['completed']} completed, {report['failed']} failed, "
            f"{report['output_throughput']:,.0f} tokens/s"
        )

    def cache(self) -> None:
        """The prefix cache, by bench_sched.py."""
        command = [sys.executable, str(ROOT / "tools" / "bench_sched.py")]
        lines = subprocess.run(command, stdout=subprocess.PIPE, text=True).stdout.splitlines()
        print("\nprefix cache (tools/bench_sched.py), microseconds a request")
        print("\n".join(line for line in lines if "trace" in line or "median" in line))

    # Parts

    def _streams(
        self,
        title: str,
        tick_us: int,
        names: Sequence[str],
        counts: Sequence[int] | None = None,
        paced: bool = True,
    ) -> None:
        print(
            f"\n{title:29} {'n':>4} {'tokens/s':>9} {'CPU us':>7} {'user':>6} {'system':>7} "
            f"{'of floor':>8} {'merged':>7} {'ttft p50/99 ms':>16} {'itl p50/99 ms':>16} "
            f"{'client us':>9}",
            flush=True,
        )
        for n in counts or [int(part) for part in self.options.streams.split(",")]:
            rows: Rows = {name: [] for name in names}
            for _ in range(self.options.rounds):
                for name in names:
                    rows[name].append(self._stream_once(name, n, tick_us, paced))
            floor = _median(rows["floor"])["cpu_us"] if "floor" in rows else 0.0
            for name, found in rows.items():
                row = _median(found)
                ratio = f"{row['cpu_us'] / floor:8.2f}" if floor else f"{'':8}"
                print(
                    f"{name:29} {n:4} {row['tokens_per_s']:9,.0f} {row['cpu_us']:7.2f} "
                    f"{row['user_us']:6.2f} {row['system_us']:7.2f} {ratio} {row['merged']:7.2f} "
                    f"{row['ttft_p50']:8.2f}/{row['ttft_p99']:7.2f} "
                    f"{row['itl_p50']:8.2f}/{row['itl_p99']:7.2f} {row['client_us']:9.2f}",
                    flush=True,
                )

    def _stream_once(self, name: str, n: int, tick_us: int, paced: bool) -> dict[str, float]:
        num_tokens = self.options.tokens
        prompt = ["--dataset", "fixed", "--prompt", SENTENCE]
        with self.server(name, tick_us, paced=paced) as server:
            self._load(server, n, 20, prompt)
            before = server.cpu_s()
            report = self._load(server, n, num_tokens, prompt)
            cpu = server.cpu_s().since(before)
        if report["failed"]:
            raise RuntimeError(f"{name}: {report['minisgl_fast']['error_messages']}")
        tokens, own = n * num_tokens, report["minisgl_fast"]
        client_s = own["client"]["cpu_share"] * report["duration"]
        return {
            "tokens_per_s": tokens / report["duration"],
            "cpu_us": cpu.total / tokens * 1e6,
            "user_us": cpu.user / tokens * 1e6,
            "system_us": cpu.system / tokens * 1e6,
            "merged": own["tokens_per_event"],
            "client_us": client_s / tokens * own["tokens_per_event"] * 1e6,
            "ttft_p50": report["median_ttft_ms"],
            "ttft_p99": report["p99_ttft_ms"],
            "itl_p50": report["median_itl_ms"],
            "itl_p99": report["p99_itl_ms"],
        }

    def _load(
        self, server: Server, num_streams: int, num_tokens: int, more: Sequence[str]
    ) -> dict[str, Any]:
        """One run of ``minisgl-fast bench``; its JSON."""
        file = self.folder / "report.json"
        command = ["taskset", "-c", str(self.options.client_cpu), sys.executable]
        command += ["-m", "minisgl_fast", "bench", "--base-url", server.url, "--model", "fake"]
        command += ["--num-prompts", str(num_streams), "--max-concurrency", str(num_streams)]
        command += ["--output-len", str(num_tokens), "--warm-up", "0", "--quiet"]
        command += ["--credit-file", str(server.credit), "--json", str(file), *more]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        report: dict[str, Any] = json.loads(file.read_text())
        return report

    def _print_requests(self, title: str, cases: Sequence[tuple[str, str, dict[str, Any]]]) -> None:
        client = compiled("requests", self.folder)
        names = [name for name in self.peers if name in (OURS, "floor")]
        print(
            f"\n{title:29} {'server':>14} {'a second':>9} {'CPU us':>7} {'user':>6} {'system':>7}"
        )
        for case, path, fields in cases:
            rows: Rows = {name: [] for name in names}
            for _ in range(self.options.rounds):
                for name in names:
                    with self.server(name) as server:
                        rows[name].append(self._requests_once(client, server, path, fields))
            for name, found in rows.items():
                row = _median(found)
                print(
                    f"{case:29} {name:>14} {row['per_s']:9,.0f} {row['cpu_us']:7.1f} "
                    f"{row['user_us']:6.1f} {row['system_us']:7.1f}",
                    flush=True,
                )

    def _requests_once(
        self, client: Path, server: Server, path: str, fields: dict[str, Any]
    ) -> dict[str, float]:
        body = json.dumps({"model": "fake", "max_tokens": 1, **fields}).encode()
        file = self.folder / "request"
        file.write_bytes(
            b"POST %b HTTP/1.1\r\nHost: 127.0.0.1:%d\r\nContent-Type: application/json\r\n"
            b"Content-Length: %d\r\n\r\n%b" % (path.encode(), server.port, len(body), body)
        )

        def run(num_rounds: int) -> dict[str, float]:
            command = [client, server.port, 64, num_rounds, file, self.options.client_cpu]
            done = subprocess.run(list(map(str, command)), check=True, stdout=subprocess.PIPE)
            found: dict[str, float] = json.loads(done.stdout)
            if found["failed"]:
                raise RuntimeError(f"{server.name}: {found}")
            return found

        run(30)
        before = server.cpu_s()
        found = run(self.options.requests // 64)
        cpu = server.cpu_s().since(before)
        return {
            "per_s": found["completed"] / found["seconds"],
            "cpu_us": cpu.total / found["completed"] * 1e6,
            "user_us": cpu.user / found["completed"] * 1e6,
            "system_us": cpu.system / found["completed"] * 1e6,
        }


def _median(rows: Sequence[dict[str, float]]) -> dict[str, float]:
    return {key: statistics.median(row[key] for row in rows) for key in rows[0]}


def _percentile(values: Sequence[float], percent: int) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) * percent // 100, len(ordered) - 1)]


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
    parser.add_argument("-n", "--streams", default="64,256", help="numbers of streams")
    parser.add_argument("--tokens", type=int, default=1500, help="of each stream")
    parser.add_argument("--requests", type=int, default=20_000, help="of each case")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--server-cpu", type=int, default=0)
    parser.add_argument("--client-cpu", type=int, default=min(1, (os.cpu_count() or 1) - 1))
    parser.add_argument("--no-peers", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bench-front-") as folder:
        bench = Bench(options, Path(folder))
        for section in SECTIONS:
            if not options.sections or section.__name__ in options.sections:
                section(bench)


if __name__ == "__main__":
    main()
