#!/usr/bin/env python3
"""The load client alone: what an event costs it, 10,000 streams, and whether its figures are right.

    tools/bench_client.py                             every section, about two minutes
    tools/bench_client.py events --rounds 5           only some: events, streams, agree
    tools/bench_client.py --reference sse_load.py     also beside that client (it needs gcc)
    tools/bench_client.py --markdown docs/benchmarks.md   and write the tables into that page

``events`` and ``streams`` read from a bare epoll writer in C (front/floor.c), which is alone on
--server-cpu; the client, ``minisgl-fast bench`` with all that it records, is alone on --client-cpu.
``agree`` loads ``minisgl-fast --fake-engine``: the server's own /metrics must say the same, and so
must a reference client, a Python file with ``run_once(url, streams, tokens, ...)``, which loads the
same server at the same time with as many streams, so that both see the same ticks and stalls.
Medians over the quietest rounds, as in bench_front.py.
"""

from __future__ import annotations

import importlib.util
import statistics
import sys
import time
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tools" / "front"))

from front_figures import at_least, at_most  # noqa: E402
from front_loads import SENTENCE, median, stream_row  # noqa: E402
from front_main import Bench, make_parser, run  # noqa: E402
from front_rounds import Row, lost_text  # noqa: E402
from front_servers import FLOOR, OURS, Server  # noqa: E402

EVENTS_PER_S, EVENTS_SECONDS = 200_000, 2
NUM_STREAMS, STREAM_TICK_US, STREAM_TOKENS = 10_000, 100_000, 80
# Requests follow each other on a connection, so each waits for a whole tick: times that depend on
# the pace of the engine and hardly on the machine. Few streams: the server's clock begins when it
# takes a request, the client's when that is sent, and between the two lie those before it. Many
# requests, so that a percentile is none of the first ones, which wait for less than a tick.
AGREE_STREAMS, AGREE_REQUESTS, AGREE_TOKENS = 6, 52, 3
AGREE_TICK_US = 60_000
TOLERANCE = 0.02
METRICS, REFERENCE = "/metrics", "the reference client"
STARTED_TIMEOUT_S = 30.0


RunOnce = Callable[..., dict[str, Any]]


