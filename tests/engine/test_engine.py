"""The engine with a tiny model: what a request gets does not depend on what runs beside it."""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

import pytest
from engine_driver import (
    END_OF_TEXT,
    HOT,
    PAGE_SIZE,
    TINY_VOCAB_LIMIT,
    TURN_END,
    EngineDriver,
    Result,
    Start,
    prompt,
    tokens,
)

from minisgl_fast.params import SamplingParams
from minisgl_fast.wire import FinishReason


def mixed_requests(count: int, seed: int) -> list[dict[str, Any]]:
    """Requests of every kind; some share their beginnings."""
    rng = random.Random(seed)
    prefixes = [prompt(40, seed=s) for s in range(3)]
    requests = []
    for index in range(count):
        params = SamplingParams(
            temperature=rng.choice([0.0, 0.7, 1.5]),
            top_p=rng.choice([1.0, 0.9]),
            top_k=rng.choice([0, 20]),
            min_p=rng.choice([0.0, 0.05]),
            presence_penalty=rng.choice([0.0, 0.0, 1.0]),
            frequency_penalty=rng.choice([0.0, 0.0, 0.5]),
            repetition_penalty=rng.choice([1.0, 1.0, 1.3]),
            logit_bias=rng.choice([{}, {}, {65: 5.0, 66: -100.0}]),
            min_tokens=rng.choice([0, 3]),
            stop_token_ids=rng.choice([(), (150, 206)]),
            ignore_eos=rng.random() < 0.5,
        )
        tail = prompt(rng.randint(1, 30), seed=1000 * seed + index)
        requests.append(
            {
                "prompt": rng.choice([[], *prefixes]) + tail,
                "params": params,
                "seed": rng.getrandbits(64),
                "max_tokens": rng.randint(3, 40),
            }
        )
    return requests


def alone(driver: EngineDriver, requests: list[dict[str, Any]]) -> list[Result]:
    """Each request in an engine of its own, as far as it can tell."""
    results = []
    for request in requests:
        driver.engine.flush_cache()
        results += driver.outputs([request])
    return results


# The same text, whatever else

EXPECTED: dict[str, list[Result]] = {}  # what the next test compares all settings with


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"overlap": False},
        {"disable_radix_cache": True},
        {"max_prefill_length": 8},
        {"num_pages": 10},
        {"num_pages": 10, "overlap": False, "disable_radix_cache": True, "max_prefill_length": 16},
    ],
    ids=["plain", "no-overlap", "no-cache", "chunks", "few-pages", "all-of-it"],
)
def test_a_mixed_batch_gives_what_each_request_gives_alone(
    start: Start, settings: dict[str, Any]
) -> None:
    requests = mixed_requests(24, seed=1)
    expected = EXPECTED.get("mixed") or EXPECTED.setdefault("mixed", alone(start(), requests))
    driver = start(**settings)
    results = driver.outputs(requests)
    assert tokens(results) == tokens(expected)
    assert [r.reason for r in results] == [r.reason for r in expected]
    assert {r.reason for r in results} >= {FinishReason.LENGTH, FinishReason.STOP_TOKEN}
    stats = driver.engine.stats()
    assert (stats["preemptions"] > 0) == ("num_pages" in settings)
    assert (stats["cached_tokens"] > 0) == ("disable_radix_cache" not in settings)


def test_the_same_seed_gives_the_same_text_and_another_seed_another(start: Start) -> None:
    driver = start()
    request = {"prompt": prompt(20), "params": HOT, "max_tokens": 24}
    neighbours = mixed_requests(7, seed=2)
    first, *_ = driver.outputs([{**request, "seed": 5}])
    *_, again = driver.outputs([*neighbours, {**request, "seed": 5}])
    other, *_ = driver.outputs([{**request, "seed": 6}])
    high, *_ = driver.outputs([{**request, "seed": 5 + 2**63}])
    assert first.tokens == again.tokens
    assert len({tuple(r.tokens) for r in (first, other, high)}) == 3


