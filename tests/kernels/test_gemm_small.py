"""Products of a few rows on the GPU against float64, their fused forms against separate steps."""

import pytest
import torch
import torch.nn.functional as F
from gpu_products import draw, product, relative_error

# (N, K) of qkv, o, gate_up, down.
SHAPES = {
    "qwen3-0.6b": [(4096, 1024), (1024, 2048), (6144, 1024), (1024, 3072)],
    "qwen3-1.7b": [(4096, 2048), (2048, 2048), (12288, 2048), (2048, 6144)],
    "qwen3-4b": [(6144, 2560), (2560, 4096), (19456, 2560), (2560, 9728)],
    "qwen3-8b": [(6144, 4096), (4096, 4096), (24576, 4096), (4096, 12288)],
    "qwen3-14b": [(7168, 5120), (5120, 5120), (34816, 5120), (5120, 17408)],
    "qwen3-32b": [(10240, 5120), (5120, 8192), (51200, 5120), (5120, 25600)],
    "llama-3.1-8b": [(6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336)],
    "qwen2.5-0.5b": [(1152, 896), (896, 896), (9728, 896), (896, 4864)],
    "smollm2-135m": [(960, 576), (576, 576), (3072, 576), (576, 1536)],
    "lm-head-0.6b": [(151936, 1024)],
    "lm-head-14b": [(151936, 5120)],
    "ragged": [(48, 512), (8208, 832)],
}
ROWS = (1, 2, 3, 5, 8, 9, 13, 16, 17, 32)
CASES = [(n, k) for shapes in SHAPES.values() for n, k in shapes]

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
pytestmark = [pytest.mark.gpu, needs_gpu]


@pytest.fixture(scope="module")
def gemm():
    from minisgl_fast.backend.cuda_gemm import SmallGemm

    return SmallGemm(torch.device("cuda"))


def rows_of(gemm, n: int, k: int) -> list[int]:
    """The row counts that this product has: all up to 8; up to 16 where x is small."""
    rows = [count for count in ROWS if gemm.fits(count, n, k)]
    most = 16 if k <= 3072 else 8
    assert set(rows) >= {count for count in ROWS if count <= most}
    return rows


def normed(x: torch.Tensor, eps: float) -> torch.Tensor:
    return x.double() * torch.rsqrt(x.double().pow(2).mean(-1, keepdim=True) + eps)


def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Outputs start as NaN."""
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **kw: empty(*a, **kw).fill_(float("nan")))


@pytest.mark.parametrize(("n", "k"), CASES)
def test_product_of_every_shape_and_row_count(gemm, monkeypatch, n, k):
    poisoned(monkeypatch)
    weight, bias = draw(n + k, n, k), draw(1, n)
    xs = draw(2, max(ROWS), k)
    expected = product(xs, weight)
    rows = rows_of(gemm, n, k)
    full = {most: gemm.linear(xs[:most], weight) for most in (8, max(rows))}
    for num_rows in rows:
        x = xs[:num_rows]
        y = gemm.linear(x, weight)
        assert relative_error(y, expected[:num_rows]) < 4e-3
        assert torch.equal(y, gemm.linear(x, weight))
        most = 8 if num_rows <= 8 else max(rows)
        assert torch.equal(y, full[most][:num_rows])  # whatever the other rows are
        biased = gemm.linear(x, weight, bias)
        assert relative_error(biased, expected[:num_rows] + bias.double()) < 4e-3


@pytest.mark.parametrize(("n", "k"), CASES)
def test_norm_before_the_product(gemm, monkeypatch, n, k):
    poisoned(monkeypatch)
    weight, bias = draw(n + k, n, k), draw(1, n)
    rows = rows_of(gemm, n, k)
    xs = draw(2, max(rows), k) * 30
    xs[0] *= 100
    full = {most: gemm.linear(xs[:most], weight, norm_eps=1e-6) for most in (8, max(rows))}
    expected = product(normed(xs, 1e-6), weight)
    assert relative_error(full[max(rows)], expected) < 4e-3
    for num_rows in rows:
        y = gemm.linear(xs[:num_rows], weight, norm_eps=1e-6)
        assert torch.equal(y, full[8 if num_rows <= 8 else max(rows)][:num_rows])
        biased = gemm.linear(xs[:num_rows], weight, bias, norm_eps=1e-6)
        assert relative_error(biased, expected[:num_rows] + bias.double()) < 4e-3
    tiny = gemm.linear(xs * 2**-14, weight, norm_eps=1.0)  # eps decides
    assert relative_error(tiny, product(normed(xs * 2**-14, 1.0), weight)) < 4e-3


@pytest.mark.parametrize(("n", "k"), CASES)
def test_residual_is_added_to_the_rounded_product(gemm, n, k):
    weight, xs = draw(n + k, n, k), draw(2, max(ROWS), k)
    for num_rows in rows_of(gemm, n, k):
        x, residual = xs[:num_rows], draw(3, num_rows, n) * 50
        expected = gemm.linear(x, weight) + residual
        assert gemm.linear_add(x, weight, residual) is residual
        assert torch.equal(residual, expected)


@pytest.mark.parametrize(("n", "k"), CASES)
def test_silu_mul_of_the_rounded_product(gemm, monkeypatch, n, k):
    poisoned(monkeypatch)
    weight, xs = draw(n + k, n, k), draw(2, max(ROWS), k, scale=k**-0.5)
    for num_rows in rows_of(gemm, n, k):
        x = xs[:num_rows]
        for eps in (None, 1e-6):
            gate, up = gemm.linear(x, weight, norm_eps=eps).chunk(2, dim=1)
            expected = F.silu(gate) * up
            y = gemm.linear_silu_mul(x, weight, eps)
            assert relative_error(y, expected.double()) < 1e-3
            assert (y == expected).float().mean() > 0.99


def test_chain_in_a_graph_equals_single_launches(gemm):
    """Launches that overlap (PDL), each on the result of the one before, replayed."""
    hidden, width = 1024, 3072
    layers = [
        (draw(i, 2 * width, hidden, scale=0.02), draw(i + 99, hidden, width, scale=0.02))
        for i in range(24)
    ]
    start = draw(7, 3, hidden)

    def chain(residual: torch.Tensor, *, wait: bool) -> torch.Tensor:
        for gate_up, down in layers:
            middle = gemm.linear_silu_mul(residual, gate_up, 1e-6)
            if wait:
                torch.cuda.synchronize()
            gemm.linear_add(middle, down, residual)
            if wait:
                torch.cuda.synchronize()
        return residual

    expected = chain(start.clone(), wait=True)
    assert torch.isfinite(expected).all()
    residual = start.clone()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        chain(residual, wait=False)
    for _ in range(5):
        residual.copy_(start)
        graph.replay()
        assert torch.equal(residual, expected)


def test_what_does_not_fit_is_said(gemm):
    assert not gemm.fits(0, 1024, 1024)
    assert not gemm.fits(33, 1024, 1024)
    assert not gemm.fits(1, 1000, 1024)
    assert not gemm.fits(1, 1024, 1000)
    assert not gemm.fits(17, 5120, 17408)
    assert not gemm.fits(16, 5120, 100000 * 64)
