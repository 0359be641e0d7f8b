"""The text of a request never depends on what runs beside it."""

import random

import pytest
from fake_device import FakeEngine, expected, random_groups, random_params, random_prompt
from hypothesis import given, settings
from hypothesis import strategies as st

from minisgl_fast.wire import FinishReason

MAX_MODEL_LEN = 60


def workload(seed, count):
    rng = random.Random(seed)
    groups = random_groups(rng, count=3, longest=30)
    requests = []
    for rid in range(count):
        params, request_seed = random_params(rng)
        max_tokens = rng.randint(max(params.min_tokens, 1), 25)
        prompt = random_prompt(rng, groups, longest=40)
        requests.append((rid, prompt, params, request_seed, max_tokens, rng.choice((0, 0, 1))))
    return requests


def run(requests, *, seed, abort_share=0.0, priorities=False, **config):
    """Feed the requests at random steps; the engine and the rids that were aborted."""
    rng = random.Random(seed)
    engine = FakeEngine(**config)
    aborted = set()
    waiting = list(requests)
    while waiting or engine.scheduler.has_work():
        for _ in range(rng.choice((0, 0, 1, 2, 5))):
            if waiting:
                rid, prompt, params, request_seed, max_tokens, priority = waiting.pop()
                engine.add(
                    rid, prompt, params, seed=request_seed, max_tokens=max_tokens,
                    channel=rid % 2, priority=priority if priorities else 0,
                )  # fmt: skip
        if rng.random() < abort_share:
            rid = rng.choice(requests)[0]
            engine.scheduler.abort(rid % 2, rid)
            aborted.add(rid)
        engine.step()
    engine.drain()
    engine.take()
    return engine, aborted


@pytest.mark.parametrize("radix_cache", [True, False], ids=["radix", "no-radix"])
@pytest.mark.parametrize("overlap", [0, 1])
@settings(max_examples=25, deadline=None, derandomize=True)
@given(data=st.data())
def test_text_is_the_same_whatever_runs_beside_it(overlap, radix_cache, data):
    seed = data.draw(st.integers(0, 2**32))
    page_size = data.draw(st.sampled_from((1, 2, 4, 16)))
    most_pages = -(-MAX_MODEL_LEN // page_size)
    max_seqs = data.draw(st.integers(1, 8))
    config = {
        "page_size": page_size,
        "num_pages": data.draw(st.integers(most_pages, 4 * most_pages)),
        "max_seqs": max_seqs,
        "max_model_len": MAX_MODEL_LEN,
        "max_step_tokens": data.draw(st.integers(1, 80)),
    }
    requests = workload(seed, 20)
    engine, aborted = run(
        requests, seed=seed, overlap=overlap, radix_cache=radix_cache,
        abort_share=data.draw(st.sampled_from((0.0, 0.05))), priorities=data.draw(st.booleans()),
        **config,
    )  # fmt: skip
    for rid, prompt, params, request_seed, max_tokens, _ in requests:
        tokens, reason = expected(
            prompt, params, seed=request_seed, max_tokens=max_tokens, max_model_len=MAX_MODEL_LEN
        )
        key = rid % 2, rid
        if engine.reasons[key] == FinishReason.ABORTED:
            assert rid in aborted
            assert engine.tokens[key] == tokens[: len(engine.tokens[key])]
        else:
            assert (engine.tokens[key], engine.reasons[key]) == (tokens, reason)
        cached = engine.cached[key]
        assert cached % page_size == 0 and cached < len(prompt) and (radix_cache or cached == 0)
    stats = engine.scheduler.stats()
    assert stats["pages_used"] == stats["running"] == stats["queued"] == 0
    assert engine.scheduler.flush_cache()
    assert engine.scheduler.stats()["pages_free"] == config["num_pages"]
    engine.scheduler.check()
