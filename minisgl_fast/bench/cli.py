"""``minisgl-fast bench``, ``bench compare`` and ``bench sweep``."""

from __future__ import annotations

import argparse
import asyncio
import gc
import math
import signal
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import orjson
import uvloop

from minisgl_fast.bench.client import Client, Load
from minisgl_fast.bench.compare import make_comparison
from minisgl_fast.bench.endpoint import Endpoint
from minisgl_fast.bench.live import Live
from minisgl_fast.bench.options import Workload, add_options, check, make_endpoint
from minisgl_fast.bench.page import make_page
from minisgl_fast.bench.report import make_report, make_table
from minisgl_fast.bench.results import Results
from minisgl_fast.bench.tools import SCRIPTS, run_tool
from minisgl_fast.errors import ConfigError

EXIT_FAILED = 1  # nothing was completed
SETTINGS = ("request_rate", "burstiness", "max_concurrency", "num_prompts", "seed", "dataset")
RAMP_SETTINGS = ("ramp_up_strategy", "ramp_up_start_rps", "ramp_up_end_rps")
GC_THRESHOLD = 50_000

DESCRIPTION = """Load a server that speaks OpenAI's API, and measure what its users would see.
`bench compare A.json B.json` sets results side by side, `bench sweep` walks rates or
concurrencies, `bench offline` and `bench latency` measure the engine without a server, `bench
kernels` the CUDA kernels; each has its own --help."""


def main(arguments: Sequence[str]) -> int:
    """Run ``minisgl-fast bench ARGUMENTS``; the process's exit code. Raises ConfigError.

    Where the reader of the output has left (``| head``), SIGPIPE ends the process as it ends other
    tools. It is ignored until then: a server that leaves must not end the process.
    """
    try:
        try:
            return _command(arguments)
        finally:
            sys.stdout.flush()  # here, where its error can be told from others
    except BrokenPipeError:
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
        signal.raise_signal(signal.SIGPIPE)
        raise


def _command(arguments: Sequence[str]) -> int:
    command = arguments[0] if arguments else ""
    if command == "compare":
        return _compare(arguments[1:])
    if command == "sweep":
        return _sweep(arguments[1:])
    if command in SCRIPTS:
        return run_tool(command, arguments[1:])
    parser = argparse.ArgumentParser("minisgl-fast bench", description=DESCRIPTION)
    add_options(parser)
    options = parser.parse_args(arguments)
    check(options)
    report = _run(options, make_endpoint(options), Workload(options), options.seed, "bench")
    _write(options.json, orjson.dumps(report))
    _write(options.html, make_page([report]).encode())
    print(make_table(report))
    return 0 if report["completed"] else EXIT_FAILED


def _sweep(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        "minisgl-fast bench sweep",
        description="One run for each rate or concurrency; throughput against latency.",
    )
    points = parser.add_mutually_exclusive_group(required=True)
    points.add_argument("--request-rates", metavar="RPS,RPS,...")
    points.add_argument("--concurrencies", metavar="N,N,...")
    add_options(parser)
    options = parser.parse_args(arguments)
    check(options)
    name = "request_rate" if options.request_rates else "max_concurrency"
    values = _points(options.request_rates or options.concurrencies, name)
    endpoint, label = make_endpoint(options), options.label
    reports = []
    for index, value in enumerate(values):
        setattr(options, name, value)
        what = f"{value:g} requests/s" if options.request_rates else f"{value:g} at once"
        options.label = f"{label}, {what}" if label else what
        # A seed of its own: a prompt of an earlier point would be found in the server's cache.
        seed = options.seed + index
        report = _run(options, endpoint, Workload(options), seed, what)
        print(f"\n{what}\n{make_table(report)}", flush=True)
        reports.append(report)
    _write(options.json, orjson.dumps(reports))
    _write(options.html, make_page(reports, is_sweep=True).encode())
    print(make_comparison(reports))
    return 0 if any(report["completed"] for report in reports) else EXIT_FAILED


