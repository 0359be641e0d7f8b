"""A trained model, token for token as transformers continues its prompts (float32, greedy)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from smollm2 import CASES, NEEDS_MODEL, PATH
from step_driver import Driver, load_rounded

from minisgl_fast.model.config import ModelConfig

torch.set_num_threads(1)
pytestmark = NEEDS_MODEL


@pytest.fixture(scope="module")
def driver() -> Driver:
    config = ModelConfig.load(PATH)
    return Driver(load_rounded(PATH), config, page_size=16, num_pages=120)


def complete(driver: Driver, cases: list[dict[str, Any]]) -> list[list[int]]:
    """Greedy continuations, all cases at once, each as long as its golden."""
    unused = list(driver.free_pages)
    for slot, case in enumerate(cases):
        driver.add(slot, list(case["prompt_token_ids"]))
    chunks = [(slot, len(case["prompt_token_ids"])) for slot, case in enumerate(cases)]
    outputs: list[list[int]] = [[] for _ in cases]
    while chunks:
        tokens = driver.run(chunks).argmax(-1).tolist()
        for (slot, _), token in zip(chunks, tokens, strict=True):
            outputs[slot].append(token)
            driver.sequences[slot].tokens.append(token)
        chunks = [
            (slot, 1)
            for slot, case in enumerate(cases)
            if len(outputs[slot]) < len(case["output_token_ids"])
        ]
    driver.free_pages = unused
    return outputs


def test_the_configuration_of_the_gguf(driver):
    assert driver.kv.layer(29).shape[3:] == (3, 64)


def test_alone(driver):
    case = min(CASES, key=lambda case: len(case["output_token_ids"]))
    assert complete(driver, [case]) == [case["output_token_ids"]]


def test_all_at_once(driver):
    assert complete(driver, CASES) == [case["output_token_ids"] for case in CASES]
