"""The CPU figures: this engine beside transformers, and the prefix cache beside no cache.

    python tools/bench_cpu.py            # both figures, a few minutes on 2 cores

1. Throughput: 8 requests at once, against ``transformers.generate`` on the same 8 prompts as one
   left-padded batch; same weights, dtype, threads and number of new tokens, both greedy.
2. Prefix cache: 16 requests that share a 512-token prefix and come in together; the time to the
   first token of each, against the same run with ``--disable-radix-cache``.

Both sides of a figure alternate round by round in one process, so that a busy machine slows both
alike. The table shows the medians of the rounds; the ratio is the median of the rounds' ratios.
Every round has fresh random prompts, so no prefix survives from the round before.
"""

from __future__ import annotations

import argparse
import platform
import random
import statistics
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from demo_model import demo_model

from minisgl_fast import LLM, SamplingParams
from minisgl_fast.config import Config
from minisgl_fast.engine.engine import Engine
from minisgl_fast.model.config import ModelConfig
from minisgl_fast.model.gguf import load_tensors
from minisgl_fast.progress import silent
from minisgl_fast.wire import pack_add, unpack_step

NUM_REQUESTS = 8
PROMPT_TOKENS = (24, 96)  # uniform
MIN_RATIO = 1.0

NUM_SHARING = 16
PREFIX_TOKENS = 512
SUFFIX_TOKENS = 16
MAX_TTFT_RATIO = 0.4

FIRST_TEXT_TOKEN = 32  # below are SmolLM2's control tokens
NUM_PAGES = 640  # 16 prompts without sharing take 544

Prompts = list[list[int]]


def interleave(
    sides: tuple[Callable[[Prompts], Any], Callable[[Prompts], Any]],
    make_prompts: Callable[[random.Random], Prompts],
    num_rounds: int,
) -> list[tuple[Any, Any]]:
    """Run both sides on the same prompts each round, in turn first; results without the warm-up."""
    results: list[tuple[Any, Any]] = []
    for index in range(num_rounds + 1):
        prompts = make_prompts(random.Random(index))
        if index % 2:
            second = sides[1](prompts)
            results.append((sides[0](prompts), second))
        else:
            results.append((sides[0](prompts), sides[1](prompts)))
    return results[1:]


def random_tokens(source: random.Random, count: int, vocab_size: int) -> list[int]:
    return [source.randrange(FIRST_TEXT_TOKEN, vocab_size) for _ in range(count)]


# Throughput


def measure_throughput(
    path: Path, dtype: str, num_threads: int, num_rounds: int, new_tokens: int
) -> str:
    """One row of the table: generated tokens a second, ours and transformers'."""
    config = ModelConfig.load(path)
    reference = load_reference(path, config, dtype)
    llm = LLM(str(path), dtype=dtype, num_threads=num_threads, num_pages=NUM_PAGES)
    torch.set_num_threads(num_threads)
    params = SamplingParams(max_tokens=new_tokens, temperature=0.0, ignore_eos=True)

    def ours(prompts: Prompts) -> tuple[float, Prompts]:
        start_s = time.perf_counter()
        outputs = llm.generate(prompts, params)
        return time.perf_counter() - start_s, [output.token_ids for output in outputs]

    def theirs(prompts: Prompts) -> tuple[float, Prompts]:
        start_s = time.perf_counter()
        tokens = generate_padded(reference, prompts, new_tokens)
        return time.perf_counter() - start_s, tokens

    def make_prompts(source: random.Random) -> Prompts:
        return [
            random_tokens(source, source.randint(*PROMPT_TOKENS), config.vocab_size)
            for _ in range(NUM_REQUESTS)
        ]

    rounds = interleave((ours, theirs), make_prompts, num_rounds)
    llm.close()
    same = sum(a == b for (_, mine), (_, other) in rounds for a, b in zip(mine, other, strict=True))
    print(f"Same tokens as transformers in {same} of {NUM_REQUESTS * num_rounds} generations.")
    num_tokens = NUM_REQUESTS * new_tokens
    ratio = statistics.median(other / mine for (mine, _), (other, _) in rounds)
    return row(
        f"{NUM_REQUESTS} requests at once, {new_tokens} tokens each: tokens a second",
        f"{num_tokens / statistics.median(mine for (mine, _), _ in rounds):.1f}",
        f"transformers generate: {num_tokens / statistics.median(b for _, (b, _) in rounds):.1f}",
        ratio,
        f"at least {MIN_RATIO}x",
        ratio >= MIN_RATIO,
    )


