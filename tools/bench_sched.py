"""Times the scheduler and the prefix cache alone, without model or sockets, against their targets.

    python tools/bench_sched.py            prints the table
    python tools/bench_sched.py --check    and fails when a target is missed by more than 3x

Rows: one step of 256 decoding requests; match, insert and release of prompts of 2,200 tokens; and
all cache operations of a request on a serving trace: 2,000 requests, prompts of 1,024 tokens of
which 768 are shared in 20 groups of skewed popularity, 64 output tokens, 64 requests in flight,
300,000 tokens of cache. Medians over requests or steps; the mean stands beside them. Both share the
machine with whatever else runs, hence the wide margin of --check.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
from array import array
from collections import deque
from collections.abc import Callable
from time import perf_counter_ns

from minisgl_fast.params import SamplingParams
from minisgl_fast.sched.pages import PagePool
from minisgl_fast.sched.plan import StepPlan
from minisgl_fast.sched.radix import RadixCache
from minisgl_fast.sched.scheduler import Scheduler
from minisgl_fast.wire import pack_add

CHECK_MARGIN = 3.0
NUM_RUNNING = 256
PROMPT_TOKENS = 2200

Row = tuple[str, list[float], float | None]  # what, microseconds of each, target of the median


def step_rows(page_size: int, overlap: int) -> list[Row]:
    """schedule, commit and take_frames of steps that decode 256 requests."""
    num_steps = 300
    max_model_len = 4096
    scheduler = Scheduler(
        num_pages=NUM_RUNNING * (512 // page_size),
        page_size=page_size,
        max_seqs=NUM_RUNNING,
        max_model_len=max_model_len,
        max_step_tokens=8192,
        eos_ids=[0],
    )
    rng = random.Random(0)
    params = SamplingParams(temperature=0.7, top_p=0.9, top_k=40)
    for rid in range(NUM_RUNNING):
        prompt = [rng.randrange(1, 100_000) for _ in range(rng.randint(16, 64))]
        scheduler.add(0, pack_add(rid, params, prompt, seed=rid, max_tokens=400))
    capacity = scheduler.plan_capacity()
    memory = [array("i", bytes(4 * capacity.num_words)) for _ in range(overlap + 1)]
    plans = deque(StepPlan(words.buffer_info()[0], capacity) for words in memory)
    in_flight: deque[StepPlan] = deque()
    tokens = array("i", [7] * NUM_RUNNING)
    schedule_us, commit_us, frames_us, both_us = [], [], [], []
    for _ in range(num_steps):
        plan = plans.popleft()
        start = perf_counter_ns()
        if not scheduler.schedule(plan):
            raise RuntimeError("the benchmark ran out of work")
        scheduled = perf_counter_ns()
        in_flight.append(plan)
        if len(in_flight) <= overlap:
            continue
        num_decode = in_flight[0].num_decode
        before = perf_counter_ns()
        scheduler.commit(in_flight[0], tokens)
        committed = perf_counter_ns()
        scheduler.take_frames()
        taken = perf_counter_ns()
        plans.append(in_flight.popleft())
        if num_decode == NUM_RUNNING == plan.num_decode:
            schedule_us.append((scheduled - start) / 1000)
            commit_us.append((committed - before) / 1000)
            frames_us.append((taken - committed) / 1000)
            both_us.append(schedule_us[-1] + commit_us[-1])
    name = f"256 decodes, page {page_size}, {'overlapped' if overlap else 'in turn'}: "
    return [
        (name + "schedule", schedule_us, None),
        (name + "commit", commit_us, None),
        (name + "schedule + commit", both_us, 50.0),
        (name + "take_frames", frames_us, None),
    ]


def timed(samples: list[float], call: Callable[[], int]) -> int:
    start = perf_counter_ns()
    result = call()
    samples.append((perf_counter_ns() - start) / 1000)
    return result


def prompt_rows(page_size: int) -> list[Row]:
    """Long prompts: insert each, then match and lock it again."""
    count = 200
    num_pages = PROMPT_TOKENS // page_size
    cache = RadixCache(PagePool(count * num_pages), page_size)
    rng = random.Random(1)
    prompts = [
        array("i", [rng.randrange(150_000) for _ in range(num_pages * page_size)])
        for _ in range(count)
    ]
    rows = [(array("i", [0] * num_pages), array("i", [-1] * num_pages)) for _ in prompts]
    insert_us: list[float] = []
    match_us: list[float] = []
    release_us: list[float] = []
    for prompt, (pages, path) in zip(prompts, rows, strict=True):
        cache.take(pages, 0, num_pages)
        timed(insert_us, lambda: cache.publish(prompt, pages, path, 0, num_pages))  # noqa: B023
        cache.release(pages, path, num_pages, num_pages)

    def match_and_lock() -> int:
        found = cache.match(prompt, path)
        cache.acquire(path, found)
        return found

    def release() -> int:
        cache.release(path, path, num_pages, num_pages)
        return num_pages

    for _ in range(3):
        for prompt, (_, path) in zip(prompts, rows, strict=True):  # noqa: B007
            if timed(match_us, match_and_lock) != num_pages:
                raise RuntimeError("the prompt is not in the cache")
            timed(release_us, release)
    name = f"{PROMPT_TOKENS} tokens, page {page_size}: "
    bound = page_size == 64
    return [
        (name + "match + lock", match_us, 10.0 if bound else None),
        (name + "insert", insert_us, 15.0 if bound else None),
        (name + "unlock", release_us, None),
    ]


class TraceRequest:
    """What a request of the trace holds."""

    def __init__(self, tokens: array[int], page_size: int) -> None:
        self.tokens = tokens
        self.num_pages = -(-len(tokens) // page_size)
        self.pages = array("i", [0] * self.num_pages)
        self.path = array("i", [-1] * self.num_pages)


def trace_rows(page_size: int) -> list[Row]:
    """All cache operations of a request on the serving trace, and its hit rate."""
    num_prompt, num_output, shared, num_groups, in_flight = 1024, 64, 768, 20, 64
    cache = RadixCache(PagePool(300_000 // page_size), page_size)
    rng = random.Random(2)
    groups = [[rng.randrange(150_000) for _ in range(shared)] for _ in range(num_groups)]
    weights = [1 / (rank + 1) for rank in range(num_groups)]
    requests = []
    for group in rng.choices(groups, weights, k=2000):
        rest = [rng.randrange(150_000) for _ in range(num_prompt - shared + num_output)]
        requests.append(TraceRequest(array("i", group + rest), page_size))
    prompt_pages = num_prompt // page_size
    num_written = num_prompt + num_output - 1  # the last token's KV is never computed
    steps = ("match + lock", "take", "insert after prefill", "decode", "unlock")
    spent: dict[str, list[float]] = {step: [] for step in steps}
    hits = 0
    running: deque[TraceRequest] = deque()
    now = perf_counter_ns

    def finish(request: TraceRequest) -> None:
        # As the scheduler does it: a page when the last is full, published when it fills.
        start = now()
        for column in range(prompt_pages, request.num_pages):
            if cache.take(request.pages, column, column + 1) != 1:
                raise RuntimeError("the trace does not fit the cache")
            if (column + 1) * page_size <= num_written:
                cache.publish(request.tokens, request.pages, request.path, column, column + 1)
        decoded = now()
        published = num_written // page_size
        cache.release(request.pages, request.path, request.num_pages, published)
        spent["unlock"].append((now() - decoded) / 1000)
        spent["decode"].append((decoded - start) / 1000)

    for request in requests:
        prompt = request.tokens[: num_prompt - 1]  # at least one token is computed
        start = now()
        found = cache.match(prompt, request.path)
        cache.acquire(request.path, found)
        matched = now()
        request.pages[:found] = request.path[:found]
        between = now()
        cache.take(request.pages, found, prompt_pages)
        taken = now()
        cache.publish(request.tokens, request.pages, request.path, found, prompt_pages)
        published = now()
        spent["match + lock"].append((matched - start) / 1000)
        spent["take"].append((taken - between) / 1000)
        spent["insert after prefill"].append((published - taken) / 1000)
        hits += found * page_size
        running.append(request)
        if len(running) == in_flight:
            finish(running.popleft())
    while running:
        finish(running.popleft())
    cache.check()
    # Requests finish in the order they start, so the i-th of each list is the same request.
    total = [sum(parts) for parts in zip(*spent.values(), strict=True)]
    name = f"trace, page {page_size}: "
    rows: list[Row] = [(name + step, samples, None) for step, samples in spent.items()]
    rate = hits / (num_prompt * len(requests))
    return [*rows, (f"{name}all of a request (hit rate {rate:.3f})", total, 8.0)]


def main() -> int:
    parser = argparse.ArgumentParser(description="Benchmark of the scheduler and its cache.")
    parser.add_argument("--check", action="store_true", help="fail on targets missed by 3x")
    check = parser.parse_args().check
    rows = [
        *step_rows(64, overlap=1),
        *step_rows(16, overlap=0),
        *prompt_rows(64),
        *prompt_rows(16),
        *trace_rows(16),
        *trace_rows(64),
    ]
    missed = 0
    print(f"{'microseconds':<58} {'median':>8} {'mean':>8} {'target':>8}")
    for name, samples, target in rows:
        median = statistics.median(samples)
        verdict = ""
        if target is not None:
            ratio = median / target
            verdict = "ok" if ratio <= 1 else f"{ratio:.1f}x over"
            missed += ratio > CHECK_MARGIN
        print(
            f"{name:<58} {median:>8.2f} {statistics.mean(samples):>8.2f} "
            f"{f'{target:.0f}' if target is not None else '':>8} {verdict}"
        )
    if check and missed:
        print(f"{missed} targets missed by more than {CHECK_MARGIN:.0f}x", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
