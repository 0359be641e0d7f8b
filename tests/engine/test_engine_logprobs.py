"""Log-probabilities and embeddings of the engine against transformers, in float32 on tiny weights.

Whatever runs beside a request, however its prompt is cut and cached, and however often it gives way
to others: every value that was asked for comes exactly once and is that of the whole text.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_driver import TINY_VOCAB_LIMIT, Result, Start, TokenLogprobs, prompt
from transformers import AutoModelForCausalLM, PreTrainedModel

from minisgl_fast.engine import outputs
from minisgl_fast.params import SamplingParams
from minisgl_fast.wire import FinishReason, Task

TOLERANCE = 1e-4
HOT = SamplingParams(
    temperature=1.5, presence_penalty=1.0, logit_bias={65: 5.0, 66: -100.0}, ignore_eos=True
)


@pytest.fixture(scope="module")
def oracle(tiny_model: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()


@torch.inference_mode()
def check(
    oracle: PreTrainedModel,
    text: Sequence[int],
    found: Sequence[TokenLogprobs],
    first: int,
    *,
    num_top: int = 0,
    ids: Sequence[int] = (),
) -> None:
    """``found`` are the log-probabilities of text[first:], one of each position, in order."""
    assert [one.position for one in found] == list(range(first, len(text)))
    assert [one.token for one in found] == list(text[first:])
    expected = oracle(torch.tensor([text])).logits[0].log_softmax(-1)
    for one in found:
        row = expected[one.position - 1]
        assert one.chosen == pytest.approx(float(row[one.token]), abs=TOLERANCE)
        assert one.of_ids == pytest.approx(row[list(ids)].tolist(), abs=TOLERANCE)
        values, order = row[:TINY_VOCAB_LIMIT].topk(num_top)
        assert [token for token, _ in one.top] == order.tolist()
        assert [value for _, value in one.top] == pytest.approx(values.tolist(), abs=TOLERANCE)


def check_whole(
    oracle: PreTrainedModel, request: dict[str, Any], result: Result, **asked: Any
) -> None:
    text = [*request["prompt"], *result.tokens]
    first = max(request.get("prompt_logprobs_from", len(request["prompt"])), 1)
    check(oracle, text, [*result.prompt_logprobs, *result.logprobs], first, **asked)
    assert len(result.logprobs) == len(result.tokens)


def request_of(index: int) -> dict[str, Any]:
    """Requests of all kinds that share the beginnings of their prompts."""
    rng = random.Random(index)
    return {
        "prompt": prompt(rng.randint(10, 50), seed=index % 3) + prompt(rng.randint(1, 40), index),
        "params": HOT,
        "seed": index,
        "max_tokens": rng.randint(1, 30),
        "num_top_logprobs": 5,
        "prompt_logprobs_from": rng.choice([0, 1, 7, 20]),
        "logprob_ids": [3, 300, 3],
    }  # fmt: skip


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"overlap": False},
        {"disable_radix_cache": True},
        {"max_prefill_length": 8},
        {"num_pages": 12},
        {"num_pages": 12, "overlap": False, "max_prefill_length": 24},
    ],
    ids=["plain", "no-overlap", "no-cache", "chunks", "few-pages", "few-pages-chunks"],
)
def test_every_asked_position_comes_once_and_as_transformers_has_it(
    start: Start, oracle: PreTrainedModel, settings: dict[str, Any]
) -> None:
    requests = [request_of(index) for index in range(16)]
    driver = start(**settings)
    results = driver.outputs(requests)
    for request, result in zip(requests, results, strict=True):
        check_whole(oracle, request, result, num_top=5, ids=request["logprob_ids"])
    stats = driver.engine.stats()
    assert (stats["preemptions"] > 0) == ("num_pages" in settings)
    assert (stats["cached_tokens"] > 0) == ("disable_radix_cache" not in settings)


def test_a_cached_prompt_gives_the_same_and_is_computed_only_as_far_as_asked(
    start: Start, oracle: PreTrainedModel
) -> None:
    driver = start()
    request = {"prompt": prompt(80), "max_tokens": 4, "num_top_logprobs": 3}
    driver.outputs([request])
    for first, cached in ((0, 0), (1, 0), (17, 16), (16, 0), (65, 64), (79, 64), (80, 64)):
        (result,) = driver.outputs([{**request, "prompt_logprobs_from": first}])
        assert result.num_cached == cached
        check_whole(oracle, {**request, "prompt_logprobs_from": first}, result, num_top=3)
    (plain,) = driver.outputs([request])
    assert plain.num_cached == 64 and plain.prompt_logprobs == []
    assert plain.logprobs == result.logprobs


def test_a_prompt_is_scored_without_a_token(start: Start, oracle: PreTrainedModel) -> None:
    driver = start(max_prefill_length=16)
    requests = [
        {"prompt": prompt(length, seed=length), "max_tokens": 0, "num_top_logprobs": 1,
         "prompt_logprobs_from": 0}
        for length in (1, 2, 16, 17, 40)
    ]  # fmt: skip
    for _ in range(2):  # cold, then cached
        for request, result in zip(requests, driver.outputs(requests), strict=True):
            assert (result.tokens, result.reason) == ([], FinishReason.LENGTH)
            check_whole(oracle, request, result, num_top=1)


def test_only_what_was_asked_for_comes(start: Start, oracle: PreTrainedModel) -> None:
    driver = start()
    plain, own, prompt_only, named = driver.outputs(
        [
            {"prompt": prompt(20)},
            {"prompt": prompt(20), "num_top_logprobs": 0},
            {"prompt": prompt(20), "prompt_logprobs_from": 0},
            {"prompt": prompt(20), "num_top_logprobs": 0, "logprob_ids": [7]},
        ]
    )
    assert plain.logprobs == plain.prompt_logprobs == own.prompt_logprobs == []
    assert plain.tokens == own.tokens == prompt_only.tokens == named.tokens
    assert len(prompt_only.prompt_logprobs) == 19 and prompt_only.logprobs == []
    assert [one.chosen for one in own.logprobs] == [one.chosen for one in named.logprobs]
    assert all(one.top == [] and one.of_ids == [] for one in own.logprobs)
    check(oracle, prompt(20) + named.tokens, named.logprobs, 20, ids=[7])


def test_the_largest_hold_the_token_itself_with_the_very_same_value(start: Start) -> None:
    (result,) = start().outputs(
        [{"prompt": prompt(40), "num_top_logprobs": 20, "prompt_logprobs_from": 0}]
    )
    for one in result.logprobs:  # greedy: the first
        assert one.top[0] == (one.token, one.chosen)
    for one in result.prompt_logprobs:
        listed = dict(one.top)
        assert listed.get(one.token, one.chosen) == one.chosen
        assert one.token in listed or one.chosen <= min(listed.values())


def test_a_long_prompt_is_scored_in_slices_of_bounded_size(
    start: Start, oracle: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = []

    def noted(logits: torch.Tensor, *rest: Any) -> Any:
        sizes.append(len(logits))
        return score(logits, *rest)

    score = outputs.score
    monkeypatch.setattr(outputs, "SLICE_BYTES", 7 * 4 * 320)
    monkeypatch.setattr(outputs, "score", noted)
    request = {"prompt": prompt(100), "max_tokens": 0, "num_top_logprobs": 2,
               "prompt_logprobs_from": 0}  # fmt: skip
    (result,) = start().outputs([request])
    check_whole(oracle, request, result, num_top=2)
    assert max(sizes) == 7 and sum(sizes) == 99


def test_aborted_requests_and_their_neighbours_lose_nothing_else(
    start: Start, oracle: PreTrainedModel
) -> None:
    driver = start(num_pages=12, max_prefill_length=16)
    requests = [request_of(index) for index in range(12)]
    rids = [driver.add(**request) for request in requests]
    rng = random.Random(0)
    while driver.engine.has_work:
        driver.step()
        if rng.random() < 0.1:
            driver.abort(rng.choice(rids[::3]))
    driver.check_idle()
    for rid, request in zip(rids, requests, strict=True):
        result = driver.results[rid]
        if result.reason != FinishReason.ABORTED:
            check_whole(oracle, request, result, num_top=5, ids=request["logprob_ids"])


# Embeddings


@torch.inference_mode()
def hidden_states(oracle: PreTrainedModel, text: Sequence[int]) -> torch.Tensor:
    """[len(text), hidden_size] behind the last norm."""
    hidden: torch.Tensor = oracle.model(torch.tensor([text])).last_hidden_state[0]
    return hidden


@pytest.mark.parametrize(
    "settings", [{}, {"max_prefill_length": 8}, {"num_pages": 8}], ids=["plain", "chunks", "few"]
)
def test_embeddings_are_the_pooled_hidden_states(
    start: Start, oracle: PreTrainedModel, settings: dict[str, Any]
) -> None:
    driver = start(**settings)
    for _ in range(2):  # cold, then cached
        requests = [
            {"prompt": prompt(length, seed=1), "task": task, "max_tokens": 5}
            for length in (1, 16, 33, 50)
            for task in (Task.EMBED_LAST, Task.EMBED_MEAN)
        ]
        generated = {"prompt": prompt(30, seed=2), "max_tokens": 20}
        *results, beside = driver.outputs([*requests, generated])
        assert len(beside.tokens) == 20 and beside.embedding is None
        for request, result in zip(requests, results, strict=True):
            assert (result.tokens, result.reason) == ([], FinishReason.LENGTH)
            hidden = hidden_states(oracle, request["prompt"])
            pooled = hidden[-1] if request["task"] == Task.EMBED_LAST else hidden.mean(0)
            assert result.embedding == pytest.approx(pooled.tolist(), abs=TOLERANCE)


def test_values_that_are_not_finite_end_the_request_alone(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver = start()
    model = driver.engine._runner._model
    forward = model.forward

    def spoiled(step: Any, *rest: Any) -> torch.Tensor:
        hidden = forward(step, *rest)
        hidden[step.input_ids == 13] = float("nan")
        return hidden

    monkeypatch.setattr(model, "forward", spoiled)
    bad, good, embedding = driver.outputs(
        [
            {"prompt": [1, 13, 2, 3], "max_tokens": 0, "prompt_logprobs_from": 0},
            {"prompt": [1, 14, 2, 3], "max_tokens": 0, "prompt_logprobs_from": 0},
            {"prompt": [1, 13], "task": Task.EMBED_LAST},
        ]
    )
    assert bad.reason == embedding.reason == FinishReason.ERROR
    assert bad.prompt_logprobs == [] and embedding.embedding is None
    assert good.reason == FinishReason.LENGTH and len(good.prompt_logprobs) == 3
