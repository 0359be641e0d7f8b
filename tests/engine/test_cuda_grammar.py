"""Grammars on a GPU: masks reach the sampler in time, however the step before it was launched."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_driver import (
    ON_GPU,
    TINY_EOS_IDS,
    TINY_VOCAB_LIMIT,
    EngineDriver,
    Result,
    Start,
    open_engines,
)

from minisgl_fast.params import SamplingParams
from minisgl_fast.text.tokenizer import Tokenizer
from minisgl_fast.token_rules import TokenRules, bits_of

pytest.importorskip("llguidance")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

ENDS = (256, 258)  # generation_config.json names one more
PATTERNS = {
    b'%llguidance {"no_forcing": true}\nstart: /[0-9]{3,8}/': "[0-9]{3,8}",
    b'%llguidance {"no_forcing": true}\nstart: ("yes" | "no") ("," ("yes" | "no")){0,9}': (
        "(yes|no)(,(yes|no)){0,9}"
    ),
}
LONG = {b'%llguidance {"no_forcing": true}\nstart: /[0-9]{100,120}/': "[0-9]{100,120}"}


@pytest.fixture
def start(gpu_model: Path, tokenizer: Tokenizer) -> Iterator[Start]:
    with open_engines(gpu_model, tokenizer=tokenizer, **ON_GPU) as start:
        yield start


def requests(count: int) -> list[dict[str, Any]]:
    """Constrained and free requests, greedy and drawn."""
    generator = random.Random(4)
    made: list[dict[str, Any]] = []
    for index in range(count):
        temperature = generator.choice((0.0, 1.0, 2.0))
        params = SamplingParams(temperature=temperature, top_k=generator.choice((0, 0, 5)))
        prompt = generator.choices(range(256), k=generator.randint(1, 90))
        request = {"prompt": prompt, "params": params, "seed": index, "max_tokens": 60}
        made.append({**request, "grammar": generator.choice((b"", *PATTERNS))})
    return made


def check_grammars(
    asked: list[dict[str, Any]], results: list[Result], tokenizer: Tokenizer
) -> None:
    for request, result in zip(asked, results, strict=True):
        assert result.reason
        if request["grammar"]:
            assert result.tokens[-1] in ENDS
            text = b"".join(map(tokenizer.token_bytes, result.tokens[:-1])).decode()
            assert re.fullmatch((PATTERNS | LONG)[request["grammar"]], text)


def test_answers_obey_their_grammars(start: Start, tokenizer: Tokenizer) -> None:
    mixed = requests(48)
    check_grammars(mixed, start().outputs(mixed), tokenizer)


@pytest.mark.parametrize("settings", [{"cuda_graph_max_bs": 0}, {"overlap": False}], ids=str)
def test_how_steps_are_launched_changes_no_constrained_token(
    start: Start, settings: dict[str, Any]
) -> None:
    assert in_eights(start(**settings)) == in_eights(start())


def in_eights(driver: EngineDriver) -> list[list[Result]]:
    """Eight at a time: without overlap an end is known a step earlier, so that steps have other
    numbers of rows, and up to eight rows are rounded alike whatever their number. The grammars are
    compiled before: when that is done depends on the clock, and with it who shares a step."""
    for pattern in PATTERNS:
        driver.outputs([{"prompt": [1], "grammar": pattern}])
    return [driver.outputs(requests(48)[first : first + 8]) for first in range(0, 48, 8)]


def test_constrained_requests_are_preempted_and_go_on(start: Start, tokenizer: Tokenizer) -> None:
    driver = start(num_pages=20, page_size=16)  # room for no more than three
    long = [{**request, "max_tokens": 300, "grammar": next(iter(LONG))} for request in requests(24)]
    results = driver.outputs(long)
    assert driver.engine.stats()["preemptions"] > 0
    check_grammars(long, results, tokenizer)


def test_token_rules_cut_down_a_grammar_and_free_text(start: Start, tokenizer: Tokenizer) -> None:
    digits = tokenizer.encode("4567")
    twice = tuple(tokenizer.encode("44"))
    rules = TokenRules(bits_of([*digits, *TINY_EOS_IDS], TINY_VOCAB_LIMIT), (twice,))
    three_to_eight = next(iter(PATTERNS))
    params = SamplingParams(temperature=3.0)
    asked: list[dict[str, Any]] = [
        {
            "prompt": [1, 2, 3],
            "params": params,
            "seed": seed,
            "max_tokens": 60,
            "grammar": rules.before(b"" if seed % 2 else three_to_eight),
        }
        for seed in range(24)
    ]
    for request, result in zip(asked, start().outputs(asked), strict=True):
        text = tokenizer.decode([token for token in result.tokens if token not in TINY_EOS_IDS])
        assert set(text) <= set("4567") and "44" not in text
        if request["grammar"].endswith(three_to_eight):
            assert re.fullmatch("[0-9]{3,8}", text)
        else:
            assert len(text) > 1 or result.tokens[-1] in TINY_EOS_IDS
