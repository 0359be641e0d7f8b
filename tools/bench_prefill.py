"""Prefill attention in TFLOP/s: our kernels, torch's SDPA (flash, cuDNN), FlashInfer if there.

    python tools/bench_prefill.py                          # every row against every peer
    python tools/bench_prefill.py --no-peers --variant LAZY=8,PING_PONG=0 --variant LAZY=0

One layer, bfloat16, pages of 64 permuted at random, causal. Times are medians of single launches
between CUDA events; the contestants of a row take turns, so that a warm chip slows all alike. A
variant compiles the Hopper kernel with other -D constants, for sweeps; unnamed it is the product's.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from minisgl_fast.backend import cuda_prefill
from minisgl_fast.backend.cuda_prefill import PrefillAttention
from minisgl_fast.backend.kernels_table import ATTENTION_PREFILL_SM90
from minisgl_fast.backend.kv_layout import layer_shape

PAGE_SIZE = 64
NUM_KV_HEADS = 8

# Query heads, sequences, new tokens of each, cached tokens of each; head_dim if not 128.
ROWS: list[tuple[int, ...]] = [
    (16, 16, 1024, 0),
    (16, 4, 8192, 0),
    (16, 1, 32768, 0),
    (16, 8, 1024, 8192),
    (16, 128, 128, 1024),
    (40, 16, 1024, 0),
    (40, 4, 8192, 0),
    (40, 8, 1024, 8192),
    (16, 1, 64, 32768),
    (40, 4, 100, 8192),
    (32, 16, 1024, 0, 64),
    (32, 1, 32768, 0, 64),
]

Run = Callable[[], Any]


@dataclasses.dataclass
class Problem:
    """One row of the table: q and pages with random contents."""

    num_heads: int
    num_seqs: int
    q_len: int
    cached: int
    head_dim: int = 128

    def __post_init__(self) -> None:
        self.context = self.q_len + self.cached
        self.num_tokens = self.num_seqs * self.q_len
        pages_per_seq = -(-self.context // PAGE_SIZE)
        num_pages = self.num_seqs * pages_per_seq
        shape = layer_shape(num_pages, NUM_KV_HEADS, PAGE_SIZE, self.head_dim)
        self.kv = torch.randn(shape, dtype=torch.bfloat16, device="cuda")
        q_shape = (self.num_tokens, self.num_heads, self.head_dim)
        self.q = torch.randn(q_shape, dtype=torch.bfloat16, device="cuda")
        self.out = torch.empty_like(self.q).flatten(1)
        self.page_table = torch.randperm(num_pages, device="cuda").int().view(self.num_seqs, -1)
        sequences = torch.arange(self.num_seqs + 1, dtype=torch.int32, device="cuda")
        self.q_start = sequences * self.q_len
        self.seq_slots = sequences[:-1].contiguous()
        self.context_lens = torch.full_like(self.seq_slots, self.context)

    @property
    def name(self) -> str:
        after = f" after {self.cached}" if self.cached else ""
        heads = f"{self.num_heads} heads" + (", dim 64" if self.head_dim == 64 else "")
        return f"{heads}, {self.num_seqs} x {self.q_len}{after}"

    @property
    def flops(self) -> float:
        """Both products over what the mask leaves."""
        seen = self.q_len * self.cached + self.q_len * (self.q_len + 1) / 2
        return 4.0 * self.head_dim * self.num_heads * self.num_seqs * seen


def ours(problem: Problem, wgmma: bool | None, variant: str = "") -> Run:
    """A launch of our kernel; ``variant`` is NAME=VALUE,.. of -D constants."""
    pairs = (pair.split("=") for pair in variant.split(",") if pair)
    defines = tuple((name, int(value)) for name, value in pairs)
    specs = ATTENTION_PREFILL_SM90
    if defines:
        specs = tuple(
            dataclasses.replace(spec, name=f"{spec.name}:{variant}", defines=spec.defines + defines)
            for spec in specs
        )
    with mock.patch.object(cuda_prefill, "ATTENTION_PREFILL_SM90", specs):
        attention = PrefillAttention(problem.num_heads, NUM_KV_HEADS, problem.head_dim, wgmma=wgmma)

    def run() -> None:
        attention.launch(
            problem.q,
            problem.kv,
            problem.out,
            problem.q_start,
            problem.context_lens,
            problem.seq_slots,
            problem.page_table,
            first_seq=0,
            num_seqs=problem.num_seqs,
            num_tokens=problem.num_tokens,
            max_context=problem.context,
            scale=problem.head_dim**-0.5,
        )

    return run


def torch_sdpa(problem: Problem, backend: SDPBackend) -> Run | None:
    """Causal attention over dense K and V, or None where torch has no causal form (a prefix)."""
    if problem.cached:
        return None

    def heads(count: int) -> Tensor:
        shape = (problem.num_seqs, problem.q_len, count, problem.head_dim)
        return torch.randn(shape, dtype=torch.bfloat16, device="cuda").transpose(1, 2)

    q, k, v = heads(problem.num_heads), heads(NUM_KV_HEADS), heads(NUM_KV_HEADS)

    def run() -> None:
        with sdpa_kernel(backend):
            torch.nn.functional.scaled_dot_product_attention(
                q, k, v, is_causal=True, enable_gqa=True
            )

    return run


def flashinfer(problem: Problem, backend: str) -> Run | None:
    """FlashInfer's paged prefill with pages of 64, or None where it cannot be imported."""
    try:
        import flashinfer as library  # type: ignore[import-not-found, unused-ignore]
    except ImportError:
        return None
    workspace = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")
    wrapper = library.BatchPrefillWithPagedKVCacheWrapper(workspace, "NHD", backend=backend)
    pages = problem.page_table.shape[1]
    wrapper.plan(
        problem.q_start,
        torch.arange(problem.num_seqs + 1, dtype=torch.int32, device="cuda") * pages,
        problem.page_table.flatten(),
        (problem.context_lens - 1) % PAGE_SIZE + 1,
        problem.num_heads,
        NUM_KV_HEADS,
        problem.head_dim,
        PAGE_SIZE,
        causal=True,
        q_data_type=torch.bfloat16,
    )
    shape = (problem.page_table.numel(), 2, PAGE_SIZE, NUM_KV_HEADS, problem.head_dim)
    kv = problem.kv.view(shape)
    return lambda: wrapper.run(problem.q, kv)


