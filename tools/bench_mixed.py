"""Attention of steps that hold decodes and chunks of prompts, for bench_kernels.py.

Each kind alone, and both as a step launches them: prefill first, decode beside it and after it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from bench_kernels import HEAD_DIM, NUM_KV_HEADS, PAGE_SIZE, num_rotations, row, time_us

from minisgl_fast.backend.cuda_attention import DecodeAttention, NewTokens
from minisgl_fast.backend.cuda_prefill import PrefillAttention, PrefillLoad
from minisgl_fast.backend.kv_layout import layer_shape

Chunk = tuple[int, int]  # new tokens of a prompt, and its context with them
HIDDEN = {40: 5120, 16: 1024}  # by query heads: Qwen3-14B, 0.6B
# query heads, decodes, the longest and the shortest of their contexts (the others lie between),
# chunks: steps of Qwen3-14B with 256 tokens each, then others
CASES: list[tuple[int, int, int, int, list[Chunk]]] = [
    (40, 24, 640, 640, [(170, 400), (62, 62)]),
    (40, 150, 820, 820, [(106, 120)]),
    (40, 150, 1480, 160, [(106, 120)]),
    (40, 191, 1042, 1042, [(65, 1010)]),
    (40, 191, 1780, 304, [(65, 1010)]),
    (40, 112, 2000, 360, [(80, 700), (64, 64)]),
    (16, 191, 1780, 304, [(65, 1010)]),
    (16, 200, 1500, 100, [(2048, 2048)]),
    (16, 600, 172, 172, [(65, 200)]),
]
WIDTHS = (5, 7, 10, 14, 8, 8, 8, 8)


class Step:
    """One layer's attention of a step over random pages."""

    def __init__(self, num_heads: int, contexts: list[int], chunks: list[Chunk]) -> None:
        bs = len(contexts)
        lengths = contexts + [total for _, total in chunks]
        news = [1] * bs + [new for new, _ in chunks]
        per_seq = [-(-length // PAGE_SIZE) for length in lengths]
        self.layer_shape = layer_shape(sum(per_seq), NUM_KV_HEADS, PAGE_SIZE, HEAD_DIM)
        self.num_bytes = sum(lengths) * NUM_KV_HEADS * HEAD_DIM * 4
        pages = torch.zeros(len(lengths), max(per_seq), dtype=torch.int32)
        for i, ids in enumerate(torch.split(torch.randperm(sum(per_seq)).int(), per_seq)):
            pages[i, : len(ids)] = ids
        self._context_lens = torch.tensor(lengths, dtype=torch.int32, device="cuda")
        self._slots = torch.arange(len(lengths), dtype=torch.int32, device="cuda")
        self._table = pages.cuda()
        self._q_start = torch.tensor([0, *news]).cumsum(0).int().cuda()
        self._num_decode, self._num_prefills = bs, len(chunks)
        self._num_new, self._max_context = sum(news) - bs, max(lengths[bs:])
        self._q = torch.randn(sum(news), num_heads, HEAD_DIM, device="cuda").bfloat16()
        self._out = torch.empty_like(self._q).flatten(1)
        qkv = torch.randn(bs, (num_heads + 2 * NUM_KV_HEADS) * HEAD_DIM, device="cuda").bfloat16()
        weight = torch.rand(HEAD_DIM, device="cuda").bfloat16()
        table = torch.rand(4096, HEAD_DIM, device="cuda")
        # cuBLAS's product of so many rows leaves their scales to attention.
        rows = torch.randn(bs, HIDDEN[num_heads], device="cuda").bfloat16()
        self._new = NewTokens(qkv, weight, weight, 1e-6, table, rows, 1e-6)
        self._decode = DecodeAttention(num_heads, NUM_KV_HEADS, HEAD_DIM, PAGE_SIZE)
        self._prefill = PrefillAttention(num_heads, NUM_KV_HEADS, HEAD_DIM)

    def prefill(self, layer: torch.Tensor) -> PrefillLoad | None:
        return self._prefill.launch(
            self._q,
            layer,
            self._out,
            self._q_start,
            self._context_lens,
            self._slots,
            self._table,
            first_seq=self._num_decode,
            num_seqs=self._num_prefills,
            num_tokens=self._num_new,
            max_context=self._max_context,
            scale=HEAD_DIM**-0.5,
        )

    def decode(self, layer: torch.Tensor, prefill: PrefillLoad | None = None) -> None:
        self._decode(
            self._new,
            layer,
            self._out,
            self._context_lens,
            self._slots,
            self._table,
            self._num_decode,
            HEAD_DIM**-0.5,
            pdl=True,
            prefill=prefill,
        )

    def both(self, layer: torch.Tensor) -> None:
        self.decode(layer, self.prefill(layer))


def bench_mixed(bandwidth: float) -> None:
    """Floor: the keys and values of the decodes."""
    print("decode and prefill attention of one step, us")
    head = ("heads", "decodes", "contexts", "chunks", "floor", "decode", "prefill", "both")
    row(*head, widths=WIDTHS)
    for num_heads, bs, longest, shortest, chunks in CASES:
        contexts = torch.linspace(longest, shortest, bs).int().tolist()
        step = Step(num_heads, contexts, chunks)
        num_layers = num_rotations(step.num_bytes)
        layers = [
            torch.randn(step.layer_shape, dtype=torch.bfloat16, device="cuda")
            for _ in range(num_layers)
        ]
        runs: list[Callable[[torch.Tensor], object]] = [step.decode, step.prefill, step.both]
        times = [time_us([partial(run, layer) for layer in layers]) for run in runs]
        floor = sum(contexts) * NUM_KV_HEADS * HEAD_DIM * 4 / bandwidth * 1e6
        text = " ".join(f"{new}/{total}" for new, total in chunks)
        row(num_heads, bs, f"{longest}-{shortest}", text, floor, *times, widths=WIDTHS)
        del layers
        torch.cuda.empty_cache()
