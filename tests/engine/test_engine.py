"""The engine with a tiny model: what a request gets does not depend on what runs beside it."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_driver import (
    PAGE_SIZE,
    TINY_EOS_IDS,
    TINY_VOCAB_LIMIT,
    EngineDriver,
    Result,
    Start,
    prompt,
)

from minisgl_fast.config import Config
from minisgl_fast.engine.engine import Engine
from minisgl_fast.errors import ConfigError
from minisgl_fast.params import SamplingParams
from minisgl_fast.progress import silent
from minisgl_fast.wire import FinishReason

END_OF_TEXT, TURN_START, TURN_END = 256, 257, 258
HOT = SamplingParams(temperature=1.5, ignore_eos=True)


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


def tokens(results: list[Result]) -> list[list[int]]:
    return [result.tokens for result in results]


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


# Ends


def test_a_context_that_fills_ends_with_length(start: Start) -> None:
    driver = start(max_model_len=64)
    results = driver.outputs(
        [
            {"prompt": prompt(60), "params": HOT, "max_tokens": 100},
            {"prompt": prompt(63), "params": HOT, "max_tokens": 100},
            {"prompt": prompt(64), "params": HOT, "max_tokens": 100},
        ]
    )
    assert [len(result.tokens) for result in results] == [4, 1, 0]
    assert [result.reason for result in results] == [
        FinishReason.LENGTH,
        FinishReason.LENGTH,
        FinishReason.ERROR,
    ]


@pytest.mark.parametrize("overlap", [True, False])
def test_an_abort_in_every_state_frees_everything(start: Start, overlap: bool) -> None:
    driver = start(overlap=overlap, max_running_requests=2, max_prefill_length=16)
    request = {"prompt": prompt(50), "params": HOT, "max_tokens": 1000}
    for num_steps in range(10):  # waiting, in every chunk of its prefill, decoding
        running, waiting = driver.add(**request), driver.add(**request)
        for _ in range(num_steps):
            driver.step()
        driver.abort(running)
        driver.abort(waiting)
        driver.abort(waiting)
        driver.abort(12345)
        driver.engine.check()
        driver.run()
        for rid in (running, waiting):
            assert driver.results[rid].reason == FinishReason.ABORTED
    assert driver.engine.stats()["aborted"] == 20


def test_aborts_of_preempted_requests_free_everything(start: Start) -> None:
    driver = start(num_pages=12, max_running_requests=4)
    rids = [driver.add(prompt(8, seed=i), HOT, max_tokens=500) for i in range(4)]
    while not driver.engine.stats()["preemptions"]:
        driver.step()
    for rid in reversed(rids):
        driver.abort(rid)
        driver.engine.check()
    driver.run()
    assert {result.reason for result in driver.results.values()} == {FinishReason.ABORTED}


def test_a_lost_channel_takes_its_requests_and_no_others(start: Start) -> None:
    driver = start()
    lost = [driver.add(prompt(30, seed=i), HOT, max_tokens=500, channel=1) for i in range(3)]
    kept = driver.add(prompt(30, seed=9), HOT, max_tokens=30)
    for _ in range(6):
        driver.step()
    driver.engine.abort_channel(1)
    driver.run()
    assert all(driver.results[rid].reason == FinishReason.RUNNING for rid in lost)
    assert len(driver.results[kept].tokens) == 30
    assert driver.engine.stats()["aborted"] == 3


@pytest.mark.parametrize("overlap", [True, False])
def test_a_nan_row_ends_with_an_error_and_harms_nobody(
    start: Start, monkeypatch: pytest.MonkeyPatch, overlap: bool
) -> None:
    """A row whose hidden state is NaN: found in the sampler, after its K and V were written."""
    driver = start(overlap=overlap)
    poisoned = 251  # an id that is in no other prompt and banned from the outputs
    params = SamplingParams(temperature=1.5, ignore_eos=True, logit_bias={poisoned: -100.0})
    requests = [
        {
            "prompt": [min(token, 250) for token in prompt(40, seed=i)],
            "params": params,
            "seed": i,
            "max_tokens": 30,
        }
        for i in range(5)
    ]
    expected = driver.outputs(requests)
    driver.engine.flush_cache()
    embeddings = driver.engine._runner._model._embed_tokens.clone()
    embeddings[poisoned] = float("nan")
    monkeypatch.setattr(driver.engine._runner._model, "_embed_tokens", embeddings)
    bad = {**requests[0], "prompt": [*requests[0]["prompt"][:-1], poisoned]}
    results = driver.outputs([requests[0], bad, *requests[1:], bad])
    assert [r.reason for r in results] == [
        FinishReason.LENGTH,
        FinishReason.ERROR,
        *[FinishReason.LENGTH] * 4,
        FinishReason.ERROR,
    ]
    assert results[1].tokens == results[-1].tokens == []
    assert tokens([results[0], *results[2:-1]]) == tokens(expected)
    # The broken pages are not in the cache, and whoever gets them next computes what is right.
    assert tokens(driver.outputs(requests)) == tokens(expected)


# Start


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_model_len": 4097}, "--max-model-len 4097 is over the model's 4096 positions."),
        ({"device": "cuda"}, "--device cuda: torch finds no CUDA device here."),
    ],
)
def test_settings_that_cannot_work_are_one_line(
    tiny_model: Path, settings: dict[str, Any], message: str
) -> None:
    if settings.get("device") == "cuda" and torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    config = Config(**{"model": str(tiny_model), "device": "cpu", "num_threads": 1, **settings})
    with pytest.raises(ConfigError) as caught:
        Engine(config, tiny_model, TINY_VOCAB_LIMIT, TINY_EOS_IDS, silent)
    assert caught.value.message == message


def test_the_facts_tell_the_sizes_and_the_warm_up_leaves_no_trace(start: Start) -> None:
    driver = start(max_model_len=1000)
    assert driver.engine.facts() == {
        "max_model_len": 1000,
        "architecture": "Qwen3ForCausalLM",
        "num_parameters": 119_232,
        "vocab_size": 320,
        "hidden_size": 64,
        "num_pages": 128,
        "page_size": PAGE_SIZE,
        "max_running_requests": 8,
        "dtype": "float32",
        "device": "cpu",
        "grammars": False,
    }
    stats = driver.engine.stats()
    assert stats.pop("pages_total") == stats.pop("pages_free") == 128
    assert set(stats.values()) == {0}
    assert start(num_pages=2).engine.facts()["max_model_len"] == 32
    assert start(max_model_len=40, num_pages=10_000).engine.facts()["num_pages"] == 8 * 4


@pytest.mark.parametrize("max_model_len", [2, 3, 16])
def test_the_smallest_contexts_start_and_serve(start: Start, max_model_len: int) -> None:
    driver = start(max_model_len=max_model_len, num_pages=1, max_running_requests=1)
    (result,) = driver.outputs([{"prompt": [1], "params": HOT, "max_tokens": 100}])
    assert len(result.tokens) == max_model_len - 1
    assert result.reason == FinishReason.LENGTH
