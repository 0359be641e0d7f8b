"""The torch backend, one operation at a time, against the plainest form of each."""

from __future__ import annotations

import random

import pytest
import torch
import torch.nn.functional as F
from step_driver import make_step

from minisgl_fast.backend import make_backend, pick_device
from minisgl_fast.backend.reference import (
    ReferenceBackend,
    pick_cpu_dtype,
    pick_num_threads,
)
from minisgl_fast.backend.step import DeviceState, StepTensors
from minisgl_fast.errors import ConfigError
from minisgl_fast.model.config import RopeConfig
from minisgl_fast.model.rope import rope_table

torch.set_num_threads(1)

HEADS, KV_HEADS, DIM, PAGE_SIZE, NUM_PAGES = 4, 2, 16, 4, 24
EPS = 1e-6
DTYPES = [torch.float32, torch.bfloat16]
TABLE = rope_table(RopeConfig(), DIM, 64, torch.device("cpu"))


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def make_state(max_seqs: int = 6) -> DeviceState:
    state = DeviceState(max_seqs, 8, 50, torch.device("cpu"))
    pages = random.Random(0).sample(range(NUM_PAGES), NUM_PAGES)
    state.page_table[:3] = torch.tensor(pages).view(3, 8)
    return state


def token_step(positions: list[int], kv_slots: list[int]) -> StepTensors:
    return make_step(input_ids=[0] * len(positions), positions=positions, kv_slots=kv_slots)


def prepare(
    qkv: torch.Tensor,
    step: StepTensors,
    layer: torch.Tensor,
    norms: tuple[torch.Tensor, torch.Tensor] | tuple[None, None] = (None, None),
) -> torch.Tensor:
    q: torch.Tensor = ReferenceBackend().prepare_qkv(
        qkv.clone(), *norms, EPS, TABLE, step, layer, HEADS, KV_HEADS, DIM
    )
    return q


def naive_norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)
    return weight * wide.to(x.dtype)


def naive_rotate(x: torch.Tensor, position: int) -> torch.Tensor:
    cos, sin = TABLE[position].to(x.dtype).chunk(2)
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


