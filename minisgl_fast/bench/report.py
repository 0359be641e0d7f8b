"""A run's results as a JSON object and as a table.

The JSON has the keys of ``vllm bench serve``'s result, so that what reads those reads ours; arrays
of single requests stand in it on request only, as there. Keys of our own lie under
``minisgl_fast``: distributions, series over time, errors, and what the client itself cost. A file
of vLLM's can be compared with ours: what it lacks is left out.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

from minisgl_fast.bench.limits import ClientCost
from minisgl_fast.bench.results import Results
from minisgl_fast.bench.samples import BINS_PER_DECADE, LOWEST_S, Distribution

METRICS = {
    "ttft": "Time to first token",
    "tpot": "Time per output token (without the first)",
    "itl": "Inter-token latency",
    "e2el": "End-to-end latency",
}
MAX_POINTS = 600
NUM_BAR = 62


def make_report(
    results: Results,
    cost: ClientCost,
    duration_s: float,
    *,
    settings: Mapping[str, Any],
    objectives_ms: Mapping[str, float],
    percentiles: Sequence[float] = (99,),
    max_concurrency: int | None = None,
    notes: Sequence[str] = (),
) -> dict[str, Any]:
    """The JSON object of a run. ``settings`` are the keys in front that say what was run."""
    per_s = 1.0 / max(duration_s, 1e-9)
    tokens_per_event = results.total_output / max(results.num_events, 1)
    num_good = results.num_good(objectives_ms) if objectives_ms else None
    report: dict[str, Any] = {
        "date": time.strftime("%Y%m%d-%H%M%S"),
        **settings,
        "duration": duration_s,
        "completed": results.completed,
        "failed": results.failed,
        "total_input_tokens": results.total_input,
        "total_output_tokens": results.total_output,
        "request_throughput": results.completed * per_s,
        "request_goodput": None if num_good is None else num_good * per_s,
        "output_throughput": results.total_output * per_s,
        "total_token_throughput": (results.total_input + results.total_output) * per_s,
        "max_output_tokens_per_s": results.peak_events_per_s() * tokens_per_event,
        "max_concurrent_requests": results.peak_concurrency(),
        "rtfx": 0.0,
    }
    for name in METRICS:
        _summarise(report, name, getattr(results, name), percentiles)
    if max_concurrency is not None:
        _summarise(report, "client_queue_time", results.queue_times(), percentiles)
        if isinstance(settings.get("request_rate"), float):  # else all were due at once
            waits = results.queue_times(with_latency=True)
            _summarise(report, "e2el_including_client_queue", waits, percentiles)
    report["minisgl_fast"] = {
        "tokens_per_event": tokens_per_event,
        "events_per_read": results.num_events / max(cost.num_reads, 1),
        "cached_tokens": results.num_cached,
        "output_tokens_from": _source(results.num_from_usage, results.completed, "events"),
        "input_tokens_from": _source(results.num_prompts_from_usage, results.completed, "dataset"),
        "goodput_ms": dict(objectives_ms),
        "errors": dict(results.errors),
        "error_messages": results.messages,
        "client": {
            "cpu_share": cost.cpu_share,
            "cpu_user_s": cost.user_s,
            "lag_p99_ms": cost.lag_p99_s * 1e3,
            "lag_max_ms": cost.lag_max_s * 1e3,
            "resent": cost.num_resent,
            "limits": cost.limits(),
        },
        "notes": list(notes),
        "distributions": {name: _distribution(getattr(results, name)) for name in METRICS},
        "timeline": _timeline(results, tokens_per_event),
    }
    if results.gaps_s is not None:
        report.update(_arrays(results))
    return report


def _summarise(
    report: dict[str, Any], name: str, values: Distribution, percentiles: Sequence[float]
) -> None:
    median, *others = values.percentiles([50, *percentiles])
    report[f"mean_{name}_ms"] = values.mean() * 1e3
    report[f"median_{name}_ms"] = median * 1e3
    report[f"std_{name}_ms"] = values.std() * 1e3
    for percent, value in zip(percentiles, others, strict=True):
        report[f"p{percent:g}_{name}_ms"] = value * 1e3


def _source(num_told: int, num_all: int, otherwise: str) -> str:
    if num_told == num_all:
        return "usage"
    return f"usage and {otherwise}" if num_told else otherwise


def _distribution(values: Distribution) -> dict[str, Any]:
    first, counts = values.histogram()
    return {
        "count": values.count,
        "exact": values.exact,
        "lowest_ms": LOWEST_S * 1e3,
        "first_bin": first,
        "bins_per_decade": BINS_PER_DECADE,
        "counts": counts,
    }


def _timeline(results: Results, tokens_per_event: float) -> dict[str, Any]:
    """Series of at most MAX_POINTS points; each event counts as the mean number of tokens."""
    events, running = results.timeline.events(), results.timeline.running()
    step = max(1, math.ceil(len(events) / MAX_POINTS))
    width_s = results.timeline.width_s * step
    return {
        "interval_s": width_s,
        "tokens_per_s": [
            sum(events[i : i + step]) * tokens_per_event / width_s
            for i in range(0, len(events), step)
        ],
        "running": running[::step],
    }


def _arrays(results: Results) -> dict[str, Any]:
    """Per request, failed ones too, in the order in which they were sent."""
    gaps, errors = results.gaps_s or {}, results.error_of or {}
    indices = range(len(results.is_done))
    return {
        "input_lens": results.input_lens.tolist(),
        "output_lens": results.output_lens.tolist(),
        "ttfts": results.ttfts_s.tolist(),
        "itls": [gaps.get(index, []) for index in indices],
        "latencies": results.latencies_s.tolist(),
        "start_times": results.starts_s.tolist(),
        "queue_times": results.queue_times_s.tolist(),
        "errors": [errors.get(index, "") for index in indices],
    }


def make_table(report: Mapping[str, Any]) -> str:
    """What a person reads at the end of a run."""
    own = report["minisgl_fast"]
    lines = [" Serving benchmark ".center(NUM_BAR, "=")]

    def row(name: str, value: Any, note: str = "") -> None:
        text = f"{value:,.2f}" if isinstance(value, float) else f"{value:,}"
        lines.append(f"{name:<38}{text:>14}{'  ' if note else ''}{note}")

    row("Completed requests", report["completed"])
    row("Failed requests", report["failed"])
    row("Duration (s)", report["duration"])
    row("Input tokens", report["total_input_tokens"], f"from {own['input_tokens_from']}")
    row("Output tokens", report["total_output_tokens"], f"from {own['output_tokens_from']}")
    if own["cached_tokens"]:
        row("Input tokens found in a cache", own["cached_tokens"])
    row("Requests per second", report["request_throughput"])
    if report["request_goodput"] is not None:
        limits = ", ".join(f"{name} {limit:g} ms" for name, limit in own["goodput_ms"].items())
        row("Goodput, requests per second", report["request_goodput"], limits)
    row("Output tokens per second", report["output_throughput"])
    row("  in the best second", report["max_output_tokens_per_s"])
    row("Input and output tokens per second", report["total_token_throughput"])
    row("Most requests at once", report["max_concurrent_requests"])
    row("Tokens per event", own["tokens_per_event"])
    for name, title in METRICS.items():
        lines.append(f" {title} (ms) ".center(NUM_BAR, "-"))
        for key, value in report.items():
            if key.endswith(f"_{name}_ms"):
                statistic = key.removesuffix(f"_{name}_ms")
                row(f"{statistic.capitalize()} {name.upper()}", float(value))
    lines.append(" This client ".center(NUM_BAR, "-"))
    row("CPU (% of a core)", own["client"]["cpu_share"] * 100)
    row("Event loop late, p99 (ms)", own["client"]["lag_p99_ms"])
    lines.append("=" * NUM_BAR)
    for kind, count in own["errors"].items():
        message = own["error_messages"].get(kind, "")
        lines.append(f"Error: {kind}: {count} requests{f', first: {message}' if message else ''}")
    lines += [f"Note: {note}" for note in warnings(report)]
    return "\n".join(lines)


def warnings(report: Mapping[str, Any]) -> list[str]:
    """What a reader must know before believing the figures."""
    own = report.get("minisgl_fast", {})
    found = list(own.get("notes", ()))
    for reason in own.get("client", {}).get("limits", ()):
        found.append(f"this client may have been the limit: {reason}")
    inexact = [
        name.upper()
        for name, values in own.get("distributions", {}).items()
        if not values.get("exact", True)
    ]
    if inexact:
        found.append(f"too many values to keep: percentiles of {', '.join(inexact)} within 1.2 %")
    return found
