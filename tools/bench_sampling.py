"""Sections of bench_kernels.py: the sampler, and the small operations of a step."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from bench_kernels import num_rotations, row, time_us

VOCAB = 151936
BATCHES = (1, 16, 64, 256)

MODES: dict[str, dict[str, float]] = {
    "greedy": {"temperature": 0.0},
    "temperature": {"temperature": 1.0},
    "top-p": {"temperature": 1.0, "top_p": 0.9},
    "top-k+top-p": {"temperature": 1.0, "top_k": 50, "top_p": 0.9},
    "+ penalties": {"temperature": 1.0, "top_k": 50, "top_p": 0.9, "sample_flags": 1},
    "logprobs": {"temperature": 1.0, "sample_flags": 8},
}


def make_logits(rows: int, peaked: bool) -> torch.Tensor:
    """bf16: random normal, as numbers in papers have them, or with the shape of a model's."""
    logits = torch.randn(rows, VOCAB, device="cuda")
    if peaked:
        logits *= 2.2
        best = torch.randint(0, VOCAB, (rows, 30), device="cuda")
        heights = 20 - 1.2 * torch.arange(30, device="cuda") ** 0.6
        logits.scatter_(1, best, heights + torch.randn(rows, 30, device="cuda"))
    return logits.bfloat16()


def make_step(rows: int, params: dict[str, float]) -> Any:
    """A step of ``rows`` samples with the same parameters and seeds of their own."""
    floats = {"temperature": 1.0, "top_p": 1.0, "min_p": 0.0, "presence": 0.5, "frequency": 0.1}
    floats |= {"repetition": 1.1}
    integers = {"top_k": 0, "sample_flags": 0}
    draw: dict[str, Any] = {"device": "cuda", "dtype": torch.int32}
    fields: dict[str, Any] = {
        name: torch.full((rows,), float(params.get(name, value)), device="cuda")
        for name, value in floats.items()
    }
    for name, default in integers.items():
        fields[name] = torch.full((rows,), int(params.get(name, default)), **draw)
    for name in ("seed_lo", "seed_hi", "sample_positions"):
        fields[name] = torch.randint(0, 2**31 - 1, (rows,), **draw)
    fields["sample_slots"] = torch.arange(rows, **draw)
    fields["mask_rows"] = torch.zeros(rows, **draw)
    fields["masks"] = None
    fields["bias_start"] = torch.zeros(rows + 1, **draw)
    fields["bias_ids"] = torch.zeros(1, **draw)
    fields["bias_values"] = torch.zeros(1, device="cuda")
    return SimpleNamespace(num_samples=rows, **fields)


def bench_sampling(
    bandwidth: float, batches: tuple[int, ...] = BATCHES, clusters: tuple[int, ...] = (1, 2, 4, 8)
) -> None:
    """Vocabulary 151,936, bf16 logits; torch on the same, FlashInfer on their probabilities."""
    from minisgl_fast.backend.cuda_sampler import Sampler
    from minisgl_fast.backend.step import DeviceState, Logprobs

    device = torch.device("cuda", torch.cuda.current_device())
    widths = (12, 8, 5, 8, 8, 8, 10)
    print(f"sampling, us; at most {max(clusters)} blocks a row")
    row("mode", "logits", "bs", "floor", "ours", "torch", "flashinfer", widths=widths)
    state = DeviceState(max(batches), 1, VOCAB, device)
    state.counts[:, ::300] = 1  # some 500 ids seen
    for rows in batches:
        floor = rows * VOCAB * 2 / bandwidth * 1e6
        sampler = Sampler(rows, VOCAB, device, clusters)
        out = Logprobs.allocate(rows, device)
        for kind in ("normal", "peaked"):
            count = min(num_rotations(rows * VOCAB * 2), 16)
            logits = [make_logits(rows, kind == "peaked") for _ in range(count)]
            for mode, params in MODES.items():
                step = make_step(rows, params)
                ours = time_us([partial(sampler, x, step, state, VOCAB, out) for x in logits])
                theirs = _torch_us(mode, logits), _flashinfer_us(mode, logits)
                row(mode, kind, rows, floor, ours, *theirs, widths=widths)
            del logits


def _torch_us(mode: str, logits: list[torch.Tensor]) -> float | str:
    if mode == "greedy":
        return time_us([partial(torch.argmax, x, -1) for x in logits])
    if mode == "temperature":
        return time_us([lambda x=x: x.float().softmax(-1).multinomial(1) for x in logits])  # type: ignore[misc]
    return "-"


def _flashinfer_us(mode: str, logits: list[torch.Tensor]) -> float | str:
    try:
        from flashinfer import sampling  # type: ignore[import-not-found, unused-ignore]
    except ImportError:
        return "-"
    run = {
        "temperature": sampling.sampling_from_probs,
        "top-p": partial(sampling.top_p_sampling_from_probs, top_p=0.9),
        "top-k+top-p": partial(sampling.top_k_top_p_sampling_from_probs, top_k=50, top_p=0.9),
    }.get(mode)
    if run is None:
        return "-"
    return time_us([partial(run, x.float().softmax(-1)) for x in logits])


def bench_small(bandwidth: float) -> None:
    """Residual addition and RMSNorm, SiLU * up, embedding of Qwen3-0.6B (hidden 1024, MLP 3072)."""
    from minisgl_fast.backend.cuda import CudaBackend
    from minisgl_fast.backend.cuda_linear import Linears
    from minisgl_fast.backend.kernel import get_kernel

    device = torch.device("cuda", torch.cuda.current_device())
    backend, linears = CudaBackend(device), Linears(device, 1, VOCAB)
    backend._embed = get_kernel("step", "embed")
    widths = (14, 7, 8, 8)
    print("small operations of Qwen3-0.6B, us")
    row("operation", "tokens", "floor", "ours", widths=widths)
    draw: dict[str, Any] = {"dtype": torch.bfloat16, "device": "cuda"}
    table, weight = torch.randn(VOCAB, 1024, **draw), torch.randn(1024, **draw)
    for tokens in (1, 256, 8192):
        floor = tokens * 1024 / bandwidth * 1e6  # of one byte a value
        copies = range(min(num_rotations(tokens * 1024 * 8), 16))
        rows = [torch.randn(tokens, 1024, **draw) for _ in copies]
        us = time_us([partial(linears.rms_norm, x, weight, 1e-6) for x in rows])
        row("rms_norm", tokens, 4 * floor, us, widths=widths)
        gates = [torch.randn(tokens, 6144, **draw) for _ in copies]
        us = time_us([partial(linears.silu_mul, x) for x in gates])
        row("silu_mul", tokens, 18 * floor, us, widths=widths)
        last_token: Any = SimpleNamespace(last_token=torch.zeros(1, device="cuda").int())
        steps: list[Any] = [
            SimpleNamespace(
                num_tokens=tokens,
                input_ids=torch.randint(0, VOCAB, (tokens,), device="cuda").int(),
                seq_slots=torch.zeros(tokens, dtype=torch.int32, device="cuda"),
            )
            for _ in copies
        ]
        us = time_us([partial(backend.embed, step, last_token, table) for step in steps])
        row("embed", tokens, 4 * floor, us, widths=widths)
