"""What a run has measured, request by request and in sum.

Definitions, those of ``vllm bench serve``:
    TTFT   first event with text - send
    ITL    gaps between events with text, of all requests together
    E2EL   last event with text - send
    TPOT   (E2EL - TTFT) / (output tokens - 1), requests of at least 2 output tokens only
    goodput   requests that meet every objective / duration; TPOT counts as 0 below 2 tokens
Tokens come from the server's usage where it sends one, else an event counts as a token. A request
counts as completed if its answer came whole; a failed one adds to no time and no throughput.

Memory: some 50 bytes a request, and what samples.py bounds; gaps of single requests are kept only
with ``detailed``.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import orjson

from minisgl_fast.bench.reader import ResponseReader
from minisgl_fast.bench.samples import Distribution, Timeline

TIMELINE_WIDTH_S = 0.1
BINS_PER_SECOND = 10
MAX_MESSAGE_CHARACTERS = 300


class Results:
    """Filled by the client: ``begin`` a request, then exactly one of ``succeed`` and ``fail``."""

    def __init__(self, detailed: bool = False) -> None:
        self.input_lens = array("q")
        self.output_lens = array("q")
        self.ttfts_s = array("d")
        self.latencies_s = array("d")
        self.starts_s = array("d")
        self.queue_times_s = array("d")
        self.is_done = bytearray()
        self.gaps_s: dict[int, list[float]] | None = {} if detailed else None
        self.error_of: dict[int, str] | None = {} if detailed else None
        self.ttft, self.tpot = Distribution(), Distribution()
        self.itl, self.e2el = Distribution(), Distribution()
        self.timeline = Timeline(TIMELINE_WIDTH_S)
        self.errors: Counter[str] = Counter()
        self.messages: dict[str, str] = {}  # the first of each kind of error
        self.completed = 0
        self.num_from_usage = 0
        self.num_prompts_from_usage = 0
        self.num_cached = 0
        self.num_events = 0
        self.total_input = 0
        self.total_output = 0
        self.origin_s: float | None = None

    @property
    def failed(self) -> int:
        return self.errors.total()

    def begin(self, num_input: int, start_s: float, queue_s: float) -> int:
        """A request is sent; its index."""
        if self.origin_s is None:
            self.origin_s = start_s
        self.input_lens.append(num_input)
        self.output_lens.append(0)
        self.ttfts_s.append(0.0)
        self.latencies_s.append(0.0)
        self.starts_s.append(start_s)
        self.queue_times_s.append(queue_s)
        self.is_done.append(0)
        return len(self.is_done) - 1

    def succeed(self, index: int, reader: ResponseReader) -> None:
        """A whole answer has come."""
        assert self.origin_s is not None
        usage = _usage(reader.usage)
        num_output = _count(usage, "completion_tokens")
        self.num_from_usage += num_output > 0
        num_output = num_output or reader.num_events
        num_input = _count(usage, "prompt_tokens")
        if num_input:
            self.num_prompts_from_usage += 1
            self.input_lens[index] = num_input
        details = usage.get("prompt_tokens_details")
        self.num_cached += _count(details if isinstance(details, dict) else usage, "cached_tokens")
        ttft_s = reader.first_s - reader.start_s
        latency_s = reader.last_s - reader.start_s
        self.output_lens[index] = num_output
        self.ttfts_s[index] = ttft_s
        self.latencies_s[index] = latency_s
        self.is_done[index] = 1
        self.ttft.add(ttft_s)
        self.e2el.add(latency_s)
        if num_output > 1:
            self.tpot.add((latency_s - ttft_s) / (num_output - 1))
        self.itl.add_gaps(reader)
        self.timeline.add(reader, self.origin_s)
        if self.gaps_s is not None:
            self.gaps_s[index] = reader.gaps
        self.completed += 1
        self.num_events += reader.num_events
        self.total_input += self.input_lens[index]
        self.total_output += num_output

    def fail(self, index: int, kind: str, message: str) -> None:
        """The request has failed; ``kind`` is what errors are counted by."""
        message = message[:MAX_MESSAGE_CHARACTERS]
        self.errors[kind] += 1
        self.messages.setdefault(kind, message)
        if self.error_of is not None:
            self.error_of[index] = f"{kind}: {message}" if message else kind

    def num_good(self, objectives_ms: Mapping[str, float]) -> int:
        """Completed requests that meet every objective among ttft, tpot and e2el."""
        return sum(
            all(times_ms[name] <= limit for name, limit in objectives_ms.items())
            for times_ms in self._times_ms()
        )

    def _times_ms(self) -> Iterator[dict[str, float]]:
        for index in self._done():
            ttft_s, latency_s = self.ttfts_s[index], self.latencies_s[index]
            num_gaps = self.output_lens[index] - 1
            tpot_s = (latency_s - ttft_s) / num_gaps if num_gaps > 0 else 0.0
            yield {"ttft": ttft_s * 1e3, "tpot": tpot_s * 1e3, "e2el": latency_s * 1e3}

    def _done(self) -> Iterator[int]:
        return (index for index, is_done in enumerate(self.is_done) if is_done)

    def queue_times(self, with_latency: bool = False) -> Distribution:
        """How long completed requests waited in this client for --max-concurrency.

        with_latency: and for their answer after that, from when they were due to the last event.
        """
        times = Distribution()
        for index in self._done():
            latency_s = self.latencies_s[index] if with_latency else 0.0
            times.add(self.queue_times_s[index] + latency_s)
        return times

    def peak_concurrency(self) -> int:
        """Most completed requests at once, each from its send up to its last event."""
        starts = sorted(self.starts_s[index] for index in self._done())
        ends = sorted(self.starts_s[index] + self.latencies_s[index] for index in self._done())
        peak = num_ended = 0
        for num_started, start in enumerate(starts, 1):
            while num_ended < len(ends) and ends[num_ended] <= start:
                num_ended += 1
            peak = max(peak, num_started - num_ended)
        return peak

    def peak_events_per_s(self) -> int:
        """Most events with text in one second, seconds counted from the first request."""
        events = self.timeline.events()
        return max(
            (sum(events[i : i + BINS_PER_SECOND]) for i in range(0, len(events), BINS_PER_SECOND)),
            default=0,
        )


def _usage(event: bytes) -> dict[str, Any]:
    if not event:
        return {}
    try:
        found = orjson.loads(event)
        usage = found.get("usage") or found.get("meta_info")
    except (orjson.JSONDecodeError, AttributeError):
        return {}
    return usage if isinstance(usage, dict) else {}


def _count(usage: dict[str, Any], key: str) -> int:
    value = usage.get(key)
    return value if isinstance(value, int) and value > 0 else 0