def load_reference(path: Path, config: ModelConfig, dtype: str) -> Any:
    """transformers' Llama with the same weights, read by our loader."""
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            num_key_value_heads=config.num_kv_heads,
            rms_norm_eps=config.rms_norm_eps,
            max_position_embeddings=config.max_position,
            rope_parameters={"rope_type": "default", "rope_theta": config.rope.theta},
            tie_word_embeddings=config.tie_word_embeddings,
            bos_token_id=config.bos_token_id,
            eos_token_id=None,
            pad_token_id=0,
        )
    )
    weights = dict(load_tensors(path, config, torch.float32))
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}, (missing, unexpected)
    model.tie_weights()
    return model.to(getattr(torch, dtype)).train(False)


def generate_padded(model: Any, prompts: Prompts, new_tokens: int) -> Prompts:
    """Greedy ``generate`` on one left-padded batch; the new tokens of each prompt."""
    width = max(map(len, prompts))
    ids = torch.zeros(len(prompts), width, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for index, prompt in enumerate(prompts):
        ids[index, width - len(prompt) :] = torch.tensor(prompt)
        mask[index, width - len(prompt) :] = 1
    with torch.inference_mode():
        output = model.generate(
            input_ids=ids,
            attention_mask=mask,
            do_sample=False,
            max_new_tokens=new_tokens,
        )
    new: Prompts = output[:, width:].tolist()
    return new


# Prefix cache


def measure_first_token(path: Path, dtype: str, num_threads: int, num_rounds: int) -> str:
    """One row of the table: mean time to first token, with and without the prefix cache."""
    vocab_size = ModelConfig.load(path).vocab_size

    def make_side(disable_radix_cache: bool) -> tuple[Engine, Callable[[Prompts], float]]:
        config = Config(
            model=str(path),
            dtype=dtype,
            num_threads=num_threads,
            num_pages=NUM_PAGES,
            disable_radix_cache=disable_radix_cache,
        )
        engine = Engine(config, path, vocab_size, (), silent)
        return engine, lambda prompts: statistics.mean(first_token_times(engine, prompts))

    def make_prompts(source: random.Random) -> Prompts:
        prefix = random_tokens(source, PREFIX_TOKENS, vocab_size)
        return [
            prefix + random_tokens(source, SUFFIX_TOKENS, vocab_size) for _ in range(NUM_SHARING)
        ]

    (cached, run_cached), (uncached, run_uncached) = make_side(False), make_side(True)
    rounds = interleave((run_cached, run_uncached), make_prompts, num_rounds)
    cached.close()
    uncached.close()
    ratio = statistics.median(a / b for a, b in rounds)
    return row(
        f"{NUM_SHARING} requests, {PREFIX_TOKENS} tokens shared: mean time to first token, ms",
        f"{1000 * statistics.median(a for a, _ in rounds):.0f}",
        f"--disable-radix-cache: {1000 * statistics.median(b for _, b in rounds):.0f}",
        ratio,
        f"at most {MAX_TTFT_RATIO}x",
        ratio <= MAX_TTFT_RATIO,
    )


def first_token_times(engine: Engine, prompts: Prompts) -> list[float]:
    """Submit all prompts at once; seconds until the first token of each."""
    params = SamplingParams(max_tokens=2, temperature=0.0, ignore_eos=True)
    times: dict[int, float] = {}
    start_s = time.perf_counter()
    for rid, prompt in enumerate(prompts):
        engine.add(0, pack_add(rid, params, prompt, seed=0, max_tokens=2))
    while engine.has_work:
        for _, _, payload in engine.step():
            rows, _ = unpack_step(payload)
            for rid, _, _ in rows:
                times.setdefault(rid, time.perf_counter() - start_s)
    assert len(times) == len(prompts)
    return list(times.values())


# Report


def row(name: str, ours: str, other: str, ratio: float, target: str, met: bool) -> str:
    verdict = "met" if met else "missed"
    return f"| {name} | {ours} | {other} | {ratio:.2f}x | {target} | {verdict} |"


def processor_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--model", type=Path, help="a Llama .gguf (default: the demo model)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--only", choices=("throughput", "prefix"))
    arguments = parser.parse_args()
    path = arguments.model or demo_model()
    common = (path, arguments.dtype, arguments.threads, arguments.rounds)
    rows = []
    if arguments.only != "prefix":
        rows.append(measure_throughput(*common, arguments.new_tokens))
    if arguments.only != "throughput":
        rows.append(measure_first_token(*common))
    print(
        f"{path.name}, {arguments.dtype}, {arguments.threads} threads of {processor_name()}, torch "
        f"{torch.__version__}, transformers {version('transformers')}, median of "
        f"{arguments.rounds} interleaved rounds\n"
    )
    print("| figure | minisgl_fast | other side | ratio | target | |")
    print("|---|---|---|---|---|---|")
    print("\n".join(rows))


if __name__ == "__main__":
    main()