class LoadClient(Bench):
    """The sections, and what they share."""

    def events(self) -> None:
        """Events of one token each: 200,000 a second, and as many as the writer makes."""
        lines = []
        for n in (64, 256, 1000):
            tick_us = n * 1_000_000 // EVENTS_PER_S
            for what, pace in ((f"{EVENTS_PER_S:,} a second", tick_us), ("all it can", 0)):
                with self.server(FLOOR, pace, paced=not pace) as server:
                    self.loads.bench(server, n, 20)
                    run_of = partial(self._events, server, n, EVENTS_PER_S * EVENTS_SECONDS // n)
                    row = median(self.rounds.take({what: run_of})[what])
                lines.append([what, str(n), *_cost_cells(row), lost_text(row)])
                if pace:
                    name = f"load client, {n} streams: events a second of one core"
                    self.out.add(at_least(name, 1e6 / row["client_us"], EVENTS_PER_S))
        heads = ["the writer makes", "streams", "events/s", "of a core"]
        heads += ["CPU us an event", "user", "system", "events a read", "loop late p99 ms", "lost"]
        self.out.table(heads, lines)

    def streams(self) -> None:
        """10,000 streams at once, 100,000 events a second."""
        lines = []
        for name in (FLOOR, OURS):
            with self.server(name, STREAM_TICK_US, paced=False) as server:
                report = self.loads.bench(server, NUM_STREAMS, STREAM_TOKENS)
            row = stream_row(report, max(1, report["completed"]) * STREAM_TOKENS)
            limits = ", ".join(report["minisgl_fast"]["client"]["limits"]) or "no"
            done = [str(report["completed"]), str(report["failed"])]
            best = f"{report['max_output_tokens_per_s'] / row['merged']:,.0f}"
            lines.append([name, *done, best, *_cost_cells(row), limits])
            self.out.add(
                at_most(f"load client, 10,000 streams of {name}: errors", report["failed"], 0)
            )
        heads = ["server", "completed", "failed", "best second", "events/s", "of a core"]
        heads += [
            "CPU us an event",
            "user",
            "system",
            "events a read",
            "loop late p99 ms",
            "was it the limit?",
        ]
        self.out.table(heads, lines)

    def agree(self) -> None:
        """This client and another at the same server at once, and what that server says of both."""
        reference = None if self.options.reference is None else _load(self.options.reference)
        with self.server(tick_us=AGREE_TICK_US, paced=False) as server:
            run_of = partial(self._agree, server, reference)
            rows = self.rounds.take({"": run_of})[""]
        row = median(rows)
        names = [name for name in (REFERENCE, METRICS) if f"{name}: requests" in row]
        lines = []
        for key in (key for key in row if ": " not in key and key != "lost"):
            is_time = "ms" in key
            cells = [key, _number(row[key], is_time)]
            for name in names:
                if f"{name}: {key}" not in row:
                    cells += ["", ""]
                    continue
                counts = [key]
                if name == METRICS and not is_time and REFERENCE in names:
                    counts.append(f"{REFERENCE}: {key}")  # the server's are those of both clients
                # Of each round, for what one round's clients saw is not what the next one's did.
                ratio = statistics.median(
                    sum(found[count] for count in counts) / found[f"{name}: {key}"]
                    for found in rows
                )
                cells += [_number(row[f"{name}: {key}"], is_time), f"{ratio:.4f}"]
                target = TOLERANCE * 100 if is_time else 0.0
                off = abs(ratio - 1) * 100
                self.out.add(at_most(f"{key}, off from {name}", off, target, " %", 2))
            lines.append(cells)
        heads = ["", "this client", *(head for name in names for head in (name, "ratio"))]
        self.out.table(heads, lines)
        self.out.text(f"Lost: {lost_text(row)}.")

    def _events(self, server: Server, num_streams: int, num_tokens: int) -> Row:
        return self.loads.streams(server, num_streams, num_tokens)

    def _agree(self, server: Server, reference: RunOnce | None) -> Row:
        """Figures of this client by their names, others' with the other's name before."""
        before = _metrics(server)
        server.credit.write_bytes(bytes(8))
        with ThreadPoolExecutor(1) as pool:
            mine = pool.submit(self._mine, server)
            theirs = {}
            if reference is not None:
                _wait_for_events(server)
                theirs = self._theirs(server, reference)
            found = mine.result()
        for name, row in ((REFERENCE, theirs), (METRICS, _server_row(before, _metrics(server)))):
            found |= {f"{name}: {key}": value for key, value in row.items()}
        return found

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

    def _theirs(self, server: Server, run_once: RunOnce) -> Row:
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


def _wait_for_events(server: Server) -> None:
    """Until this client, which takes a while to start, has read its first."""
    deadline = time.monotonic() + STARTED_TIMEOUT_S
    while not any(server.credit.read_bytes()):
        if time.monotonic() > deadline:
            raise RuntimeError("the client does not start")
        time.sleep(0.005)


def _number(value: float, is_time: bool) -> str:
    return f"{value:,.{3 if is_time else 0}f}"


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


def _load(path: Path) -> RunOnce:
    spec = importlib.util.spec_from_file_location("reference_client", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    run_once: RunOnce = module.run_once
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


SECTIONS: tuple[Callable[[LoadClient], None], ...] = (
    LoadClient.events, LoadClient.streams, LoadClient.agree,
)  # fmt: skip


def main() -> None:
    parser = make_parser(__doc__, [section.__name__ for section in SECTIONS])
    parser.add_argument("--reference", type=Path, metavar="FILE.py", help="another load client")
    run(parser, LoadClient, SECTIONS)


if __name__ == "__main__":
    main()
