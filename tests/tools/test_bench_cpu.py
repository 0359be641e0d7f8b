"""The parts of the CPU benchmark that its figures rest on."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from minisgl_fast.config import Config
from minisgl_fast.engine.engine import Engine
from minisgl_fast.progress import silent

torch.set_num_threads(1)


@pytest.fixture
def tools(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "tools")
    import bench_cpu
    import make_tiny_model

    yield bench_cpu, make_tiny_model
    for name in ("bench_cpu", "demo_model", "make_tiny_model"):
        sys.modules.pop(name, None)


def test_sides_take_turns_and_the_warm_up_is_dropped(tools):
    bench_cpu, _ = tools
    calls = []

    def side(name):
        return lambda prompts: calls.append(name) or (name, prompts)

    prompts = iter([[[0]], [[1]], [[2]]])
    rounds = bench_cpu.interleave((side("a"), side("b")), lambda _: next(prompts), 2)
    assert "".join(calls) == "abbaab"
    assert rounds == [(("a", [[1]]), ("b", [[1]])), (("a", [[2]]), ("b", [[2]]))]


def test_the_padded_batch_gives_what_each_prompt_gives_alone(tools, tmp_path):
    from transformers import AutoModelForCausalLM

    bench_cpu, make_tiny_model = tools
    make_tiny_model.write_tiny_model(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    model.generation_config.eos_token_id = None
    prompts = [[5, 6, 7, 8, 9, 10], [11, 12], [13, 14, 15]]
    batch = bench_cpu.generate_padded(model, prompts, 6)
    assert batch == [bench_cpu.generate_padded(model, [prompt], 6)[0] for prompt in prompts]
    assert all(len(tokens) == 6 for tokens in batch)


@pytest.mark.parametrize("disable_radix_cache", [False, True])
def test_every_prompt_gets_a_time_and_only_the_cache_reuses_tokens(
    tools, tmp_path, disable_radix_cache
):
    bench_cpu, make_tiny_model = tools
    make_tiny_model.write_tiny_model(tmp_path)
    config = Config(
        model=str(tmp_path),
        dtype="float32",
        num_threads=1,
        num_pages=64,
        disable_radix_cache=disable_radix_cache,
    )
    engine = Engine(config, tmp_path, 256, (), silent)
    prompts = [[*range(100), 200 + index] for index in range(4)]
    before = engine.stats()["cached_tokens"]
    first = bench_cpu.first_token_times(engine, prompts[:1])
    others = bench_cpu.first_token_times(engine, prompts[1:])
    assert len(first) == 1 and len(others) == 3 and min(first + others) > 0
    reused = engine.stats()["cached_tokens"] - before
    assert reused == (0 if disable_radix_cache else 3 * 96)  # six pages of 16 tokens
    engine.close()
