"""Every kernel against its floor, and against torch and FlashInfer where they have the same.

    python tools/bench_kernels.py [SECTION ...]

Each figure is the time of one launch in a CUDA graph of many, each launch on other buffers so that
nothing comes out of the L2 cache: the median over replays. The floor is bytes over the read
bandwidth measured in the same run.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

L2_BYTES = 60 << 20
ROTATE_BYTES = 4 * L2_BYTES


def time_us(launches: Sequence[Callable[[], Any]], *, replays: int = 15) -> float:
    """Microseconds a launch: all of ``launches`` in one graph, the median of its replays."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for launch in launches[:2]:
            launch()
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for launch in launches:
                launch()
        times = []
        for _ in range(replays + 2):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) * 1e3 / len(launches))
    return float(sorted(times[2:])[replays // 2])


def num_rotations(num_bytes: int) -> int:
    """How many buffers of this size to rotate through."""
    return max(2, min(64, -(-ROTATE_BYTES // num_bytes)))


def read_bandwidth() -> float:
    """Bytes a second of a plain read: the sum of a large tensor."""
    x = torch.ones(1 << 30, dtype=torch.float32, device="cuda")
    return x.nbytes / time_us([lambda: x.sum()] * 4) * 1e6


def row(*cells: object, widths: Sequence[int]) -> None:
    """One line of a table."""
    texts = (f"{cell:.1f}" if isinstance(cell, float) else str(cell) for cell in cells)
    print("  ".join(text.rjust(width) for text, width in zip(texts, widths, strict=True)))


# -------------------------------------------------------------------------------------------------
# Decode attention

DECODE_CASES = [
    # sequences, context, query heads
    (1, 1024, 16),
    (1, 8192, 16),
    (1, 32768, 16),
    (16, 1024, 16),
    (64, 1024, 16),
    (256, 128, 16),
    (256, 800, 16),
    (64, 4096, 16),
    (1, 1024, 40),
    (64, 1024, 40),
    (256, 800, 40),
]
PAGE_SIZE = 64
NUM_KV_HEADS = 8
HEAD_DIM = 128


def bench_decode(bandwidth: float) -> None:
    """One layer of decode attention: 8 kv heads of 128, pages of 64 at random places.

    QK-norm, RoPE and KV write of the new tokens are part of it. ``pdl`` overlaps each launch's
    start with the end of the one before.
    """
    from minisgl_fast.backend.cuda_attention import DecodeAttention, NewTokens
    from minisgl_fast.backend.kv_layout import layer_shape

    widths = (5, 6, 6, 8, 8, 8, 8, 9, 8, 10)
    print(f"decode attention, us; read bandwidth {bandwidth / 1e12:.2f} TB/s")
    head = ("bs", "ctx", "heads", "floor", "ours", "pdl", "TB/s", "of floor", "sdpa")
    row(*head, "flashinfer", widths=widths)
    skewed = [32768] + [128] * 255
    cases = [([context] * bs, heads) for bs, context, heads in DECODE_CASES] + [(skewed, 16)]
    for lengths, num_heads in cases:
        bs = len(lengths)
        per_seq = [-(-length // PAGE_SIZE) for length in lengths]
        num_pages = sum(per_seq)
        num_bytes = sum(lengths) * NUM_KV_HEADS * HEAD_DIM * 4
        rotations = num_rotations(num_bytes)
        shape = layer_shape(num_pages, NUM_KV_HEADS, PAGE_SIZE, HEAD_DIM)
        layers = [torch.randn(shape, dtype=torch.bfloat16, device="cuda") for _ in range(rotations)]
        order = torch.randperm(num_pages).int()
        table = torch.zeros(bs, max(per_seq), dtype=torch.int32)
        for i, pages in enumerate(torch.split(order, per_seq)):
            table[i, : len(pages)] = pages
        context_lens = torch.tensor(lengths, dtype=torch.int32)
        slots = torch.arange(bs, dtype=torch.int32, device="cuda")
        q = torch.randn(bs, num_heads, HEAD_DIM, dtype=torch.bfloat16, device="cuda")
        qkv = torch.randn(bs, (num_heads + 2 * NUM_KV_HEADS) * HEAD_DIM, device="cuda").bfloat16()
        weight = torch.rand(HEAD_DIM, device="cuda").bfloat16()
        rope = torch.rand(40960, HEAD_DIM, device="cuda")
        out = torch.empty_like(q)

        attention = DecodeAttention(num_heads, NUM_KV_HEADS, HEAD_DIM, PAGE_SIZE)
        batch = (context_lens.cuda(), slots, table.cuda(), bs, HEAD_DIM**-0.5)
        new = NewTokens(qkv, weight, weight, 1e-6, rope)
        plain = time_us([partial(attention, new, layer, out, *batch) for layer in layers])
        overlapped = time_us(
            [partial(attention, new, layer, out, *batch, True) for layer in layers]
        )
        del layers

        uniform = len(set(lengths)) == 1
        sdpa = _sdpa_us(q, lengths[0], rotations) if uniform else "-"
        flashinfer = _flashinfer_us(q, lengths, order.cuda(), rotations)
        floor = num_bytes / bandwidth * 1e6
        name = lengths[0] if uniform else "skew"
        figures = (floor, plain, overlapped, f"{num_bytes / plain / 1e6:.2f}")
        compared = (f"{floor / plain:.0%}", sdpa, flashinfer)
        row(bs, name, num_heads, *figures, *compared, widths=widths)
        torch.cuda.empty_cache()


def _sdpa_us(q: torch.Tensor, context: int, rotations: int) -> float:
    bs, _, _ = q.shape
    shape = (bs, NUM_KV_HEADS, context, HEAD_DIM)
    pairs = [
        tuple(torch.randn(shape, dtype=torch.bfloat16, device="cuda") for _ in range(2))
        for _ in range(rotations)
    ]
    sdpa = torch.nn.functional.scaled_dot_product_attention
    query = q[:, :, None]
    return time_us([partial(sdpa, query, k, v, enable_gqa=True) for k, v in pairs])


def _flashinfer_us(
    q: torch.Tensor, lengths: list[int], order: torch.Tensor, rotations: int
) -> float | str:
    try:
        import flashinfer  # type: ignore[import-not-found, unused-ignore]
    except ImportError:
        return "-"
    bs, num_heads, _ = q.shape
    counts = [-(-length // PAGE_SIZE) for length in lengths]
    indptr = torch.tensor([0, *counts]).cumsum(0).int().cuda()
    last = torch.tensor([(length - 1) % PAGE_SIZE + 1 for length in lengths]).int().cuda()
    workspace = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
        workspace, "NHD", use_tensor_cores=num_heads // NUM_KV_HEADS >= 4
    )
    arguments = (indptr, order, last, num_heads, NUM_KV_HEADS, HEAD_DIM, PAGE_SIZE)
    wrapper.plan(*arguments, q_data_type=q.dtype, kv_data_type=q.dtype)
    shape = (sum(counts), 2, PAGE_SIZE, NUM_KV_HEADS, HEAD_DIM)
    layers = [torch.randn(shape, dtype=torch.bfloat16, device="cuda") for _ in range(rotations)]
    return time_us([partial(wrapper.run, q, layer) for layer in layers])


# -------------------------------------------------------------------------------------------------
# QK-norm, RoPE and KV write


def bench_kv_store(bandwidth: float) -> None:
    """Fused QK-norm, RoPE and KV write, 16 query and 8 kv heads of 128."""
    from minisgl_fast.backend.cuda_kv import KvStore
    from minisgl_fast.backend.kv_layout import layer_shape

    widths = (7, 8, 8, 8)
    print("QK-norm + RoPE + KV write, us")
    row("tokens", "floor", "ours", "pdl", widths=widths)
    draw = {"dtype": torch.bfloat16, "device": "cuda"}
    weight = torch.rand(HEAD_DIM, **draw)  # type: ignore[call-overload]
    table = torch.rand(40960, HEAD_DIM, device="cuda")
    store = KvStore(16, NUM_KV_HEADS, HEAD_DIM, PAGE_SIZE, qk_norm=True)
    for num_tokens in (1, 16, 64, 256, 2048, 8192):
        width = (16 + 2 * NUM_KV_HEADS) * HEAD_DIM
        num_bytes = num_tokens * width * 4
        num_pages = num_tokens // PAGE_SIZE + 300
        shape = layer_shape(num_pages, NUM_KV_HEADS, PAGE_SIZE, HEAD_DIM)
        layers = [
            (
                torch.randn(num_tokens, width, **draw),  # type: ignore[call-overload]
                torch.empty(num_tokens, 16 * HEAD_DIM, **draw),  # type: ignore[call-overload]
                torch.empty(shape, **draw),  # type: ignore[call-overload]
            )
            for _ in range(min(16, num_rotations(num_bytes)))
        ]
        positions = torch.randint(0, 40960, (num_tokens,), device="cuda").int()
        slots = torch.randperm(num_pages * PAGE_SIZE, device="cuda")[:num_tokens].int()
        if num_tokens > 256:  # prefill: whole pages
            pages = torch.randperm(num_pages, device="cuda").int()[:, None] * PAGE_SIZE
            slots = (pages + torch.arange(PAGE_SIZE, device="cuda").int()).flatten()[:num_tokens]
        norm = (weight, weight, 1e-6, table, positions, slots)
        figures = [
            time_us([partial(store, x, *norm, q, kv, num_tokens, pdl) for x, q, kv in layers])
            for pdl in (False, True)
        ]
        row(num_tokens, num_bytes / bandwidth * 1e6, *figures, widths=widths)
        del layers


# -------------------------------------------------------------------------------------------------
# Decodes beside prompts, sampling, small operations


def bench_sampling(bandwidth: float) -> None:
    """See bench_sampling.py."""
    from bench_sampling import bench_sampling

    bench_sampling(bandwidth)


def bench_mixed(bandwidth: float) -> None:
    """See bench_mixed.py."""
    from bench_mixed import bench_mixed

    bench_mixed(bandwidth)


def bench_small(bandwidth: float) -> None:
    """See bench_sampling.py."""
    from bench_sampling import bench_small

    bench_small(bandwidth)


SECTIONS: dict[str, Callable[[float], None]] = {
    "decode": bench_decode,
    "mixed": bench_mixed,
    "kv_store": bench_kv_store,
    "sampling": bench_sampling,
    "small": bench_small,
}


def main() -> int:
    """Run the sections named, or all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("section", nargs="*", choices=[[], *SECTIONS], default=[])
    names = parser.parse_args().section or list(SECTIONS)
    if not torch.cuda.is_available():
        raise SystemExit("needs an NVIDIA GPU")
    torch.manual_seed(0)
    bandwidth = read_bandwidth()
    for name in names:
        SECTIONS[name](bandwidth)
        torch.cuda.empty_cache()
        print(flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
