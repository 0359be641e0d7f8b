"""Offline throughput: 256 requests at once through the engine, without sockets.

    python tools/bench_offline.py --model tests/data/configs/Qwen3-0.6B.json --dummy-weight

The workload is that of Mini-SGLang's offline benchmark: seed 0, prompts of randint(100, 1024)
random ids up to 10000, as many output tokens each, temperature 0.6, end of text ignored; 142,827
prompt and 133,966 output tokens in all. They are added as ``LLM.generate`` does it, the longest
answer first. Prints tokens a second, time a step, the floor and their ratio.

The floor is the time in which this device could move the bytes and do the products of the workload
at the copy bandwidth and the matrix rate measured in the same run: every weight once a step, every
key and value of a context once a token, all requests admitted at once, nothing else.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import time
from pathlib import Path
from random import Random
from typing import NamedTuple

import torch

from minisgl_fast.config import Config
from minisgl_fast.engine.engine import Engine
from minisgl_fast.llm import longest_first
from minisgl_fast.model.config import ModelConfig
from minisgl_fast.params import SamplingParams
from minisgl_fast.progress import ConsoleProgress
from minisgl_fast.wire import pack_add, unpack_step

MAX_ID = 10_000


class Request(NamedTuple):
    prompt: list[int]
    num_output: int


class Run(NamedTuple):
    """One timed run. Times in seconds."""

    duration: float
    num_steps: int
    num_output: int


def mini_sglang_workload(num_requests: int = 256, seed: int = 0) -> list[Request]:
    """The requests of Mini-SGLang's offline benchmark, drawn in its order."""
    random = Random(seed)
    prompts = [
        [random.randint(0, MAX_ID) for _ in range(random.randint(100, 1024))]
        for _ in range(num_requests)
    ]
    return [Request(prompt, random.randint(100, 1024)) for prompt in prompts]


def make_engine(arguments: argparse.Namespace) -> Engine:
    """An engine for the model of the command line."""
    path = model_folder(arguments.model)
    config = Config(
        model=str(path),
        dummy_weight=arguments.dummy_weight,
        device=arguments.device,
        max_model_len=arguments.max_model_len,
        max_prefill_length=arguments.max_prefill_length,
        cuda_graph_max_bs=arguments.cuda_graph_max_bs,
        overlap=not arguments.no_overlap,
        num_pages=arguments.num_pages,
    )
    vocab_limit = ModelConfig.load(path).vocab_size
    return Engine(config, path, vocab_limit, (), ConsoleProgress())


def model_folder(model: str) -> Path:
    """The folder of a model; for a bare config.json, a new one that holds only it."""
    path = Path(model)
    if path.suffix != ".json":
        return path
    folder = Path(tempfile.mkdtemp(prefix="minisgl_fast-config-"))
    shutil.copy(path, folder / "config.json")
    return folder


def add_all(engine: Engine, requests: list[Request], temperature: float = 0.6) -> None:
    """The longest answer first."""
    for rid in longest_first([request.num_output for request in requests]):
        request = requests[rid]
        params = SamplingParams(
            max_tokens=request.num_output, temperature=temperature, ignore_eos=True
        )
        payload = pack_add(rid, params, request.prompt, seed=rid, max_tokens=request.num_output)
        engine.add(0, payload)


def run(
    engine: Engine,
    requests: list[Request],
    temperature: float = 0.6,
    *,
    keep_cache: bool = False,
) -> Run:
    """Add all requests at once and step until all have ended; then empty the prefix cache."""
    if engine.facts()["vocab_size"] <= MAX_ID:
        raise SystemExit(f"the prompts have ids up to {MAX_ID}, the model has fewer")
    steps_before = engine.stats()["steps"]
    start = time.perf_counter()
    add_all(engine, requests, temperature)
    num_output = 0
    while engine.has_work:
        for _, _, payload in engine.step():
            num_output += len(unpack_step(payload)[0])
    duration = time.perf_counter() - start
    expected = sum(request.num_output for request in requests)
    if num_output != expected:
        raise SystemExit(f"{num_output} tokens came out, {expected} were asked for")
    if not keep_cache:
        engine.flush_cache()
    return Run(duration, engine.stats()["steps"] - steps_before, num_output)


