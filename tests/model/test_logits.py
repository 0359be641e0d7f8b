"""Logits equal those of transformers, however the tokens are cut into steps."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from step_driver import Driver
from tiny_models import CONFIGS, VOCAB_SIZE, make_model, oracle_logits, write_model
from transformers import PreTrainedModel

from minisgl_fast.model.config import ModelConfig

torch.set_num_threads(1)

TOLERANCE = 1e-4


@pytest.fixture(scope="module", params=list(CONFIGS))
def checkpoint(request, tmp_path_factory) -> tuple[Path, PreTrainedModel]:
    model = make_model(request.param)
    return write_model(model, tmp_path_factory.mktemp(request.param)), model


def random_tokens(length: int, seed: int = 0) -> list[int]:
    return random.Random(seed).choices(range(VOCAB_SIZE), k=length)


def check(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal to 1e-4 of the largest logit: two float32 sums in different orders differ by less."""
    assert expected.std() > 0.1  # logits that say something
    assert (actual - expected).abs().max() <= TOLERANCE * expected.abs().max()


def test_the_parameters_are_counted_as_transformers_counts_them(checkpoint):
    folder, oracle = checkpoint
    assert ModelConfig.load(folder).num_parameters == oracle.num_parameters()


def test_one_prompt(checkpoint):
    folder, oracle = checkpoint
    tokens = random_tokens(150)
    driver = Driver.load(folder)
    driver.add(0, tokens)
    check(driver.run([(0, 150)])[0], oracle_logits(oracle, tokens)[-1])


def test_a_prompt_chunk_by_chunk_then_decode(checkpoint):
    folder, oracle = checkpoint
    tokens = random_tokens(90, seed=1)
    expected = oracle_logits(oracle, tokens)
    driver = Driver.load(folder)
    driver.add(3, tokens)
    position = 0
    for length in (1, 7, 30, 2, 25, 1, 1, 1, 1, 21):
        position += length
        check(driver.run([(3, length)])[0], expected[position - 1])
    assert position == 90


def test_a_mixed_batch_of_decode_and_prefill(checkpoint):
    folder, oracle = checkpoint
    driver = Driver.load(folder)
    prompts = {slot: random_tokens(40 + 13 * slot, seed=slot) for slot in range(6)}
    expected = {slot: oracle_logits(oracle, tokens) for slot, tokens in prompts.items()}
    for slot, tokens in prompts.items():
        driver.add(slot, tokens)
    for chunks in (
        [(0, 20), (1, 20)],
        [(1, 1), (0, 7), (2, 33), (5, 2)],
        [(0, 1), (2, 1), (1, 1), (5, 31), (3, 64), (4, 3)],
        [(4, 1), (3, 1), (5, 1), (2, 1)],
        [(2, 1)],
        [(0, 12), (4, 12), (5, 12)],
    ):
        logits = driver.run(chunks, use_last_token=True)
        for row, (slot, _) in enumerate(chunks):
            check(logits[row], expected[slot][driver.sequences[slot].num_computed - 1])


def test_a_cached_prefix(checkpoint):
    folder, oracle = checkpoint
    driver = Driver.load(folder)
    prefix = random_tokens(50, seed=7)
    driver.add(0, prefix + random_tokens(5, seed=8))
    driver.run([(0, 55)])
    for slot in range(1, 9):
        tokens = prefix + random_tokens(slot, seed=20 + slot)
        driver.add(slot, tokens, shared_with=0)
        assert driver.sequences[slot].num_computed == 48
    chunks = [(slot, 2 + slot) for slot in range(1, 9)]
    logits = driver.run(chunks)
    for row, (slot, _) in enumerate(chunks):
        check(logits[row], oracle_logits(oracle, driver.sequences[slot].tokens)[-1])
    driver.add(9, prefix[:49], shared_with=0)  # all but one token cached: a prefill of one
    check(driver.run([(9, 1)])[0], oracle_logits(oracle, prefix[:49])[-1])


def test_contexts_so_uneven_that_they_are_batched_apart(checkpoint, monkeypatch):
    folder, oracle = checkpoint
    monkeypatch.setattr("minisgl_fast.backend.reference.MIN_SPLIT_KEYS", 16)
    monkeypatch.setattr("minisgl_fast.backend.reference.MAX_GATHERED_KEYS", 96)
    driver = Driver.load(folder)
    lengths = [3, 90, 17, 40, 44, 9, 61, 2]
    expected = {}
    for slot, length in enumerate(lengths):
        tokens = random_tokens(length + 1, seed=slot)
        expected[slot] = oracle_logits(oracle, tokens)
        driver.add(slot, tokens)
    logits = driver.run(list(enumerate(lengths)))
    for slot, length in enumerate(lengths):
        check(logits[slot], expected[slot][length - 1])
    logits = driver.run([(slot, 1) for slot in range(len(lengths))])
    for slot in range(len(lengths)):
        check(logits[slot], expected[slot][-1])
