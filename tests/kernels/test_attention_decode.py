"""Decode attention on the GPU against float32 in torch, on random pages poisoned with NaN.

The new tokens' keys and values are not in the pages before: the kernel has to put them there. Most
tests take them as they are (no norm, an angle of 0); what is made of them must be what kv_store
makes.
"""

import dataclasses
import math

import pytest
import torch

from minisgl_fast.backend.kv_layout import deswizzle, layer_shape, swizzle

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

# query heads, kv heads, head_dim
SHAPES = {
    "qwen3-0.6b": (16, 8, 128),
    "qwen3-8b": (32, 8, 128),
    "qwen3-14b": (40, 8, 128),
    "qwen3-32b": (64, 8, 128),
    "qwen2.5-0.5b": (14, 2, 64),
    "smollm2": (9, 3, 64),
    "group-1": (2, 2, 128),
    "group-1-d64": (5, 5, 64),
    "group-16": (16, 1, 128),
    "group-11-d64": (11, 1, 64),
}


class Case:
    """A batch with its pages; every byte of the cache that no sequence has written is NaN."""

    def __init__(self, shape: tuple[int, int, int], page_size: int, lengths: list[int], seed=0):
        from minisgl_fast.backend.cuda_attention import DecodeAttention, NewTokens

        self.num_heads, self.num_kv_heads, self.head_dim = shape
        self.lengths = lengths
        generator = torch.Generator("cuda").manual_seed(seed)
        num_seqs = len(lengths)
        counts = [-(-length // page_size) for length in lengths]
        num_pages = sum(counts) + 3
        order = torch.randperm(num_pages, generator=generator, device="cuda").int()
        num_slots = num_seqs + 2
        slots = torch.randperm(num_slots, generator=generator, device="cuda").int()[:num_seqs]
        # A page that no sequence owns is out of bounds by far: reading it would fault.
        table = torch.full((num_slots, max([*counts, 1]) + 1), 1 << 28, dtype=torch.int32)
        rows = torch.full((num_pages, page_size), False)
        starts, start = [], 0
        for i, count in enumerate(counts):
            pages = order[start : start + count].cpu()
            table[slots[i], :count] = pages
            valid = torch.arange(count * page_size) < lengths[i]
            rows[pages.long()] = valid.view(count, page_size)
            starts.append(start)
            start += count
        draw = {"generator": generator, "device": "cuda", "dtype": torch.bfloat16}
        kv_shape = (num_pages, page_size, self.num_kv_heads, self.head_dim)
        self.k, self.v = torch.randn(kv_shape, **draw), torch.randn(kv_shape, **draw)
        self.k[~rows.cuda()] = math.nan
        self.v[~rows.cuda()] = math.nan
        self.qkv = torch.randn(
            num_seqs, (self.num_heads + 2 * self.num_kv_heads) * self.head_dim, **draw
        )
        rows = (self.num_heads, self.num_kv_heads, self.num_kv_heads)
        heads = self.qkv.view(num_seqs, -1, self.head_dim)
        self.q, self.new_k, self.new_v = heads.split(rows, dim=1)
        before_k, before_v = self.k.clone(), self.v.clone()
        for i, length in enumerate(lengths):
            if length:
                page = order[starts[i] + (length - 1) // page_size].long()
                row = (length - 1) % page_size
                self.k[page, row], self.v[page, row] = self.new_k[i], self.new_v[i]
                before_k[page, row] = before_v[page, row] = math.nan
        self.kv = swizzle(before_k, before_v)
        self.kv_after = swizzle(self.k, self.v)
        expected = layer_shape(num_pages, self.num_kv_heads, page_size, self.head_dim)
        assert self.kv.shape == expected
        half = self.head_dim // 2
        no_turn = torch.cat((torch.ones(half), torch.zeros(half))).expand(max([*lengths, 1]), -1)
        self.new = NewTokens(self.qkv, None, None, 0.0, no_turn.contiguous().cuda())
        self.order, self.starts, self.counts = order.long(), starts, counts
        self.table, self.slots = table.cuda(), slots
        self.context_lens = torch.tensor(lengths, dtype=torch.int32, device="cuda")
        self.scale = self.head_dim**-0.5
        self.attention = DecodeAttention(*shape, page_size)

    def run(self, pdl: bool = False, prefill=None) -> torch.Tensor:
        out = torch.full_like(self.q, math.nan).view(len(self.lengths), -1)
        self.run_into(out, pdl, prefill)
        torch.cuda.synchronize()
        assert self.attention._partials.eq(-1).all()
        return out

    def run_into(self, out: torch.Tensor, pdl: bool = False, prefill=None) -> None:
        self.attention(
            self.new,
            self.kv,
            out,
            self.context_lens,
            self.slots,
            self.table,
            len(self.lengths),
            self.scale,
            pdl,
            prefill,
        )

    def reference(self) -> torch.Tensor:
        out = torch.zeros_like(self.q, dtype=torch.float32)
        group = self.num_heads // self.num_kv_heads
        for i, length in enumerate(self.lengths):
            if length == 0:
                continue
            pages = self.order[self.starts[i] : self.starts[i] + self.counts[i]]
            k = self.k[pages].flatten(0, 1)[:length].float().transpose(0, 1)
            v = self.v[pages].flatten(0, 1)[:length].float().transpose(0, 1)
            k[:, -1], v[:, -1] = self.new_k[i].float(), self.new_v[i].float()
            q = self.q[i].view(self.num_kv_heads, group, self.head_dim).float() * self.scale
            out[i] = ((q @ k.transpose(1, 2)).softmax(-1) @ v).view(self.num_heads, -1)
        return out.flatten(1)

    def check(self, pdl: bool = False, prefill=None) -> None:
        out, expected = self.run(pdl, prefill), self.reference()
        assert not out.isnan().any()
        assert torch.equal(self.kv.view(torch.int16), self.kv_after.view(torch.int16))
        assert (out.float() - expected).norm() < 1e-2 * expected.norm()
        for i, length in enumerate(self.lengths):
            error = (out[i].float() - expected[i]).norm() / max(expected[i].norm().item(), 1e-9)
            assert error < 2e-2 if length else not out[i].any(), (i, length)


def boundaries(page_size: int) -> list[int]:
    around = [1, page_size - 1, page_size, page_size + 1, 63, 64, 65, 127, 128, 129, 1000]
    return [0, *around, 0, 15, 16, 17, 3 * page_size + 7, 2049, 0]


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_every_head_shape_at_every_boundary(shape):
    Case(shape, 64, boundaries(64)).check()


@pytest.mark.parametrize("shape", ["qwen3-0.6b", "smollm2"])
@pytest.mark.parametrize("page_size", [16, 32, 64, 128, 256])
def test_every_page_size(shape, page_size):
    Case(SHAPES[shape], page_size, boundaries(page_size), seed=1).check()


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_one_long_sequence_is_split_over_all_blocks(shape):
    Case(shape, 64, [32768], seed=2).check()


@pytest.mark.parametrize("length", [1, 64, 1024, 8192])
def test_one_sequence_alone(length):
    Case(SHAPES["qwen3-0.6b"], 64, [length], seed=3).check()


@pytest.mark.parametrize("num_seqs", [1, 2, 4, 7, 13, 32, 33])
@pytest.mark.parametrize("shape", ["qwen3-0.6b", "qwen3-14b", "smollm2"])
@pytest.mark.parametrize("length", [1, 64, 65, 300, 500, 1000])
def test_sequences_of_like_lengths(num_seqs, shape, length):
    lengths = [max(length - 100 * (i % 3), i % 2) for i in range(num_seqs)]
    Case(SHAPES[shape], 64, lengths, seed=num_seqs).check(pdl=True)


def test_batches_larger_than_a_block():
    generator = torch.Generator().manual_seed(4)
    lengths = torch.randint(0, 300, (1100,), generator=generator).tolist()
    Case(SHAPES["qwen3-0.6b"], 64, lengths, seed=4).check()


@pytest.mark.parametrize("long_at", [0, 100, 255])
def test_skewed_batch(long_at):
    lengths = [1 + i % 90 for i in range(256)]
    lengths[long_at] = 32768
    Case(SHAPES["qwen3-0.6b"], 64, lengths, seed=5).check()


@pytest.mark.parametrize(
    ("num_seqs", "shortest", "longest"),
    [(90, 1, 300), (90, 1, 3000), (30, 60, 70), (90, 2000, 2000)],
)
@pytest.mark.parametrize("num_sms", [1, 24, 100, 131, 132])
@pytest.mark.parametrize("num_keys", [0, 1000, 30000])
def test_blocks_that_begin_late_have_less_or_nothing(
    num_seqs, shortest, longest, num_sms, num_keys
):
    from minisgl_fast.backend.cuda_prefill import PrefillLoad

    generator = torch.Generator().manual_seed(num_sms)
    drawn = torch.randint(shortest, longest + 1, (num_seqs,), generator=generator).tolist()
    case = Case(SHAPES["qwen3-0.6b"], 64, [0, *drawn[:20], 0, 0, *drawn[20:]], seed=num_sms)
    case.check(prefill=PrefillLoad(num_sms, num_keys))


@pytest.mark.parametrize("short", [1, 64, 200])
@pytest.mark.parametrize("shape", ["qwen3-14b", "qwen2.5-0.5b", "group-16"])
def test_many_short_sequences_beside_long_ones(shape, short):
    lengths = [2500, 1900, *[short] * 333, 700, *[0] * 40, *[short + 1] * 50, 1300]
    Case(SHAPES[shape], 64, lengths, seed=short).check()


def test_all_rows_are_padding():
    case = Case(SHAPES["qwen3-0.6b"], 64, [0] * 9)
    assert not case.run().any()


@pytest.mark.parametrize("seed", range(8))
def test_random_batches(seed):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda low, high: int(torch.randint(low, high, (), generator=generator))  # noqa: E731
    shape = list(SHAPES.values())[draw(0, len(SHAPES))]
    page_size = 16 << draw(0, 5)
    num_seqs = draw(1, 70)
    Case(shape, page_size, [draw(0, 2500) for _ in range(num_seqs)], seed).check(pdl=True)


def test_repeated_runs_give_equal_bits():
    lengths = [1 + 137 * i % 3000 for i in range(77)]
    case = Case(SHAPES["qwen3-14b"], 64, lengths, seed=6)
    first = case.run()
    for _ in range(20):
        assert torch.equal(case.run(), first)


def test_large_scores_do_not_overflow():
    case = Case(SHAPES["qwen3-0.6b"], 64, [500, 70])
    case.q *= 60
    case.check()


@pytest.mark.parametrize("bits", [0x7FC0, -1])  # the last: of parts that nobody has written
@pytest.mark.parametrize("where", ["q", "new_k", "new_v"])
def test_nan_of_one_sequence_stays_there(where, bits):
    case = Case(SHAPES["qwen3-0.6b"], 64, [300, 2000, 100])
    clean = case.run()
    getattr(case, where)[1].view(torch.int16).fill_(bits)
    out = case.run()
    assert out[1].isnan().all()
    assert torch.equal(out[0], clean[0]) and torch.equal(out[2], clean[2])


def test_graph_replays_with_other_lengths():
    lengths = [700, 64, 0, 1500]
    case = Case(SHAPES["qwen3-0.6b"], 64, lengths, seed=7)
    out = torch.full_like(case.q, math.nan).view(4, -1)
    case.run_into(out)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        case.run_into(out, pdl=True)
    for shrink in (0, 1, 63, 64):
        case.lengths = [max(length - shrink, 0) for length in lengths]
        case.context_lens.copy_(torch.tensor(case.lengths))
        out.fill_(math.nan)
        graph.replay()
        expected = case.reference()
        assert (out.float() - expected).norm() < 1e-2 * expected.norm()


@pytest.mark.parametrize("shape", ["qwen3-0.6b", "qwen3-14b", "smollm2", "group-16"])
@pytest.mark.parametrize("page_size", [16, 64, 256])
def test_path_of_older_chips(shape, page_size, monkeypatch: pytest.MonkeyPatch):
    from minisgl_fast.backend import cuda_attention
    from minisgl_fast.backend.kernel import get_kernel
    from minisgl_fast.backend.kernels_table import find_spec

    def without_bulk_copies(name: str, entry: str, shared_bytes: int):
        spec = find_spec(name)
        return get_kernel(
            dataclasses.replace(
                spec, name=f"{name}_cp_async", defines=(*spec.defines, ("HAS_BULK_COPY", 0))
            ),
            entry,
            shared_bytes,
        )

    monkeypatch.setattr(cuda_attention, "get_kernel", without_bulk_copies)
    monkeypatch.setattr(cuda_attention, "_configuration", lambda major, minor: (128, 3, 2, False))
    Case(SHAPES[shape], page_size, [*boundaries(page_size), 20000], seed=8).check()


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize("has_norm", [False, True])
@pytest.mark.parametrize("hidden", [None, 576, 5120])
def test_new_tokens_are_made_as_kv_store_makes_them(shape, has_norm, hidden):
    from minisgl_fast.backend.cuda_kv import KvStore

    num_heads, num_kv_heads, head_dim = shape
    lengths = [1, 16, 17, 64, 65, 128, 700, 1500, 2049]
    case = Case(shape, 64, lengths, seed=9)
    draw = {"generator": torch.Generator("cuda").manual_seed(9), "device": "cuda"}
    norms = [(torch.rand(head_dim, **draw) + 0.5).bfloat16() if has_norm else None] * 2
    angles = torch.rand(max(lengths), head_dim // 2, **draw) * 6.3
    table = torch.cat((angles.cos(), angles.sin()), -1)
    rows = bias = None
    if hidden:
        rows = torch.randn(len(lengths), hidden, **draw).bfloat16() * 20
        bias = torch.randn(case.qkv.shape[1], **draw).bfloat16() if hidden == 576 else None
        case.qkv *= 20
    options = {"rows": rows, "rows_eps": 1e-5, "bias": bias}
    store = KvStore(*shape, 64, qk_norm=has_norm)
    positions = case.context_lens - 1
    pages = case.table[case.slots.long(), (positions // 64).long()]
    kv = case.kv.clone()
    q = torch.empty_like(case.q.contiguous())
    place = (table, positions, pages * 64 + positions % 64, q, kv, len(lengths))
    store(case.qkv, *norms, 1e-6, *place, **options)
    made = case.kv.clone()
    case.kv = made
    case.new = case.new._replace(
        q_norm=norms[0], k_norm=norms[1], eps=1e-6, rope_table=table, **options
    )
    got = case.run()
    written = ~kv.isnan()
    assert torch.equal(written, ~made.isnan())
    assert (made[written] == kv[written]).float().mean() > 0.995  # the order of a sum of squares
    assert (made[written].float() - kv[written].float()).norm() < 1e-3 * kv[written].float().norm()

    # The same from what kv_store made, taken as it is.
    plain = Case(shape, 64, lengths, seed=9)
    plain.kv = kv
    plain.q.copy_(q)
    for i, page in enumerate(pages.tolist()):
        k_pages, v_pages = (x[page, int(positions[i]) % 64] for x in deswizzle(kv))
        plain.new_k[i], plain.new_v[i] = k_pages, v_pages
    expected = plain.run()
    assert (got.float() - expected.float()).norm() < 5e-3 * expected.float().norm()


def test_shapes_without_a_kernel_are_refused():
    from minisgl_fast.backend.cuda_attention import DecodeAttention
    from minisgl_fast.errors import ConfigError

    for shape, page_size in (
        ((16, 8, 96), 64),
        ((34, 2, 64), 64),
        ((9, 2, 64), 64),
        ((16, 8, 128), 48),
    ):
        with pytest.raises(ConfigError):
            DecodeAttention(*shape, page_size)
