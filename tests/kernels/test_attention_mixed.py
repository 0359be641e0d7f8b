"""Decode attention beside prefill attention: the same bits as one after the other.

The two overlap: decode is let start when the blocks of prefill attention have seen that what both
take is written. So that is written anew right before them, over NaN, and what both leave is read
right after them, once by a kernel that is not launched early and once by one that is.
"""

import dataclasses
import math
from collections.abc import Sequence

import pytest
import torch
from test_attention_prefill import PATHS, Case, make_case
from torch import Tensor

from minisgl_fast.backend.cuda_attention import DecodeAttention, NewTokens
from minisgl_fast.backend.cuda_linear import Linears
from minisgl_fast.backend.cuda_prefill import PrefillLoad

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

ROUNDS = 40
EPS = 1e-6
Shape = tuple[int, int, int]


def raw_rows(case: Case, q: Tensor) -> Tensor:
    """The decodes' queries, and their last keys and values, which the pages have already."""
    last = [[kept[i][-1] for i in range(case.num_decode)] for kept in (case.keys, case.values)]
    keys, values = (torch.stack(rows).bfloat16() for rows in last)
    return torch.cat((q[: case.num_decode], keys, values), dim=1).flatten(1)


def decode(
    case: Case,
    new: NewTokens,
    attention: DecodeAttention,
    out: Tensor,
    prefill: PrefillLoad | None,
) -> None:
    attention(
        new,
        case.kv,
        out,
        case.context_lens,
        case.seq_slots,
        case.page_table,
        case.num_decode,
        case.scale,
        pdl=True,
        prefill=prefill,
    )


@pytest.mark.parametrize("wgmma", PATHS)
@pytest.mark.parametrize("shape", [(40, 8, 128), (16, 8, 128), (14, 2, 64)])
@pytest.mark.parametrize(
    ("decodes", "chunks"),
    [
        pytest.param(range(700, 850), [(60, 300), (46, 46)], id="as in a load"),
        pytest.param([1, 64, 130], [(2000, 2000)], id="prefill is longer"),
        pytest.param([300] * 8, [(40, 9000)], id="joined from splits"),
        pytest.param([4000] * 40, [(1, 1)], id="decode is longer"),
    ],
)
def test_both_at_once_leave_the_bits_of_each_alone(
    wgmma: bool, shape: Shape, decodes: Sequence[int], chunks: list[tuple[int, int]]
) -> None:
    lengths = [(1, context) for context in decodes] + chunks
    case = make_case(wgmma, shape, lengths, num_decode=len(decodes), seed=11)
    num_heads, num_kv_heads, head_dim = shape
    attention = DecodeAttention(num_heads, num_kv_heads, head_dim, 64)
    half = head_dim // 2
    no_turn = torch.cat((torch.ones(half), torch.zeros(half))).expand(max(decodes), -1)
    rows = raw_rows(case, case.q)
    new = NewTokens(rows, None, None, 0.0, no_turn.contiguous().cuda())
    queries = [case.q.roll(turn, 1).mul(1 + turn / 64) for turn in range(3)]
    expected = []
    for query in queries:
        out = torch.full_like(query.flatten(1), math.nan)
        alone = new._replace(qkv=raw_rows(case, query))
        prefill = dataclasses.replace(case, q=query).launch(out)
        torch.cuda.synchronize()
        decode(case, alone, attention, out, prefill)  # beside what has ended
        torch.cuda.synchronize()
        assert not out.isnan().any()
        expected.append(out)

    raw = [raw_rows(case, query) for query in queries]
    linears = Linears(case.q.device, 8, 1024)
    ones = torch.ones(num_heads * head_dim, dtype=torch.bfloat16, device="cuda")
    seen = []
    for turn in range(ROUNDS):
        case.q.fill_(math.nan)
        rows.fill_(math.nan)
        out = torch.full_like(expected[0], math.nan)
        rows.copy_(raw[turn % 3])
        case.q.copy_(queries[turn % 3])
        decode(case, new, attention, out, case.launch(out))
        normed = linears.rms_norm(out, ones, EPS) if turn % 2 else None
        seen.append((out.clone(), normed))
    torch.cuda.synchronize()
    for turn, (out, normed) in enumerate(seen):
        assert torch.equal(out, expected[turn % 3]), turn
        if normed is not None:
            assert torch.equal(normed, linears.rms_norm(expected[turn % 3], ones, EPS)), turn
    assert attention._partials.eq(-1).all()
