#!/usr/bin/env python3
"""The load client alone: what an event costs it, 10,000 streams, and whether its figures are right.

    tools/bench_client.py                             every section, about a minute
    tools/bench_client.py events --rounds 5           only some: events, streams, agree
    tools/bench_client.py --reference sse_load.py     also beside that client (it needs gcc)
    tools/bench_client.py --markdown docs/benchmarks.md   and write the tables into that page

``events`` and ``streams`` read from a bare epoll writer in C (front/floor.c), which is alone on
--server-cpu; the client, ``minisgl-fast bench`` with all that it records, is alone on --client-cpu.
``agree`` loads ``minisgl-fast --fake-engine``: the server's own /metrics must say the same, and so
must a reference client, a Python file with ``run_once(url, streams, tokens, ...)``, in turns.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
import tempfile
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tools" / "front"))

from front_figures import Output, at_least, at_most  # noqa: E402
from front_loads import SENTENCE, Loads, Row, median, stream_row  # noqa: E402
from front_servers import OURS, Server, started  # noqa: E402

EVENTS_PER_S = 200_000
NUM_STREAMS, STREAM_TICK_US, STREAM_TOKENS = 10_000, 100_000, 50
# Requests follow each other on a connection, so each waits for a whole tick: times that depend on
# the pace of the engine and hardly on the machine. Few streams: the server's clock begins when it
# takes a request, the client's when that is sent, and between the two lie those before it.
AGREE_STREAMS, AGREE_REQUESTS, AGREE_TOKENS = 4, 12, 8
AGREE_TICK_US = 100_000
TOLERANCE = 0.02


class Bench:
    """The sections, and what they share."""

    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        self.options = options
        self.folder = folder
        self.loads = Loads(folder, options.client_cpu)
        self.out = Output()

    def server(self, name: str, tick_us: int, paced: bool = False) -> Any:
        cpus = self.options.server_cpu, self.options.client_cpu
        return started(name, self.folder, *cpus, tick_us, paced=paced)

    def events(self) -> None:
        """Events of one token each: 200,000 a second, and as many as the writer makes."""
        lines = []
        for n in (64, 256, 1000):
            tick_us = n * 1_000_000 // EVENTS_PER_S
            for what, pace in ((f"{EVENTS_PER_S:,} a second", tick_us), ("all it can", 0)):
                with self.server("floor", pace, paced=not pace) as server:
                    num_tokens = 2 * EVENTS_PER_S // n
                    self.loads.bench(server, n, 20)
                    rows = [
                        stream_row(self.loads.bench(server, n, num_tokens), n * num_tokens)
                        for _ in range(self.options.rounds)
                    ]
                row = median(rows)
                lines.append([what, str(n), *_cost_cells(row)])
                if pace:
                    name = f"load client, {n} streams: events a second of one core"
                    self.out.add(at_least(name, 1e6 / row["client_us"], EVENTS_PER_S))
        heads = ["the writer makes", "streams", "events/s", "of a core"]
        heads += ["CPU us an event", "user", "system", "events a read", "loop late p99 ms"]
        self.out.table(heads, lines)

    def streams(self) -> None:
        """10,000 streams at once, 100,000 events a second."""
        lines = []
        for name in ("floor", OURS):
            with self.server(name, STREAM_TICK_US) as server:
                report = self.loads.bench(server, NUM_STREAMS, STREAM_TOKENS)
            row = stream_row(report, max(1, report["completed"]) * STREAM_TOKENS)
            limits = ", ".join(report["minisgl_fast"]["client"]["limits"]) or "no"
            done = [str(report["completed"]), str(report["failed"])]
            lines.append([name, *done, *_cost_cells(row), limits])
            self.out.add(
                at_most(f"load client, 10,000 streams of {name}: errors", report["failed"], 0)
            )
        heads = ["server", "completed", "failed", "events/s", "of a core", "CPU us an event"]
        heads += ["user", "system", "events a read", "loop late p99 ms", "was it the limit?"]
        self.out.table(heads, lines)

    def agree(self) -> None:
        """The same load by this client and by others, and what the server says of it."""
        mine: list[Row] = []
        servers: list[Row] = []
        theirs: list[Row] = []
        reference = None if self.options.reference is None else _load(self.options.reference)
        with self.server(OURS, AGREE_TICK_US) as server:
            for _ in range(self.options.rounds):
                before = _metrics(server)
                mine.append(self._mine(server))
                servers.append(_server_row(before, _metrics(server)))
                if reference is not None:
                    theirs.append(self._theirs(server, reference))
        own, metrics = median(mine), median(servers)
        others = median(theirs) if theirs else {}
        lines = []
        for key in own:
            cells = [key, f"{own[key]:,.3f}"]
            for name, found in (("/metrics", metrics), ("the reference client", others)):
                if key not in found:
                    cells += ["", ""]
                    continue
                ratio = own[key] / found[key]
                cells += [f"{found[key]:,.3f}", f"{ratio:.4f}"]
                is_count = "ms" not in key
                off = abs(ratio - 1) * 100
                target = 0.0 if is_count else TOLERANCE * 100
                self.out.add(at_most(f"{key}, off from {name}", off, target, " %", 2))
            lines.append(cells)
        heads = ["", "this client", "/metrics", "ratio", "reference client", "ratio"]
        self.out.table(heads, lines)

    def _mine(self, server: Server) -> Row:
        words = ["--dataset", "fixed", "--prompt", SENTENCE, "--extra-body", '{"temperature":0}']
        num = AGREE_STREAMS * AGREE_REQUESTS
        words += ["--num-prompts", str(num)]
        report = self.loads.bench(server, AGREE_STREAMS, AGREE_TOKENS, words)
        if report["failed"]:
            raise RuntimeError(f"{report['minisgl_fast']['error_messages']}")
        counts = report["minisgl_fast"]["distributions"]
        return {
            "requests": report["completed"],
            "tokens": report["total_output_tokens"],
            "gaps between events": counts["itl"]["count"],
            "TTFT mean, ms": report["mean_ttft_ms"],
            "TTFT p50, ms": report["median_ttft_ms"],
            "TTFT p99, ms": report["p99_ttft_ms"],
            "ITL mean, ms": report["mean_itl_ms"],
            "ITL p50, ms": report["median_itl_ms"],
            "ITL p99, ms": report["p99_itl_ms"],
        }

    def _theirs(self, server: Server, run_once: Callable[..., dict[str, Any]]) -> Row:
        found = run_once(
            server.url,
            AGREE_STREAMS,
            AGREE_TOKENS,
            rounds=AGREE_REQUESTS,
            client_cpu=self.options.client_cpu,
            build_dir=str(self.folder),
            req_kw={"model": "fake"},
        )
        if found["errors"] or found["timed_out"]:
            raise RuntimeError(f"the reference client: {found}")
        row = {
            "requests": found["requests_done"],
            "tokens": found["chunks"],
            "gaps between events": found["chunks"] - found["requests_done"],
        }
        for name, key in (("TTFT", "ttft_us"), ("ITL", "itl_us")):
            for percent in ("p50", "p99"):
                row[f"{name} {percent}, ms"] = found[key][percent] / 1e3
        return row


def _cost_cells(row: Row) -> list[str]:
    system_us = row["client_us"] - row["client_user_us"]
    return [
        f"{row['per_s']:,.0f}",
        f"{row['client_share']:.2f}",
        f"{row['client_us']:.2f}",
        f"{row['client_user_us']:.2f}",
        f"{system_us:.2f}",
        f"{row['events_per_read']:.2f}",
        f"{row['client_lag_ms']:.1f}",
    ]


def _load(path: Path) -> Callable[..., dict[str, Any]]:
    spec = importlib.util.spec_from_file_location("reference_client", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    run_once: Callable[..., dict[str, Any]] = module.run_once
    return run_once


def _metrics(server: Server) -> Row:
    """The unlabelled metrics of the server."""
    with urllib.request.urlopen(f"{server.url}/metrics") as answer:
        lines = answer.read().decode().splitlines()
    fields = (line.split() for line in lines if line[:1].isalpha() and "{" not in line)
    return {name.removeprefix("minisgl_"): float(value) for name, value in fields}


def _server_row(before: Row, after: Row) -> Row:
    past = {name: after[name] - before.get(name, 0.0) for name in after}

    def mean_ms(name: str) -> float:
        return past[f"{name}_seconds_sum"] / past[f"{name}_seconds_count"] * 1e3

    return {
        "requests": past["time_to_first_token_seconds_count"],
        "tokens": past["generated_tokens_total"],
        "gaps between events": past["inter_token_seconds_count"],
        "TTFT mean, ms": mean_ms("time_to_first_token"),
        "ITL mean, ms": mean_ms("inter_token"),
    }


SECTIONS: tuple[Callable[[Bench], None], ...] = (Bench.events, Bench.streams, Bench.agree)


def main() -> None:
    names = [section.__name__ for section in SECTIONS]
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("sections", nargs="*", choices=[[], *names], default=[])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--server-cpu", type=int, default=0)
    parser.add_argument("--client-cpu", type=int, default=min(1, (os.cpu_count() or 1) - 1))
    parser.add_argument("--reference", type=Path, metavar="FILE.py", help="another load client")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="a page with marks for it")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bench-client-") as folder:
        bench = Bench(options, Path(folder))
        for section in SECTIONS:
            if not options.sections or section.__name__ in options.sections:
                bench.out.text((section.__doc__ or "").partition("\n")[0])
                section(bench)
    bench.out.text("Beside the targets:")
    bench.out.summary()
    if options.markdown is not None:
        bench.out.write_into(options.markdown, "bench_client.py")


if __name__ == "__main__":
    main()