@pytest.mark.parametrize("dtype", DTYPES)
def test_norms_round_as_transformers_does(dtype):
    backend = ReferenceBackend()
    x, weight = randn(5, 32).to(dtype), randn(32, seed=2).to(dtype)
    tolerance = 1e-6 if dtype == torch.float32 else 0.0
    actual = backend.rms_norm(x, weight, EPS)
    torch.testing.assert_close(actual, naive_norm(x, weight), atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("with_norm", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_prepare_qkv_rotates_and_stores(dtype, with_norm):
    positions, kv_slots = [0, 63, 7, 8, 9], [5, 90, -1, 0, 33]
    qkv = randn(5, (HEADS + 2 * KV_HEADS) * DIM).to(dtype)
    layer = torch.full((NUM_PAGES, PAGE_SIZE, 2, KV_HEADS, DIM), 7.0, dtype=dtype)
    weights = randn(DIM, seed=1).to(dtype), randn(DIM, seed=2).to(dtype)
    step = token_step(positions, kv_slots)
    q = prepare(qkv, step, layer, weights if with_norm else (None, None))
    heads = qkv.view(5, -1, DIM)
    tolerance = 1e-5 if dtype == torch.float32 else 0.03
    slots = layer.view(-1, 2, KV_HEADS, DIM)
    for row, (position, slot) in enumerate(zip(positions, kv_slots, strict=True)):
        expected_q, expected_k = heads[row, :HEADS], heads[row, HEADS:-KV_HEADS]
        if with_norm:
            expected_q = naive_norm(expected_q, weights[0])
            expected_k = naive_norm(expected_k, weights[1])
        expected_q = naive_rotate(expected_q, position)
        expected_k = naive_rotate(expected_k, position)
        torch.testing.assert_close(q[row], expected_q, atol=tolerance, rtol=tolerance)
        if slot >= 0:
            torch.testing.assert_close(slots[slot, 0], expected_k, atol=tolerance, rtol=tolerance)
            assert torch.equal(slots[slot, 1], heads[row, -KV_HEADS:])
    untouched = [slot for slot in range(len(slots)) if slot not in kv_slots]
    assert (slots[untouched] == 7.0).all()


def test_a_step_that_stores_nothing_changes_nothing():
    layer = torch.zeros(NUM_PAGES, PAGE_SIZE, 2, KV_HEADS, DIM)
    prepare(randn(2, (HEADS + 2 * KV_HEADS) * DIM), token_step([0, 1], [-1, -1]), layer)
    assert (layer == 0).all()


def test_a_broken_row_leaves_the_cache_finite_and_stays_broken_itself():
    """Masked keys count 0 * value, so a NaN left in a page would reach its next owner."""
    qkv = randn(2, (HEADS + 2 * KV_HEADS) * DIM)
    qkv[0] = float("nan")
    qkv[1, -1] = float("inf")
    layer = torch.zeros(NUM_PAGES, PAGE_SIZE, 2, KV_HEADS, DIM)
    q = prepare(qkv, token_step([0, 1], [0, 1]), layer)
    assert layer.isfinite().all()
    assert q[0].isnan().all()
    assert q[1].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("q_lens", "contexts"),
    [
        ([1, 1, 1], [9, 30, 1]),
        ([5, 5, 5], [5, 5, 5]),
        ([1, 12, 3], [17, 12, 32]),
        ([1, 1, 9], [1, 32, 30]),
        ([20], [31]),
    ],
)
def test_attention_equals_one_token_at_a_time(dtype, q_lens, contexts):
    state = make_state()
    layer = randn(NUM_PAGES, PAGE_SIZE, 2, KV_HEADS, DIM).to(dtype)
    positions = [
        position
        for n, end in zip(q_lens, contexts, strict=True)
        for position in range(end - n, end)
    ]
    step = make_step(
        input_ids=[0] * len(positions),
        positions=positions,
        seq_slots=list(range(len(q_lens))),
        q_lens=q_lens,
        context_lens=contexts,
        num_decode=sum(n == 1 for n in q_lens),
    )
    q = randn(len(positions), HEADS, DIM, seed=1).to(dtype)
    out = ReferenceBackend().attention(q, layer, step, state, 0.3)
    assert out.shape == (len(positions), HEADS * DIM)
    row = 0
    for slot, n in enumerate(q_lens):
        pages = layer[state.page_table[slot].long()].flatten(0, 1).float()
        for _ in range(n):
            seen = pages[: positions[row] + 1]
            for head in range(HEADS):
                keys, values = seen[:, :, head // (HEADS // KV_HEADS)].unbind(1)
                odds = (keys @ q[row, head].float() * 0.3).softmax(0)
                actual = out[row, head * DIM : (head + 1) * DIM].float()
                tolerance = 1e-5 if dtype == torch.float32 else 0.02
                torch.testing.assert_close(actual, odds @ values, atol=tolerance, rtol=tolerance)
            row += 1


def test_padding_rows_are_finite_and_change_no_other_row():
    state, layer = make_state(), randn(NUM_PAGES, PAGE_SIZE, 2, KV_HEADS, DIM)
    q = randn(4, HEADS, DIM, seed=1)
    real = {"positions": [10, 3], "seq_slots": [0, 1], "context_lens": [11, 4], "q_lens": [1, 1]}
    padding = {"positions": [0, 0], "seq_slots": [6, 6], "context_lens": [0, 0], "q_lens": [1, 1]}
    plain = make_step(input_ids=[1, 1], num_decode=2, **real)
    padded = make_step(
        input_ids=[-1] * 4, num_decode=4, **{name: real[name] + padding[name] for name in real}
    )
    backend = ReferenceBackend()
    expected = backend.attention(q[:2], layer, plain, state, 0.25)
    actual = backend.attention(q, layer, padded, state, 0.25)
    torch.testing.assert_close(actual[:2], expected)
    assert actual.isfinite().all()


def test_embed_takes_the_last_token_of_the_slot_where_the_id_is_minus_one():
    state, weight = make_state(), randn(50, 8)
    state.last_token[2], state.last_token[0] = 41, 17
    step = make_step(
        input_ids=[-1, 5, -1, 3, 4],
        positions=[0] * 5,
        seq_slots=[2, 1, 0, 3],
        q_lens=[1, 1, 1, 2],
        context_lens=[1, 1, 1, 2],
        num_decode=3,
    )
    actual = ReferenceBackend().embed(step, state, weight)
    assert torch.equal(actual, weight[[41, 5, 17, 3, 4]])
    assert step.input_ids.tolist() == [-1, 5, -1, 3, 4]


def test_updates_land_in_the_page_table():
    state = make_state()
    before = state.page_table.clone()
    updates = [(0, 0, 23), (5, 7, 1), (2, 3, 9)]
    ReferenceBackend().apply_updates(make_step(updates=updates), state)
    for slot, column, page in updates:
        assert state.page_table[slot, column] == page
        before[slot, column] = page
    assert torch.equal(state.page_table, before)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16])
