"""A trained model through the whole engine, token for token as transformers continues its prompts.

The weights are loaded once and shared by all engines of this module: an engine writes nothing into
its model. They are rounded to bfloat16 first, as those of the goldens were.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from engine_driver import PAGE_SIZE, EngineDriver, Start, open_engines
from smollm2 import CASES, NEEDS_MODEL, PATH
from step_driver import load_rounded

from minisgl_fast.engine import runner
from minisgl_fast.model.qwen3 import Qwen3
from minisgl_fast.text.tokenizer import Tokenizer
from minisgl_fast.wire import FinishReason

REASONS = {"stop": FinishReason.EOS, "length": FinishReason.LENGTH}
# Four cases begin with the same system prompt of 21 tokens, a page and a little; two come twice.
EIGHT = [*CASES, CASES[0], CASES[4]]

pytestmark = [*NEEDS_MODEL, pytest.mark.xdist_group("goldens")]


@pytest.fixture(scope="module")
def model() -> Qwen3:
    return load_rounded(PATH)


@pytest.fixture
def start(model: Qwen3, monkeypatch: pytest.MonkeyPatch) -> Iterator[Start]:
    """Gives a function that starts an engine with the given settings."""
    monkeypatch.setattr(runner, "load_weights", lambda *_: None)
    monkeypatch.setattr(runner, "Qwen3", lambda *_: model)
    tokenizer = Tokenizer.load(PATH)
    with open_engines(
        PATH, tokenizer.vocab_size, tokenizer.eos_ids, device="cpu", dtype="float32",
        page_size=PAGE_SIZE, num_threads=1, num_pages=96, max_running_requests=8,
    ) as start:  # fmt: skip
        yield start


def request(case: dict[str, Any], max_tokens: int) -> dict[str, Any]:
    return {"prompt": case["prompt_token_ids"], "max_tokens": max_tokens}


def check(driver: EngineDriver, cases: list[dict[str, Any]], max_tokens: int = 32) -> None:
    """All cases at once give their goldens; those that stop do so within 32 tokens."""
    results = driver.outputs([request(case, max_tokens) for case in cases])
    for case, result in zip(cases, results, strict=True):
        assert result.tokens == case["output_token_ids"][:max_tokens]
        assert result.reason == REASONS[case["finish_reason"]]


def test_one_prompt_alone(start: Start) -> None:
    driver = start()
    for case in (CASES[0], CASES[1], CASES[3], CASES[4]):
        check(driver, [case])
    (again,) = driver.outputs([request(CASES[3], 32)])
    assert again.tokens == CASES[3]["output_token_ids"]
    assert again.num_cached == 48  # of 59: whole pages, and one token at least is computed
    assert driver.engine.stats()["preemptions"] == 0


@pytest.mark.parametrize("disable_radix_cache", [False, True])
@pytest.mark.parametrize("overlap", [True, False])
def test_eight_at_once_with_shared_prefixes(
    start: Start, overlap: bool, disable_radix_cache: bool
) -> None:
    # A budget of 64 tokens a step cuts prompts in chunks and mixes them with decodes.
    driver = start(overlap=overlap, disable_radix_cache=disable_radix_cache, max_prefill_length=64)
    check(driver, EIGHT, max_tokens=48)
    stats = driver.engine.stats()
    assert stats["prompt_tokens"] == sum(len(case["prompt_token_ids"]) for case in EIGHT)
    assert (stats["cached_tokens"] == 0) == disable_radix_cache


@pytest.mark.parametrize(
    ("overlap", "disable_radix_cache"), [(True, False), (False, False), (True, True)]
)
def test_preemption_changes_nothing(start: Start, overlap: bool, disable_radix_cache: bool) -> None:
    # Two short prompts and a chat, twice: 12 pages, and 22 at their ends.
    driver = start(
        overlap=overlap,
        disable_radix_cache=disable_radix_cache,
        num_pages=16,
        max_prefill_length=32,
    )
    check(driver, [CASES[4], CASES[5], CASES[2]] * 2)
    assert driver.engine.stats()["preemptions"] > 0


def test_prompts_in_the_smallest_chunks(start: Start) -> None:
    driver = start(max_prefill_length=1, max_running_requests=2)
    check(driver, CASES[:2])
    num_tokens = sum(len(c["prompt_token_ids"]) + len(c["output_token_ids"]) for c in CASES[:2])
    assert driver.engine.stats()["steps"] >= (num_tokens - PAGE_SIZE) // 2
