"""The fused QK-norm, RoPE and KV write on the GPU against torch with the same rounding."""

import pytest
import torch

from minisgl_fast.backend.kv_layout import deswizzle, layer_shape, swizzle

SHAPES = {
    "qwen3-0.6b": (16, 8, 128, True),
    "qwen3-14b": (40, 8, 128, True),
    "llama-3.1-8b": (32, 8, 128, False),
    "qwen2.5-0.5b": (14, 2, 64, False),
    "smollm2": (9, 3, 64, False),
    "odd-d64-norm": (3, 1, 64, True),
    "odd-d128-norm": (3, 1, 128, True),
}

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    scaled = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + eps)
    return weight * scaled.bfloat16()


def rotate(x: torch.Tensor, table: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    cos, sin = table[positions.long()].bfloat16()[:, None, :].chunk(2, dim=-1)
    cos, sin = torch.cat((cos, cos), -1), torch.cat((sin, sin), -1)
    low, high = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-high, low), -1) * sin


def test_swizzle_and_back():
    k = torch.arange(3 * 16 * 2 * 128).view(3, 16, 2, 128).to(torch.int16)
    kv = swizzle(k, -k)
    assert kv.shape == layer_shape(3, 2, 16, 128)
    back_k, back_v = deswizzle(kv)
    assert torch.equal(back_k, k) and torch.equal(back_v, -k)
    # Page 1, head 1, row 5: dims 64 .. 71 are chunk 0 of the second half, stored as chunk 5.
    assert torch.equal(kv[1, 1, 0, 1, 5, 40:48], k[1, 5, 1, 64:72])


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("page_size", [16, 64, 256])
@pytest.mark.parametrize("num_tokens", [1, 7, 300])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_matches_torch(shape, num_tokens, page_size):
    from minisgl_fast.backend.cuda_kv import KvStore

    num_heads, num_kv_heads, head_dim, qk_norm = shape
    generator = torch.Generator("cuda").manual_seed(num_tokens)
    draw = {"generator": generator, "device": "cuda"}
    total = num_heads + 2 * num_kv_heads
    qkv = torch.randn(num_tokens, total * head_dim, **draw).bfloat16() * 3
    q_norm = torch.rand(head_dim, **draw).bfloat16() + 0.5 if qk_norm else None
    k_norm = torch.rand(head_dim, **draw).bfloat16() + 0.5 if qk_norm else None
    angles = torch.rand(500, head_dim // 2, **draw) * 6.3
    table = torch.cat((angles.cos(), angles.sin()), -1)
    positions = torch.randint(0, 500, (num_tokens,), **draw).int()
    num_pages = -(-num_tokens // page_size) + 2
    slots = torch.randperm(num_pages * page_size, **draw)[:num_tokens].int()
    skipped = torch.rand(num_tokens, **draw) < 0.2
    slots[skipped] = -1
    poison = -77.0
    kv_shape = layer_shape(num_pages, num_kv_heads, page_size, head_dim)
    kv = torch.full(kv_shape, poison, dtype=torch.bfloat16, device="cuda")
    q_out = torch.full((num_tokens, num_heads * head_dim), float("nan"), device="cuda").bfloat16()

    store = KvStore(num_heads, num_kv_heads, head_dim, page_size, qk_norm=qk_norm)
    arguments = (qkv, q_norm, k_norm, 1e-6, table, positions, slots, q_out, kv, num_tokens)
    store(*arguments)
    torch.cuda.synchronize()

    heads = qkv.view(num_tokens, total, head_dim)
    q, k, v = heads.split((num_heads, num_kv_heads, num_kv_heads), dim=1)
    if q_norm is not None and k_norm is not None:
        q, k = rms_norm(q, q_norm, 1e-6), rms_norm(k, k_norm, 1e-6)
    q, k = rotate(q, table, positions), rotate(k, table, positions)

    k_pages, v_pages = (x.reshape(-1, num_kv_heads, head_dim) for x in deswizzle(kv))
    written = slots[~skipped].long()
    assert torch.equal(v_pages[written], v[~skipped])
    untouched = torch.ones(num_pages * page_size, dtype=torch.bool, device="cuda")
    untouched[written] = False
    assert (k_pages[untouched] == poison).all() and (v_pages[untouched] == poison).all()
    pairs = ((q_out.view_as(q), q), (k_pages[written], k[~skipped]))
    for got, expected in pairs:
        if expected.numel() == 0:
            continue
        if not qk_norm:  # nothing but exact products and one rounding each
            assert torch.equal(got, expected)
        else:  # the order of the sum of squares may turn a rounding
            error = (got.float() - expected.float()).norm() / expected.float().norm()
            assert error < 1e-3
            assert (got == expected).float().mean() > 0.99

    again = torch.empty_like(q_out)
    before = kv.clone()
    store(*arguments[:7], again, kv, num_tokens, pdl=True)
    torch.cuda.synchronize()
    assert torch.equal(again, q_out) and torch.equal(kv, before)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("hidden", [64, 1024, 5120])
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("num_tokens", [1, 1500])
def test_rows_of_the_product_are_scaled_by_the_norm_before_it(num_tokens, has_bias, hidden):
    from minisgl_fast.backend.cuda_kv import KvStore

    generator = torch.Generator("cuda").manual_seed(num_tokens)
    draw = {"generator": generator, "device": "cuda"}
    rows = torch.randn(num_tokens, hidden, **draw).bfloat16() * 20
    qkv = torch.randn(num_tokens, 8 * 128, **draw).bfloat16() * 300
    bias = torch.randn(8 * 128, **draw).bfloat16() * 9 if has_bias else None
    table = torch.rand(num_tokens, 128, **draw)
    positions = torch.arange(num_tokens, device="cuda").int()
    scale = torch.rsqrt(rows.float().pow(2).mean(-1, keepdim=True) + 1e-5)
    store = KvStore(4, 2, 128, 64, qk_norm=False)
    results = []
    for x, options in (
        (qkv, {"rows": rows, "rows_eps": 1e-5, "bias": bias}),
        ((qkv * scale + (0.0 if bias is None else bias.float())).bfloat16(), {}),
    ):
        kv = torch.zeros(layer_shape(24, 2, 64, 128), dtype=torch.bfloat16, device="cuda")
        q = torch.empty(num_tokens, 4 * 128, dtype=torch.bfloat16, device="cuda")
        store(x, None, None, 1e-6, table, positions, positions, q, kv, num_tokens, **options)
        results.append((q, kv))
    for got, expected in zip(*results, strict=True):  # the order of a sum may turn a rounding
        assert (got.float() - expected.float()).norm() / expected.float().norm() < 1e-3
        assert (got == expected).float().mean() > 0.99
