"""Many requests, aborts and preemptions: nothing may leak."""

import random
from array import array
from collections import deque

import pytest
from fake_device import EOS, make_plan, random_groups, random_prompt

from minisgl_fast.params import SamplingParams
from minisgl_fast.sched.scheduler import Scheduler
from minisgl_fast.wire import FinishReason, pack_add, unpack_step

NUM_REQUESTS = 50_000  # in each of the two modes


def payloads(rng):
    """ADD payloads to be sent many times under other rids (their first four bytes)."""
    groups = random_groups(rng, count=6, longest=40)
    made = []
    for _ in range(500):
        params = SamplingParams(
            ignore_eos=rng.random() < 0.5,
            min_tokens=rng.choice((0, 0, 2)),
            stop_token_ids=rng.choice(((), (), (7,))),
            frequency_penalty=rng.choice((0.0, 0.0, 0.0, 0.5)),
        )
        prompt = random_prompt(rng, groups, longest=rng.choice((6, 20, 50)))
        max_tokens = rng.choice((2, 4, 10, 30))
        priority = rng.choice((0, 0, 0, 1))
        made.append(
            pack_add(0, params, prompt, seed=0, max_tokens=max_tokens, priority=priority)[4:]
        )
    return made


@pytest.mark.parametrize("overlap", [0, 1])
def test_a_hundred_thousand_requests_leak_nothing(overlap):
    rng = random.Random(overlap)
    num_pages = 40
    scheduler = Scheduler(num_pages, 4, 16, 96, 64, [EOS])
    plans = deque(make_plan(scheduler) for _ in range(overlap + 1))
    in_flight = deque()
    adds = payloads(rng)
    tokens = [array("i", [rng.randrange(40) for _ in range(16)]) for _ in range(200)]
    tokens[0][3] = -1
    live = [set(), set()]
    counts = dict.fromkeys(FinishReason, 0)
    sent = lost = num_steps = 0
    while sent < NUM_REQUESTS or scheduler.has_work():
        if sent < NUM_REQUESTS and len(live[0]) + len(live[1]) < 60:
            for _ in range(rng.randrange(12)):
                rid = sent
                scheduler.add(rid % 2, rid.to_bytes(4, "little") + rng.choice(adds))
                live[rid % 2].add(rid)
                sent += 1
        if rng.random() < 0.2 and sent:
            rid = max(sent - rng.randrange(60), 0)
            scheduler.abort(rid % 2, rid)
        if num_steps % 5000 == 4999 and live[1]:
            scheduler.abort_channel(1)
            lost += len(live[1])
            live[1].clear()
        plan, memory = plans[0]
        launched = scheduler.schedule(plan)
        if launched:
            plans.popleft()
            in_flight.append((plan, memory))
            num_steps += 1
        else:
            assert in_flight or not scheduler.has_work()
        if in_flight and (not launched or len(in_flight) > overlap):
            plan, memory = in_flight.popleft()
            scheduler.commit(plan, tokens[num_steps % 200])
            plans.append((plan, memory))
        for channel, _, payload in scheduler.take_frames():
            for rid, _, reason in unpack_step(payload)[0]:
                if reason:
                    live[channel].remove(rid)  # exactly one ending, of a request that was live
                    counts[reason] += 1
        if num_steps % 200 == 0:
            scheduler.check()
    scheduler.check()
    stats = scheduler.stats()
    assert live == [set(), set()]
    assert sum(counts.values()) + lost == sent
    seen = {reason for reason, count in counts.items() if count}
    assert seen == set(FinishReason) - {FinishReason.RUNNING, FinishReason.GRAMMAR}
    assert stats["preemptions"] > 1500 and stats["cached_tokens"] > stats["prompt_tokens"] // 5
    assert stats["pages_used"] == 0
    assert scheduler.flush_cache()
    assert scheduler.stats()["pages_free"] == num_pages
    scheduler.check()