def test_a_cached_prefix_changes_nothing(start: Start) -> None:
    driver = start()
    for length in (15, 16, 17, 32, 33, 64):
        request = {"prompt": prompt(length, seed=length), "params": HOT, "max_tokens": 20}
        (cold,) = driver.outputs([request])
        (warm,) = driver.outputs([request])
        longer = {**request, "prompt": request["prompt"] + cold.tokens[:-1] + [7]}
        (grown,) = driver.outputs([longer])
        driver.engine.flush_cache()
        (grown_cold,) = driver.outputs([longer])
        driver.engine.flush_cache()
        assert cold.tokens == warm.tokens
        assert grown.tokens == grown_cold.tokens
        assert (cold.num_cached, grown_cold.num_cached) == (0, 0)
        assert warm.num_cached == (length - 1) // PAGE_SIZE * PAGE_SIZE
        assert grown.num_cached == (length + 19) // PAGE_SIZE * PAGE_SIZE


def test_a_prefix_that_is_shared_within_one_step_changes_nothing(start: Start) -> None:
    driver = start()
    requests = [{"prompt": prompt(40) + [7 + i], "params": HOT, "max_tokens": 12} for i in range(6)]
    alone = []
    for request in requests:
        alone += driver.outputs([request])
        driver.engine.flush_cache()
    together = driver.outputs(requests)
    assert [r.tokens for r in together] == [r.tokens for r in alone]
    assert [r.num_cached for r in together] == [0] + [40 // PAGE_SIZE * PAGE_SIZE] * 5


def test_overlap_changes_nothing_under_random_adds_and_aborts(start: Start) -> None:
    """Both engines see the same adds and aborts, at the same number of tokens received."""
    requests = mixed_requests(40, seed=3)
    rng = random.Random(4)
    limits = {i: rng.randint(0, 12) for i in rng.sample(range(40), 16)}
    gaps = [rng.randint(0, 3) for _ in requests]

    def run(**settings: Any) -> list[list[int]]:
        driver = start(num_pages=24, **settings)
        waiting = list(zip(requests, gaps, strict=True))
        pause = 0
        while waiting or driver.engine.has_work:
            if waiting and pause <= 0:
                request, pause = waiting.pop(0)
                driver.add(**request)
            pause -= 1
            driver.step()
            driver.engine.check()
            for rid, limit in limits.items():
                result = driver.results.get(rid)
                if result and not result.reason and len(result.tokens) >= limit:
                    driver.abort(rid)
        driver.step()
        driver.check_idle()
        reasons = [result.reason for result in driver.results.values()]
        assert FinishReason.RUNNING not in reasons
        assert 8 <= driver.engine.stats()["aborted"] == reasons.count(FinishReason.ABORTED)
        # An aborted request may have received a token more or less.
        return [result.tokens[: limits.get(rid, 1000)] for rid, result in driver.results.items()]

    with_overlap = run()
    assert with_overlap == run(overlap=False)
    assert sum(map(len, with_overlap)) > 300


# Sampling and stopping, one at a time, beside others


def test_min_tokens_put_off_every_stop_and_ignore_eos_lets_eos_pass(start: Start) -> None:
    driver = start()
    always_end = {TURN_END: 100.0}
    cases = [
        ({"logit_bias": always_end}, [TURN_END], FinishReason.EOS),
        ({"logit_bias": always_end, "ignore_eos": True}, [TURN_END] * 6, FinishReason.LENGTH),
        ({"logit_bias": {65: 100.0}, "stop_token_ids": (65,)}, [65], FinishReason.STOP_TOKEN),
        ({"logit_bias": {65: 100.0}}, [65] * 6, FinishReason.LENGTH),
        (
            {"logit_bias": {**always_end, 65: 90.0}, "stop_token_ids": (65,), "min_tokens": 6},
            None,
            FinishReason.LENGTH,
        ),
        (
            {"logit_bias": {**always_end, 65: 80.0}, "min_tokens": 4},
            [65, 65, 65, 65, TURN_END],
            FinishReason.EOS,
        ),
        (
            # With eos ignored, min_tokens holds for stop ids alone.
            {"logit_bias": always_end, "ignore_eos": True, "min_tokens": 4},
            [TURN_END] * 6,
            FinishReason.LENGTH,
        ),
    ]
    requests = [
        {
            "prompt": prompt(9, seed=i),
            "params": SamplingParams(temperature=i % 2 * 0.7, **options),
            "max_tokens": 6,
        }
        for i, (options, _, _) in enumerate(cases)
    ]
    results = driver.outputs(requests)
    for (_, expected, reason), result in zip(cases, results, strict=True):
        assert result.reason == reason
        if expected is None:
            assert len(result.tokens) == 6 and not {65, TURN_END} & set(result.tokens)
        else:
            assert result.tokens == expected


def test_every_eos_id_of_the_model_ends_a_text(start: Start) -> None:
    """config.json names one, generation_config.json another, the tokenizer a third or none."""
    driver = start()
    for token in (END_OF_TEXT, TURN_END):
        params = SamplingParams(temperature=0.0, logit_bias={token: 100.0})
        (result,) = driver.outputs([{"prompt": prompt(5), "params": params}])
        assert (result.tokens, result.reason) == ([token], FinishReason.EOS)


def test_penalties_count_prompt_and_output_as_they_should(start: Start) -> None:
    driver = start()
    base = {"prompt": prompt(12), "max_tokens": 60}
    plain, frequency, presence, repetition = (
        driver.outputs([{**base, "params": SamplingParams(temperature=0.0, **options)}])[0]
        for options in (
            {},
            {"frequency_penalty": 2.0},
            {"presence_penalty": 2.0, "logit_bias": dict.fromkeys(range(60), 40.0)},
            {"repetition_penalty": 2.0},
        )
    )
    assert max(Counter(plain.tokens).values()) > 12
    assert max(Counter(frequency.tokens).values()) <= 12
    # Sixty ids tower above the rest by 40, so far that a penalty of 2 reorders only them.
    assert set(presence.tokens) <= set(range(60)) and len(set(presence.tokens)) >= 20
    assert max(Counter(repetition.tokens).values()) < max(Counter(plain.tokens).values())
    # Repetition alone of the three looks at the prompt, which holds every id but one.
    request = {"prompt": [token for token in range(256) if token != 99], "max_tokens": 1}
    firsts = [
        driver.outputs(
            [
                {
                    **request,
                    "params": SamplingParams(temperature=0.0, logit_bias={99: 8.0}, **options),
                }
            ]
        )[0].tokens
        for options in (
            {},
            {"frequency_penalty": 2.0},
            {"presence_penalty": 2.0},
            {"repetition_penalty": 2.0},
        )
    ]
    assert firsts == [firsts[0]] * 3 + [[99]] and firsts[0] != [99]


def test_penalties_survive_preemption(start: Start) -> None:
    requests = [
        {
            "prompt": prompt(6, seed=i),
            "params": SamplingParams(temperature=0.0, frequency_penalty=1.0, ignore_eos=True),
            "max_tokens": 60,
        }
        for i in range(6)
    ]
    expected = start().outputs(requests)
    driver = start(num_pages=15)
    assert tokens(driver.outputs(requests)) == tokens(expected)
    assert driver.engine.stats()["preemptions"] > 0


def test_ids_without_a_text_are_never_sampled(start: Start) -> None:
    driver = start()
    # Neither by chance, nor by a bias, nor when everything else is banned but one.
    options: list[dict[str, Any]] = [
        {"temperature": 100.0, "ignore_eos": True},
        {"temperature": 0.0, "ignore_eos": True, "logit_bias": {300: 100.0}},
        {"temperature": 100.0, "ignore_eos": True, "logit_bias": {259: 100.0, 319: 100.0}},
    ]
    requests = [
        {"prompt": prompt(5, seed=i), "params": SamplingParams(**option), "max_tokens": 400}
        for i, option in enumerate(options)
    ]
    results = driver.outputs(requests)
    assert all(len(result.tokens) == 400 for result in results)
    assert max(max(result.tokens) for result in results) < TINY_VOCAB_LIMIT
    assert len(set(results[0].tokens)) > 150  # at this temperature nearly every id turns up
