"""The whole engine on a GPU: nothing about how a step is run changes its tokens or leaks a page.

The tiny model has heads of 64, as the kernels want. Same launches give same bits, so what only
changes how they are launched (graphs, overlap) is compared token by token; what changes the shapes
of the products (chunks, batches, cached prefixes) may round differently in bfloat16 and is compared
by its logits, against the same model in float32 on the CPU.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_driver import ON_GPU, TINY_VOCAB_LIMIT, Start, open_engines
from step_driver import Driver

from minisgl_fast.params import SamplingParams

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.fixture
def start(gpu_model: Path) -> Iterator[Start]:
    with open_engines(gpu_model, **ON_GPU) as start:
        yield start


def requests(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Greedy and sampled requests, some with filters and penalties."""
    generator = random.Random(seed)
    made = []
    for index in range(count):
        params = SamplingParams(
            temperature=generator.choice([0.0, 0.8, 1.5]),
            top_k=generator.choice([0, 0, 5, 40]),
            top_p=generator.choice([1.0, 0.9]),
            frequency_penalty=generator.choice([0.0, 0.0, 0.5]),
            logit_bias=generator.choice([{}, {65: -100.0}]),
            ignore_eos=True,
        )
        tokens = generator.choices(range(256), k=generator.randint(1, 300))
        made.append({"prompt": tokens, "params": params, "seed": index, "max_tokens": 24})
    return made


@pytest.mark.parametrize("settings", [{"cuda_graph_max_bs": 0}, {"overlap": False}], ids=str)
def test_how_steps_are_launched_changes_no_token(start: Start, settings: dict[str, Any]) -> None:
    expected = start().outputs(requests(40))
    assert start(**settings).outputs(requests(40)) == expected


def test_the_same_run_gives_the_same_tokens_again(start: Start) -> None:
    driver = start(disable_radix_cache=True)
    assert driver.outputs(requests(24)) == driver.outputs(requests(24))


def test_running_out_of_pages_preempts_and_loses_nothing(start: Start) -> None:
    driver = start(num_pages=24)
    results = driver.outputs([{**request, "max_tokens": 150} for request in requests(24)])
    assert driver.engine.stats()["preemptions"] > 0
    assert [len(result.tokens) for result in results] == [150] * 24
    assert all(0 <= token < TINY_VOCAB_LIMIT for result in results for token in result.tokens)


def test_random_aborts_leave_no_page_behind(start: Start) -> None:
    driver = start(num_pages=64)
    generator = random.Random(3)
    open_rids: list[int] = []
    for request in requests(120, seed=1):
        open_rids.append(driver.add(**request))
        for _ in range(generator.randint(0, 4)):
            driver.step()
        if generator.random() < 0.5:
            driver.abort(open_rids.pop(generator.randrange(len(open_rids))))
    driver.run()


@pytest.mark.parametrize("chunks", [[96], [64, 32], [33, 62, 1], [1] * 96], ids=str)
def test_logits_are_the_cpus_within_the_noise_of_bfloat16(
    gpu_model: Path, chunks: list[int]
) -> None:
    tokens = random.Random(5).choices(range(256), k=96)
    expected, got = [], []
    for device, dtype, logits in (
        ("cpu", torch.float32, expected),
        ("cuda", torch.bfloat16, got),
    ):
        driver = Driver.load(gpu_model, dtype, device=device, page_size=64)
        driver.add(0, tokens)
        for length in chunks:
            last = driver.run([(0, length)])
        logits.append(last.float().cpu())
    error = (got[0] - expected[0]).norm() / expected[0].norm()
    assert error < 3e-2


def test_a_cached_prefix_gives_the_logits_of_a_cold_one(gpu_model: Path) -> None:
    tokens = random.Random(6).choices(range(256), k=200)
    driver = Driver.load(gpu_model, torch.bfloat16, device="cuda", page_size=64)
    driver.add(0, tokens)
    cold = driver.run([(0, 200)]).float()
    driver.add(1, tokens, shared_with=0)
    warm = driver.run([(1, 200 - driver.sequences[1].num_computed)]).float()
    assert (warm - cold).norm() / cold.norm() < 2e-2
