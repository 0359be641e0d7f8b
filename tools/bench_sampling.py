"""Sections of bench_kernels.py: the sampler, and the small operations of a step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

VOCAB = 151936
BATCHES = (1, 16, 64, 256)

MODES: dict[str, dict[str, float]] = {
    "greedy": {"temperature": 0.0},
    "temperature": {"temperature": 1.0},
    "top-p": {"temperature": 1.0, "top_p": 0.9},
    "top-k+top-p": {"temperature": 1.0, "top_k": 50, "top_p": 0.9},
    "penalties": {"temperature": 1.0, "top_k": 50, "top_p": 0.9, "sample_flags": 1},
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
    from types import SimpleNamespace

    floats = {"temperature": 1.0, "top_p": 1.0, "min_p": 0.0, "presence": 0.5, "frequency": 0.1}
    floats |= {"repetition": 1.1}
    integers = {"top_k": 0, "sample_flags": 0}
    draw = {"device": "cuda", "dtype": torch.int32}
    fields: dict[str, Any] = {
        name: torch.full((rows,), float(params.get(name, value)), device="cuda")
        for name, value in floats.items()
    }
    for name, default in integers.items():
        fields[name] = torch.full((rows,), int(params.get(name, default)), **draw)  # type: ignore[arg-type]
    for name in ("seed_lo", "seed_hi", "sample_positions"):
        fields[name] = torch.randint(0, 2**31 - 1, (rows,), **draw)  # type: ignore[call-overload]
    fields["sample_slots"] = torch.arange(rows, **draw)  # type: ignore[call-overload]
    fields["bias_start"] = torch.zeros(rows + 1, **draw)  # type: ignore[call-overload]
    fields["bias_ids"] = torch.zeros(1, **draw)  # type: ignore[call-overload]
    fields["bias_values"] = torch.zeros(1, device="cuda")
    return SimpleNamespace(num_samples=rows, **fields)


def bench_sampling(
    bandwidth: float,
    time_us: Callable[..., float],
    num_rotations: Callable[[int], int],
    row: Callable[..., None],
    batches: tuple[int, ...] = BATCHES,
    clusters: tuple[int, ...] = (1, 2, 4, 8),
    peers: bool = True,
) -> None:
    """Vocabulary 151,936, bf16 logits; torch on the same, FlashInfer on their probabilities."""
    from minisgl_fast.backend.cuda_sampler import Sampler
    from minisgl_fast.backend.step import DeviceState, Logprobs

    device = torch.device("cuda", torch.cuda.current_device())
    widths = (12, 8, 5, 8, 8, 8, 10)
    print(f"sampling, us; clusters {clusters}")
    row("mode", "logits", "bs", "floor", "ours", "torch", "flashinfer", widths=widths)
    state = DeviceState(max(batches), 1, VOCAB, device)
    state.counts.random_(0, 2)
    for rows in batches:
        num_bytes = rows * VOCAB * 2
        sampler = Sampler(rows, VOCAB, device, clusters)
        out = Logprobs.allocate(rows, device)
        for peaked in (False, True):
            count = min(num_rotations(num_bytes), 16)
            logits = [make_logits(rows, peaked) for _ in range(count)]
            for mode, params in MODES.items():
                step = make_step(rows, params)
                ours = time_us(
                    [lambda x=x, s=step: sampler(x, s, state, VOCAB, out) for x in logits]
                )
                theirs: tuple[float | str, float | str] = ("-", "-")
                if peers:
                    theirs = _torch_us(mode, logits, time_us), _flashinfer_us(mode, logits, time_us)
                kind = "peaked" if peaked else "normal"
                row(mode, kind, rows, num_bytes / bandwidth * 1e6, ours, *theirs, widths=widths)
            del logits


def _torch_us(mode: str, logits: list[torch.Tensor], time_us: Callable[..., float]) -> float | str:
    if mode == "greedy":
        return time_us([lambda x=x: x.argmax(-1) for x in logits])
    if mode == "temperature":
        return time_us([lambda x=x: x.float().softmax(-1).multinomial(1) for x in logits])
    return "-"


def _flashinfer_us(
    mode: str, logits: list[torch.Tensor], time_us: Callable[..., float]
) -> float | str:
    try:
        from flashinfer import sampling  # type: ignore[import-not-found, unused-ignore]
    except ImportError:
        return "-"
    probs = [x.float().softmax(-1) for x in logits]
    if mode == "top-p":
        return time_us([lambda p=p: sampling.top_p_sampling_from_probs(p, 0.9) for p in probs])
    if mode == "top-k+top-p":
        return time_us(
            [lambda p=p: sampling.top_k_top_p_sampling_from_probs(p, 50, 0.9) for p in probs]
        )
    if mode == "temperature":
        return time_us([lambda p=p: sampling.sampling_from_probs(p) for p in probs])
    return "-"


def bench_small(
    bandwidth: float,
    time_us: Callable[..., float],
    num_rotations: Callable[[int], int],
    row: Callable[..., None],
) -> None:
    """add + RMSNorm, SiLU * up, embedding of Qwen3-0.6B (hidden 1024, MLP 3072)."""
    from types import SimpleNamespace

    from minisgl_fast.backend.cuda import CudaBackend
    from minisgl_fast.backend.kernel import get_kernel

    backend = CudaBackend(torch.device("cuda", torch.cuda.current_device()))
    for spec, entry in (
        ("step", "embed"),
        ("rms_norm", "add_rms_norm"),
        ("silu_mul", "silu_mul"),
    ):
        setattr(backend, f"_{entry}", get_kernel(spec, entry))
    widths = (14, 7, 8, 8)
    print("small operations of Qwen3-0.6B, us")
    row("operation", "tokens", "floor", "ours", widths=widths)
    draw: dict[str, Any] = {"dtype": torch.bfloat16, "device": "cuda"}
    table, weight = torch.randn(VOCAB, 1024, **draw), torch.randn(1024, **draw)
    for tokens in (1, 256, 8192):
        floor = tokens * 1024 * 8 / bandwidth * 1e6
        count = min(num_rotations(tokens * 1024 * 8), 16)
        pairs = [[torch.randn(tokens, 1024, **draw) for _ in range(2)] for _ in range(count)]
        us = time_us([lambda x=x, r=r: backend.add_rms_norm(x, r, weight, 1e-6) for x, r in pairs])
        row("add_rms_norm", tokens, floor, us, widths=widths)
        gates = [torch.randn(tokens, 6144, **draw) for _ in range(count)]
        us = time_us([lambda x=x: backend.silu_mul(x) for x in gates])
        row("silu_mul", tokens, tokens * 3072 * 6 / bandwidth * 1e6, us, widths=widths)
        ids = [torch.randint(0, VOCAB, (tokens,), device="cuda").int() for _ in range(count)]
        slots = torch.zeros(tokens, dtype=torch.int32, device="cuda")
        state: Any = SimpleNamespace(last_token=slots)
        us = time_us(
            [
                lambda x=x: backend.embed(
                    SimpleNamespace(num_tokens=len(x), input_ids=x, seq_slots=slots),  # type: ignore[arg-type]
                    state,
                    table,
                )
                for x in ids
            ]
        )
        row("embed", tokens, floor / 2, us, widths=widths)
