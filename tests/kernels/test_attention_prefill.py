"""Prefill attention against float32 on random page tables; both kernels, every head shape.

Whatever must not be read is poisoned: rows of pages past the context are NaN, unused pages too,
and page-table columns past the last page hold an index far outside the cache.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from minisgl_fast.backend.cuda_prefill import PrefillAttention, PrefillLoad
from minisgl_fast.backend.kv_layout import swizzle

pytest.importorskip("cupy", reason="the GPU backend needs CuPy")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
needs_hopper = pytest.mark.skipif(not HOPPER, reason="wgmma needs a Hopper GPU")
PATHS = [
    pytest.param(False, id="mma"),
    pytest.param(True, id="wgmma", marks=needs_hopper),
]
# Query heads, kv heads, head_dim: Qwen3 0.6B, 8B, 14B, 32B; Llama-3.1-8B; Llama-3.2-1B;
# Qwen2.5-0.5B; SmolLM2-135M; groups of 1 and 16.
SHAPES = [
    (16, 8, 128),
    (32, 8, 128),
    (40, 8, 128),
    (64, 8, 128),
    (32, 8, 64),
    (14, 2, 64),
    (9, 3, 64),
    (4, 4, 128),
    (32, 2, 128),
    (32, 2, 64),
]


@dataclass
class Case:
    """One step over random pages; ``keys`` and ``values`` [seq][context, kv heads, dim] float32."""

    attention: PrefillAttention
    q: Tensor
    kv: Tensor
    q_start: Tensor
    context_lens: Tensor
    seq_slots: Tensor
    page_table: Tensor
    keys: list[Tensor]
    values: list[Tensor]
    num_decode: int
    scale: float
    max_context: int  # as the launch is told; 0: no splits

    def run(self) -> Tensor:
        out = torch.full_like(self.q.flatten(1), float("nan"))
        self.launch(out)
        torch.cuda.synchronize()
        return out

    def launch(self, out: Tensor) -> PrefillLoad | None:
        return self.attention.launch(
            self.q,
            self.kv,
            out,
            self.q_start,
            self.context_lens,
            self.seq_slots,
            self.page_table,
            first_seq=self.num_decode,
            num_seqs=len(self.keys) - self.num_decode,
            num_tokens=self.q.shape[0] - self.num_decode,
            max_context=self.max_context,
            scale=self.scale,
        )


def make_case(
    wgmma: bool,
    shape: tuple[int, int, int],
    lengths: list[tuple[int, int]],
    *,
    page_size: int = 64,
    num_decode: int = 0,
    seed: int = 0,
    spread: float = 1.0,
) -> Case:
    """``lengths``: (q_len, context_len) of each sequence; the first ``num_decode`` are decode."""
    num_heads, num_kv_heads, head_dim = shape
    generator = torch.Generator("cuda").manual_seed(seed)

    def normal(*size: int) -> Tensor:
        x = torch.randn(*size, generator=generator, device="cuda") * spread
        return x.to(torch.bfloat16)

    counts = [-(-context // page_size) for _, context in lengths]
    num_pages = sum(counts) + 3
    order = torch.randperm(num_pages, generator=generator, device="cuda").int()
    slots = torch.randperm(len(lengths) + 4, generator=generator, device="cuda").int()
    table = torch.full(
        (len(lengths) + 4, max(counts) + 2), 1 << 30, dtype=torch.int32, device="cuda"
    )
    k = torch.full(
        (num_pages, page_size, num_kv_heads, head_dim),
        float("nan"),
        dtype=torch.bfloat16,
        device="cuda",
    )
    v = k.clone()
    keys, values, used = [], [], 0
    for index, (_, context) in enumerate(lengths):
        pages = order[used : used + counts[index]]
        used += counts[index]
        table[slots[index], : counts[index]] = pages
        for cache, kept in ((k, keys), (v, values)):
            rows = torch.full(
                (counts[index] * page_size, num_kv_heads, head_dim),
                float("nan"),
                dtype=torch.bfloat16,
                device="cuda",
            )
            rows[:context] = normal(context, num_kv_heads, head_dim)
            kept.append(rows[:context].float())
            cache[pages.long()] = rows.view(-1, page_size, num_kv_heads, head_dim)
    starts = [0]
    for q_len, _ in lengths:
        starts.append(starts[-1] + q_len)
    return Case(
        attention=PrefillAttention(num_heads, num_kv_heads, head_dim, wgmma=wgmma),
        q=normal(starts[-1], num_heads, head_dim),
        kv=swizzle(k, v),
        q_start=torch.tensor(starts, dtype=torch.int32, device="cuda"),
        context_lens=torch.tensor([c for _, c in lengths], dtype=torch.int32, device="cuda"),
        seq_slots=slots[: len(lengths)].contiguous(),
        page_table=table,
        keys=keys,
        values=values,
        num_decode=num_decode,
        scale=head_dim**-0.5,
        max_context=max(context for _, context in lengths[num_decode:]),
    )


def reference(case: Case) -> Tensor:
    """float32 attention of the prefill rows, float64 where that is cheap; other rows are NaN."""
    out = torch.full(case.q.shape, float("nan"), dtype=torch.float32, device="cuda")
    starts = case.q_start.tolist()
    for index in range(case.num_decode, len(case.keys)):
        keys, values = case.keys[index], case.values[index]
        context, group = keys.shape[0], case.q.shape[1] // keys.shape[1]
        q_len = starts[index + 1] - starts[index]
        dtype = torch.float64 if q_len * context < 1 << 18 else torch.float32
        for head in range(case.q.shape[1]):
            k, v = keys[:, head // group].to(dtype), values[:, head // group].to(dtype)
            for row in range(0, q_len, 4096):
                last = min(row + 4096, q_len)
                rows = slice(starts[index] + row, starts[index] + last)
                scores = case.q[rows, head].to(dtype) @ k.T * case.scale
                seen = torch.arange(context - q_len + row, context - q_len + last, device="cuda")
                hidden = torch.arange(context, device="cuda")[None, :] > seen[:, None]
                scores.masked_fill_(hidden, float("-inf"))
                out[rows, head] = (scores.softmax(-1) @ v).float()
    return out.flatten(1)


def check(case: Case) -> Tensor:
    out = case.run()
    expected = reference(case)
    first = int(case.q_start[case.num_decode])
    assert out[:first].isnan().all(), "rows of decode sequences were written"
    actual, expected = out[first:].float(), expected[first:]
    assert not actual.isnan().any()
    error = (actual - expected).norm() / expected.norm()
    assert error < 5e-3
    worst_row = ((actual - expected).norm(dim=1) / expected.norm(dim=1)).max()
    assert worst_row < 1e-2
    assert torch.equal(out[first:], case.run()[first:]), "a second run gives other bits"
    return out


@pytest.fixture(autouse=True)
def exact_float32() -> None:
    assert not torch.backends.cuda.matmul.allow_tf32


@pytest.mark.parametrize("wgmma", PATHS)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_head_shape(wgmma: bool, shape: tuple[int, int, int]) -> None:
    lengths = [(1, 1), (63, 63), (64, 64), (65, 65), (200, 333), (5, 1000), (129, 129), (300, 301)]
    check(make_case(wgmma, shape, lengths, seed=1))


@pytest.mark.parametrize("wgmma", PATHS)
@pytest.mark.parametrize("page_size", [16, 32, 64, 128, 256])
def test_every_page_size(wgmma: bool, page_size: int) -> None:
    for shape in ((16, 8, 128), (14, 2, 64)):
        lengths = [
            (1, page_size),
            (page_size - 1, page_size - 1),
            (page_size, page_size),
            (page_size + 1, page_size + 1),
            (page_size, 3 * page_size - 1),
            (7, 5 * page_size + 1),
            (777, 777),
        ]
        check(make_case(wgmma, shape, lengths, page_size=page_size, seed=page_size))


@pytest.mark.parametrize("wgmma", PATHS)
def test_many_random_sequences(wgmma: bool) -> None:
    generator = torch.Generator().manual_seed(7)
    for seed, shape in enumerate([(16, 8, 128), (40, 8, 128), (9, 3, 64)]):
        lengths = []
        for _ in range(100):
            q_len = int(torch.randint(1, 400, (), generator=generator))
            cached = int(torch.randint(0, 600, (), generator=generator))
            lengths.append((q_len, q_len + (cached if seed != 1 else cached % 3)))
        check(make_case(wgmma, shape, lengths, seed=seed))


@pytest.mark.parametrize("wgmma", PATHS)
def test_decode_rows_of_a_mixed_batch_are_left_alone(wgmma: bool) -> None:
    lengths = [(1, 100)] * 40 + [(100, 400), (1, 50), (33, 33)]
    check(make_case(wgmma, (32, 8, 128), lengths, num_decode=40, seed=3))


@pytest.mark.parametrize("wgmma", PATHS)
@pytest.mark.parametrize("cached", [1, 63, 64, 4096, 8192])
def test_cached_prefix(wgmma: bool, cached: int) -> None:
    for q_len in (1, 50, 600):
        check(make_case(wgmma, (16, 8, 128), [(q_len, cached + q_len)] * 2, seed=cached))


@needs_hopper
@pytest.mark.parametrize("shape", [(16, 8, 128), (40, 8, 128), (14, 2, 64), (9, 3, 64)])
@pytest.mark.parametrize("lengths", [[(1, 5000)], [(33, 32768)], [(70, 9000), (1, 100), (9, 9)]])
def test_few_rows_over_many_keys_are_split(
    shape: tuple[int, int, int], lengths: list[tuple[int, int]]
) -> None:
    case = make_case(True, shape, lengths, seed=9)
    split = check(case).float()
    case.max_context = 0
    whole = check(case).float()
    assert not torch.equal(split, whole), "nothing was split"
    assert (split - whole).norm() / whole.norm() < 5e-3


@pytest.mark.parametrize("wgmma", PATHS)
@pytest.mark.parametrize("shape", [(16, 8, 128), (14, 2, 64)])
def test_long_prompt(wgmma: bool, shape: tuple[int, int, int]) -> None:
    check(make_case(wgmma, shape, [(32768, 32768)], seed=4))


@pytest.mark.parametrize("wgmma", PATHS)
def test_large_scores(wgmma: bool) -> None:
    """Scores of some hundred: the running maximum must do its work."""
    check(make_case(wgmma, (16, 8, 128), [(500, 900), (40, 2000)], seed=5, spread=4.0))


@pytest.mark.parametrize("wgmma", PATHS)
def test_chunks_give_the_bits_of_the_whole_prompt(wgmma: bool) -> None:
    """Key tiles are counted from position 0 and masked ones change nothing."""
    case = make_case(wgmma, (16, 8, 128), [(1000, 1000)], seed=6)
    whole = check(case)
    q = case.q
    for chunk in (64, 100, 333, 999):
        for first in range(0, 1000, chunk):
            last = min(first + chunk, 1000)
            case.q = q[first:last].contiguous()
            case.q_start = torch.tensor([0, last - first], dtype=torch.int32, device="cuda")
            case.context_lens = torch.tensor([last], dtype=torch.int32, device="cuda")
            assert torch.equal(case.run(), whole[first:last])


@pytest.mark.parametrize("wgmma", PATHS)
def test_a_sequence_alone_gives_the_bits_it_gives_in_a_batch(wgmma: bool) -> None:
    lengths = [(200, 700), (1, 77), (333, 333), (64, 4000)]
    case = make_case(wgmma, (40, 8, 128), lengths, seed=10)
    case.max_context = 0  # splits depend on how busy the chip is, and round differently
    together = check(case)
    starts = case.q_start.tolist()
    q, contexts, slots = case.q, case.context_lens, case.seq_slots
    for index, (q_len, _) in enumerate(lengths):
        rows = slice(starts[index], starts[index + 1])
        case.q = q[rows].contiguous()
        case.q_start = torch.tensor([0, q_len], dtype=torch.int32, device="cuda")
        case.context_lens = contexts[index : index + 1].contiguous()
        case.seq_slots = slots[index : index + 1].contiguous()
        case.keys = case.keys[:1]  # one sequence
        assert torch.equal(case.run(), together[rows])


@pytest.mark.parametrize("wgmma", PATHS)
def test_a_nan_row_stays_alone(wgmma: bool) -> None:
    case = make_case(wgmma, (16, 8, 128), [(200, 300), (200, 200)], seed=8)
    clean = case.run()
    case.q[150] = float("nan")
    out = case.run()
    others = torch.arange(400, device="cuda") != 150
    assert out[150].isnan().all()
    assert torch.equal(out[others], clean[others])


def test_shapes_that_the_kernels_do_not_have_are_refused() -> None:
    with pytest.raises(ValueError, match="groups"):
        PrefillAttention(34, 2, 128)
    with pytest.raises(ValueError, match="groups"):
        PrefillAttention(10, 4, 128)
    with pytest.raises(ValueError, match="head_dim"):
        PrefillAttention(16, 8, 96)
