"""Loads of bench_front.py and bench_client.py: one run of a client against a server, as a row."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from front_rounds import LOST, Row
from front_servers import Server, compiled

SENTENCE = "the quick brown fox jumps over the lazy dog while a small server streams tokens to many"
FIXED = ("--dataset", "fixed", "--prompt", SENTENCE)
NUM_CONNECTIONS = 64  # of requests that are not streamed


class Loads:
    """Clients on one core, and where their files are."""

    def __init__(self, folder: Path, client_cpu: int) -> None:
        self.folder = folder
        self.client_cpu = client_cpu

    def bench(
        self, server: Server, num_streams: int, num_tokens: int, more: Sequence[str] = FIXED
    ) -> dict[str, Any]:
        """One run of ``minisgl-fast bench``; its JSON."""
        file = self.folder / "report.json"
        command = ["taskset", "-c", str(self.client_cpu), sys.executable]
        command += ["-m", "minisgl_fast", "bench", "--base-url", server.url, "--model", "fake"]
        command += ["--num-prompts", str(num_streams), "--max-concurrency", str(num_streams)]
        command += ["--output-len", str(num_tokens), "--warm-up", "0", "--quiet"]
        command += ["--credit-file", str(server.credit), "--json", str(file), *more]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        report: dict[str, Any] = json.loads(file.read_text())
        return report

    def streams(self, server: Server, num_streams: int, num_tokens: int) -> Row:
        """Streams that begin together; microseconds of server and client a token."""
        before = server.cpu_s()
        report = self.bench(server, num_streams, num_tokens)
        cpu = server.cpu_s().since(before)
        if report["failed"]:
            raise RuntimeError(f"{server.name}: {report['minisgl_fast']['error_messages']}")
        return {
            "cpu_s": cpu.total,
            "user_ticks_s": cpu.user,
            "system_ticks_s": cpu.system,
            LOST: cpu.waited / report["duration"],
            **stream_row(report, num_streams * num_tokens),
        }

    def requests(self, server: Server, num: int, path: str, fields: dict[str, Any]) -> Row:
        """Requests of one token that are not streamed, by a client in C."""
        body = json.dumps({"model": "fake", "max_tokens": 1, **fields}).encode()
        file = self.folder / "request"
        file.write_bytes(
            b"POST %b HTTP/1.1\r\nHost: 127.0.0.1:%d\r\nContent-Type: application/json\r\n"
            b"Content-Length: %d\r\n\r\n%b" % (path.encode(), server.port, len(body), body)
        )

        def run(num_rounds: int) -> Row:
            command = [compiled("requests", self.folder), server.port, NUM_CONNECTIONS]
            command += [num_rounds, file, self.client_cpu]
            done = subprocess.run(list(map(str, command)), check=True, stdout=subprocess.PIPE)
            found: Row = json.loads(done.stdout)
            if found["failed"]:
                raise RuntimeError(f"{server.name}: {found}")
            return found

        run(10)
        before = server.cpu_s()
        found = run(num // NUM_CONNECTIONS)
        cpu = server.cpu_s().since(before)
        return {
            "per_s": found["completed"] / found["seconds"],
            "num": found["completed"],
            "cpu_s": cpu.total,
            "user_ticks_s": cpu.user,
            "system_ticks_s": cpu.system,
            LOST: cpu.waited / found["seconds"],
        }


def stream_row(report: dict[str, Any], num_tokens: int) -> Row:
    """What the client says of a run of streams."""
    own = report["minisgl_fast"]
    num_events = num_tokens / own["tokens_per_event"]
    client_s = own["client"]["cpu_share"] * report["duration"]
    return {
        "num": num_tokens,
        "seconds": report["duration"],
        "per_s": num_tokens / report["duration"],
        "merged": own["tokens_per_event"],
        "events_per_read": own["events_per_read"],
        "client_share": own["client"]["cpu_share"],
        "client_us": client_s / num_events * 1e6,
        "client_user_us": own["client"]["cpu_user_s"] / num_events * 1e6,
        "client_lag_ms": own["client"]["lag_p99_ms"],
        "ttft_p50": report["median_ttft_ms"],
        "ttft_p99": report["p99_ttft_ms"],
        "itl_p50": report["median_itl_ms"],
        "itl_p99": report["p99_itl_ms"],
    }


def median(rows: Sequence[Row]) -> Row:
    """Medians of all; of what was lost the most; of user and system time, which the kernel counts
    in ticks, the share of all rounds, applied to the exact total."""
    found = {key: statistics.median(row[key] for row in rows) for key in rows[0]}
    found[LOST] = max(row.get(LOST, 0.0) for row in rows)
    if "cpu_s" in found:
        found["cpu_us"] = statistics.median(row["cpu_s"] / row["num"] for row in rows) * 1e6
        user = sum(row["user_ticks_s"] for row in rows)
        ticks = user + sum(row["system_ticks_s"] for row in rows)
        found["user_us"] = found["cpu_us"] * user / ticks if ticks else 0.0
        found["system_us"] = found["cpu_us"] - found["user_us"]
    return found


def percentile(values: Sequence[float], percent: int) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) * percent // 100, len(ordered) - 1)]