def _points(text: str, name: str) -> list[float]:
    try:
        values = [float(part) for part in text.split(",")]
    except ValueError:
        values = []
    if not values or not all(0 < value < math.inf for value in values):
        raise ConfigError(f"{text}: not a list of positive numbers")
    return values if name == "request_rate" else [max(1, round(value)) for value in values]


def _compare(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        "minisgl-fast bench compare",
        description="Results side by side; files of `vllm bench serve` may be among them.",
    )
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE.json")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write a page with plots")
    options = parser.parse_args(arguments)
    reports = [report for path in options.files for report in _load(path)]
    _write(options.html, make_page(reports).encode())
    print(make_comparison(reports))
    return 0


def _load(path: Path) -> list[dict[str, Any]]:
    """The reports of a file; those without a label are named after it."""
    try:
        content = orjson.loads(path.read_bytes())
    except (OSError, orjson.JSONDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read as JSON") from error
    reports = content if isinstance(content, list) else [content]
    for report in reports:
        if not isinstance(report, dict) or "output_throughput" not in report:
            raise ConfigError(f"{path}: not the result of a benchmark")
        report["label"] = report.get("label") or path.stem
    return reports


def _write(path: Path | None, data: bytes) -> None:
    if path is not None:
        try:
            path.write_bytes(data)
        except OSError as error:
            raise ConfigError(f"{path}: {error.strerror}") from error


def _run(
    options: argparse.Namespace, endpoint: Endpoint, workload: Workload, seed: int, title: str
) -> dict[str, Any]:
    """Warm up, run, report."""
    warm_up = workload.warm_up()
    if warm_up is not None:
        results, _, _ = _measure(endpoint, warm_up, None, False)
        if results.failed and not results.completed:
            kind, message = next(iter(results.messages.items()))
            raise ConfigError(f"the warm-up failed: {kind}: {message}")
    load = workload.load(seed)
    results, client, duration_s = _measure(
        endpoint, load, None if options.quiet else title, options.save_detailed
    )
    settings: dict[str, Any] = {
        "label": options.label,
        "backend": "minisgl-fast",
        "endpoint_type": endpoint.api,
        "base_url": endpoint.base_url,
        "model_id": endpoint.model,
        "tokenizer_id": None if options.tokenizer is None else str(options.tokenizer),
        **{name: getattr(options, name) for name in SETTINGS},
    }
    settings["num_prompts"] = load.num_samples
    if math.isinf(options.request_rate):
        settings["request_rate"] = "inf"  # JSON has no infinity
    if math.isinf(options.burstiness):
        settings["burstiness"] = "inf"
    if options.ramp_up_strategy:
        settings |= {name: getattr(options, name) for name in RAMP_SETTINGS}
    if client.is_interrupted:
        settings["interrupted"] = True
    return make_report(
        results,
        client.cost,
        duration_s,
        settings=settings,
        objectives_ms=dict(options.goodput),
        percentiles=options.percentiles,
        max_concurrency=options.max_concurrency,
        notes=workload.notes(),
    )


def _measure(
    endpoint: Endpoint, load: Load, title: str | None, detailed: bool
) -> tuple[Results, Client, float]:
    """Run a load to its end, or to the user's interrupt."""
    results = Results(detailed)
    client = Client(endpoint, load, results)

    async def measure() -> float:
        loop = asyncio.get_running_loop()
        if threading.current_thread() is threading.main_thread():  # only that one gets signals
            loop.add_signal_handler(signal.SIGINT, client.interrupt)
        live = asyncio.create_task(Live(client, title).run()) if title is not None else None
        try:
            return await client.run()
        finally:
            if live is not None:
                live.cancel()
                await asyncio.gather(live, return_exceptions=True)

    gc.collect()
    gc.freeze()
    thresholds = gc.get_threshold()
    gc.set_threshold(GC_THRESHOLD, *thresholds[1:])
    try:
        duration_s = uvloop.run(measure())
    finally:
        gc.set_threshold(*thresholds)
        gc.unfreeze()
    return results, client, duration_s