@pytest.mark.parametrize("num_rows", [0, 1, 3, 40])
@pytest.mark.parametrize("with_bias", [False, True])
def test_linear_equals_the_plain_product(dtype, num_rows, with_bias):
    weight, x = randn(24, 40).to(dtype), randn(num_rows, 40, seed=1).to(dtype)
    bias = randn(24, seed=2).to(dtype) if with_bias else None
    expected = F.linear(x, weight, bias)
    tolerance = 1e-5 if dtype == torch.float32 else 0.1
    backend = ReferenceBackend()
    with torch.inference_mode():
        actual = backend.linear(x, backend.make_matrix(weight, bias))
    torch.testing.assert_close(actual, expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_surrounds_a_product_is_rounded_step_by_step(dtype):
    x, residual = randn(3, 32).to(dtype), randn(3, 24, seed=1).to(dtype)
    norm = randn(32, seed=2).to(dtype), EPS
    backend = ReferenceBackend()
    with torch.inference_mode():
        weights = randn(24, 32, seed=3).to(dtype), randn(24, seed=4).to(dtype)
        plain, with_norm = backend.make_matrix(*weights), backend.make_matrix(*weights, norm)
        normed = backend.linear(backend.rms_norm(x, *norm), plain)
        assert torch.equal(backend.logits(x, with_norm), normed)
        total = backend.linear(x, plain) + residual
        assert torch.equal(backend.linear_add(x, plain, residual.clone()), total)
        expected = F.silu(normed[:, :12]) * normed[:, 12:]  # the gate first
        assert torch.equal(backend.linear_silu_mul(x, with_norm), expected)


def test_a_new_cache_is_zero_and_page_by_page():
    kv = ReferenceBackend().allocate_kv(2, 5, 3, 16, 8, torch.bfloat16)
    assert kv.layer(1).shape == (5, 16, 2, 3, 8)
    assert kv.layer(1).dtype == torch.bfloat16
    assert not kv.layer(0).any()


def test_dtypes_and_devices_by_name(monkeypatch):
    backend = make_backend(pick_device("cpu"))
    assert isinstance(backend, ReferenceBackend)
    assert backend.pick_dtype("float16", "bfloat16") == torch.float16
    assert backend.pick_dtype("auto", "float16") == pick_cpu_dtype()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert pick_device("auto") == torch.device("cpu")
    with pytest.raises(ConfigError, match="no CUDA device"):
        pick_device("cuda")


@pytest.mark.parametrize(("amx", "avx512_bf16"), [(True, True), (False, True), (False, False)])
def test_the_automatic_dtype_is_bfloat16_only_where_it_is_native(monkeypatch, amx, avx512_bf16):
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512_bf16)
    expected = torch.bfloat16 if amx or avx512_bf16 else torch.float32
    assert pick_cpu_dtype() == expected


@pytest.mark.parametrize(
    ("cpu_max", "expected"),
    [("max 100000", 6), ("250000 100000", 2), ("50000 100000", 1), ("900000 100000", 6), ("", 6)],
)
def test_threads_follow_the_cores_and_the_quota(monkeypatch, tmp_path, cpu_max, expected):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(6)))
    (tmp_path / "cpu.max").write_text(cpu_max)
    assert pick_num_threads(tmp_path / "cpu.max") == expected
    assert pick_num_threads(tmp_path / "missing") == 6
