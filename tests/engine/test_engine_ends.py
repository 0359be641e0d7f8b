"""How requests of the engine end, and how an engine starts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from engine_driver import (
    HOT,
    PAGE_SIZE,
    TINY_EOS_IDS,
    TINY_VOCAB_LIMIT,
    Start,
    prompt,
    tokens,
)

from minisgl_fast.config import Config
from minisgl_fast.engine.engine import Engine
from minisgl_fast.errors import ConfigError
from minisgl_fast.params import SamplingParams
from minisgl_fast.progress import silent
from minisgl_fast.wire import FinishReason

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
