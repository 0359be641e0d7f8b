"""What ``GET /metrics`` shows, in Prometheus text.

Rules: nothing here runs per token. The token loop counts in C (deliver.pyx), the engine reports
its own numbers in STATS frames, sessions report once at their end; a scrape reads them all.
Counters only grow; ratios such as the cache hit rate are left to the reader (cached / prompt
tokens). Where a server has several frontends, each can be scraped and shows the sum of all: it
gets the others' snapshots by peers.py. The engine tells all frontends the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from minisgl_fast.server.histogram import Histogram

if TYPE_CHECKING:
    from minisgl_fast.server.frontend import Frontend

METRICS_TEXT = b"text/plain; version=0.0.4; charset=utf-8"

END_TO_END_BUCKETS = (
    0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.2, 0.4, 0.6, 0.8, 1.0, 2.0, 4.0, 6.0, 8.0, 10.0,
    20.0, 40.0, 60.0, 120.0, 300.0, 600.0, 1800.0,
)  # fmt: skip
# How the STATS frame names the states of pages.
PAGE_STATES = ("free", "cached", "used")


class Metrics:
    """All metrics of one frontend and of its engine."""

    def __init__(self, frontend: Frontend) -> None:
        self._frontend = frontend
        self._requests: dict[tuple[str, int, str], int] = {}
        self._aborts: dict[str, int] = {}
        self._end_to_end = Histogram(END_TO_END_BUCKETS)
        self.num_prompt_tokens = 0

    def count_request(self, route: str, code: int, finish_reason: str = "") -> None:
        """One request was answered; ``finish_reason`` is its first choice's, if it has any."""
        key = (route, code, finish_reason)
        self._requests[key] = self._requests.get(key, 0) + 1

    def count_abort(self, reason: str, num_choices: int) -> None:
        """So many generations were given up: ``client`` left, the ``engine`` failed, or by
        ``request``."""
        self._aborts[reason] = self._aborts.get(reason, 0) + num_choices

    def observe_end_to_end(self, duration_s: float) -> None:
        """One generation request was answered in full after so many seconds."""
        self._end_to_end.observe(duration_s)

    def snapshot(self) -> dict[str, Any]:
        """What this frontend has counted; snapshots can be added up."""
        dispatcher = self._frontend.dispatcher
        return {
            "requests": [[*key, count] for key, count in self._requests.items()],
            "aborts": self._aborts,
            "prompt_tokens": self.num_prompt_tokens,
            "cached_tokens": dispatcher.num_cached,
            "generated_tokens": dispatcher.num_generated,
            "open": len(dispatcher),
            "frontends": 1,
            "histograms": [
                [histogram.buckets(), histogram.total]
                for histogram in (
                    dispatcher.time_to_first_token,
                    dispatcher.inter_token,
                    self._end_to_end,
                )
            ],
        }

    def render(self, others: Sequence[dict[str, Any]] = ()) -> bytes:
        """The text of a scrape; ``others`` are the snapshots of the other frontends."""
        registry = CollectorRegistry()
        total = _sum([self.snapshot(), *others])
        registry.register(_Scrape(total, self._frontend.stats, self._frontend.state == "ready"))
        return generate_latest(registry)


def _sum(snapshots: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One snapshot for all."""
    total: dict[str, Any] = {
        name: sum(snapshot[name] for snapshot in snapshots)
        for name in ("prompt_tokens", "cached_tokens", "generated_tokens", "open", "frontends")
    }
    requests: dict[tuple[str, int, str], int] = {}
    aborts: dict[str, int] = {}
    for snapshot in snapshots:
        for route, code, reason, count in snapshot["requests"]:
            requests[route, code, reason] = requests.get((route, code, reason), 0) + count
        for reason, count in snapshot["aborts"].items():
            aborts[reason] = aborts.get(reason, 0) + count
    histograms = []
    for same in zip(*(snapshot["histograms"] for snapshot in snapshots), strict=True):
        buckets = [
            (bounds[0][0], sum(count for _, count in bounds))
            for bounds in zip(*(buckets for buckets, _ in same), strict=True)
        ]
        histograms.append((buckets, sum(sum_value for _, sum_value in same)))
    return {**total, "requests": requests, "aborts": aborts, "histograms": histograms}


class _Scrape(Collector):
    """The families of one scrape."""

    def __init__(self, total: dict[str, Any], stats: dict[str, int], ready: bool) -> None:
        self._total = total
        self._stats = stats
        self._ready = ready

    def collect(self) -> Iterator[Metric]:
        """For the registry: every family with its present values."""
        total = self._total
        stats = self._stats

        requests = CounterMetricFamily(
            "minisgl_requests",
            "Requests answered, by route, HTTP status and finish reason.",
            labels=("route", "code", "finish_reason"),
        )
        for (route, code, reason), count in total["requests"].items():
            requests.add_metric((route, str(code), reason), count)
        yield requests

        aborts = CounterMetricFamily(
            "minisgl_aborts", "Generations given up before their end.", labels=("reason",)
        )
        for reason in ("client", "engine", "request"):
            aborts.add_metric((reason,), total["aborts"].get(reason, 0))
        yield aborts

        for name, text, value in (
            ("prompt_tokens", "Prompt tokens of submitted requests.", total["prompt_tokens"]),
            ("cached_tokens", "Prompt tokens found in the prefix cache.", total["cached_tokens"]),
            ("generated_tokens", "Tokens generated.", total["generated_tokens"]),
            (
                "preemptions",
                "Requests pushed back for want of KV pages.",
                stats.get("preemptions", 0),
            ),
            ("engine_steps", "Steps of the engine.", stats.get("steps", 0)),
        ):
            yield CounterMetricFamily(f"minisgl_{name}", text, value)

        for name, text, value in (
            ("requests_running", "Requests that the engine computes.", stats.get("running", 0)),
            ("requests_queued", "Requests that wait in the engine.", stats.get("queued", 0)),
            ("generations_open", "Generations not finished.", total["open"]),
            ("ready", "1 while requests are accepted.", self._ready),
            ("frontends", "Processes that serve HTTP.", total["frontends"]),
        ):
            yield GaugeMetricFamily(f"minisgl_{name}", text, value)

        pages = GaugeMetricFamily("minisgl_kv_pages", "KV pages by state.", labels=("state",))
        for state in PAGE_STATES:
            pages.add_metric((state,), stats.get(f"pages_{state}", 0))
        yield pages

        families = (
            ("time_to_first_token_seconds", "From the request's arrival to its first token."),
            ("inter_token_seconds", "Between two tokens of one generation."),
            ("request_seconds", "From a request's arrival to the end of its answer."),
        )
        for (name, text), (buckets, sum_value) in zip(families, total["histograms"], strict=True):
            yield HistogramMetricFamily(
                f"minisgl_{name}", text, buckets=buckets, sum_value=sum_value
            )