def median_ms(runs: list[Run | None], repeats: int) -> list[float | None]:
    """Medians of all contestants, launched in turn, so that a warm chip slows them all alike."""

    def event() -> Any:
        return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call, unused-ignore]

    present = [run for run in runs if run is not None]
    times: list[list[Any]] = [[] for _ in present]
    for repeat in range(-3, repeats):
        for run, pairs in zip(present, times, strict=True):
            start, end = event(), event()
            start.record()
            run()
            end.record()
            if repeat >= 0:
                pairs.append((start, end))
    torch.cuda.synchronize()
    medians = iter([statistics.median(a.elapsed_time(b) for a, b in pairs) for pairs in times])
    return [None if run is None else next(medians) for run in runs]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--variant", action="append", default=[], metavar="NAME=VALUE,..")
    parser.add_argument("--no-peers", action="store_true", help="our Hopper kernel only")
    parser.add_argument("--rows", type=int, nargs="*", help="indices of rows (all by default)")
    parser.add_argument("--repeats", type=int, default=15)
    arguments = parser.parse_args()
    torch.manual_seed(0)

    contestants: dict[str, Callable[[Problem], Run | None]] = {"ours": lambda p: ours(p, None)}
    for variant in arguments.variant:
        contestants[variant] = lambda p, v=variant: ours(p, None, v)  # type: ignore[misc]
    if not arguments.no_peers:
        contestants["ours, mma.sync"] = lambda p: ours(p, False)
        contestants["SDPA flash"] = lambda p: torch_sdpa(p, SDPBackend.FLASH_ATTENTION)
        contestants["SDPA cuDNN"] = lambda p: torch_sdpa(p, SDPBackend.CUDNN_ATTENTION)
        contestants["FlashInfer fa2"] = lambda p: flashinfer(p, "fa2")
        contestants["FlashInfer fa3"] = lambda p: flashinfer(p, "fa3")

    print("| TFLOP/s | " + " | ".join(contestants) + " |")
    print("|" + "---|" * (len(contestants) + 1))
    for index in arguments.rows if arguments.rows is not None else range(len(ROWS)):
        problem = Problem(*ROWS[index])
        runs = [make(problem) for make in contestants.values()]
        cells = [
            "-" if ms is None else f"{problem.flops / ms / 1e9:.0f}"
            for ms in median_ms(runs, arguments.repeats)
        ]
        print(f"| {problem.name} | " + " | ".join(cells) + " |", flush=True)
        del problem, runs


if __name__ == "__main__":
    main()