class Ceilings(NamedTuple):
    """Bytes a second (read plus written) of a copy; floating-point operations a second."""

    bytes_per_s: float
    flops_per_s: float


def measure_ceilings(device: torch.device) -> Ceilings:
    """Measure a large copy and a large bfloat16 matrix product."""
    on_gpu = device.type == "cuda"
    num_bytes, size = (1 << 31, 8192) if on_gpu else (1 << 28, 1024)
    source = torch.ones(num_bytes // 4, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    a, b = (torch.randn(size, size, device=device).bfloat16() for _ in range(2))
    copy_s = _median_time(lambda: target.copy_(source), device)
    product_s = _median_time(lambda: a @ b, device)
    return Ceilings(2 * num_bytes / copy_s, 2 * size**3 / product_s)


def _median_time(function: object, device: torch.device, repeats: int = 10) -> float:
    times = []
    for _ in range(repeats + 2):
        if device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        function()  # type: ignore[operator]
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return sorted(times[2:])[repeats // 2]


def floor_s(model: ModelConfig, requests: list[Request], ceilings: Ceilings) -> float:
    """The least time for the workload at these ceilings, in seconds."""
    q_width = model.num_heads * model.head_dim
    kv_width = model.num_kv_heads * model.head_dim
    layer = model.hidden_size * (2 * q_width + 2 * kv_width + 3 * model.intermediate_size)
    body, head = model.num_layers * layer, model.hidden_size * model.vocab_size
    kv_bytes_per_token = 4 * model.num_layers * kv_width

    prompt_tokens = sum(len(request.prompt) for request in requests)
    attention = sum(2 * q_width * len(r.prompt) ** 2 for r in requests) * model.num_layers
    total = (2 * body * prompt_tokens + attention) / ceilings.flops_per_s
    for step in range(1, max(request.num_output for request in requests)):
        contexts = [len(r.prompt) + step for r in requests if r.num_output > step]
        weights_s = 2 * (body + head) / ceilings.bytes_per_s
        products_s = 2 * (body + head) * len(contexts) / ceilings.flops_per_s
        total += max(weights_s, products_s)
        total += sum(contexts) * kv_bytes_per_token / ceilings.bytes_per_s
    return total


def argument_parser(description: str) -> argparse.ArgumentParser:
    """The options that the offline benchmarks share."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--model", required=True, help="model folder, or a config.json")
    parser.add_argument("--dummy-weight", action="store_true")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--max-model-len", type=int, default=4096)
    parser.add_argument("--max-prefill-length", type=int, default=16384)
    parser.add_argument("--cuda-graph-max-bs", type=int, default=256)
    parser.add_argument("--no-overlap", action="store_true")
    parser.add_argument("--num-pages", type=int, help="of the KV cache; default: what fits")
    parser.add_argument("--repeats", type=int, default=2, help="timed runs; the best is reported")
    return parser


def main() -> None:
    parser = argument_parser(__doc__.splitlines()[0])
    parser.add_argument("--num-requests", type=int, default=256)
    arguments = parser.parse_args()
    requests = mini_sglang_workload(arguments.num_requests)
    engine = make_engine(arguments)
    model = ModelConfig.load(model_folder(arguments.model))
    run(engine, [Request(request.prompt[:64], 8) for request in requests])
    runs = [run(engine, requests) for _ in range(arguments.repeats)]
    ceilings = measure_ceilings(torch.device(engine.facts()["device"]))
    floor = floor_s(model, requests, ceilings)
    best = min(runs)
    print(
        f"ceilings {ceilings.bytes_per_s / 1e12:.2f} TB/s, "
        f"{ceilings.flops_per_s / 1e12:.0f} TFLOP/s"
    )
    for one in runs:
        print(f"{one.duration:.2f} s, {one.num_output / one.duration:,.0f} tok/s")
    print(
        json.dumps(
            {
                "model": arguments.model,
                "tok_s": round(best.num_output / best.duration),
                "duration_s": round(best.duration, 3),
                "steps": best.num_steps,
                "ms_per_step": round(1e3 * best.duration / best.num_steps, 3),
                "floor_s": round(floor, 3),
                "floor_ratio": round(floor / best.duration, 3),
            }
        )
    )


if __name__ == "__main__":
    main()
