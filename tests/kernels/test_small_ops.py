"""Norms, SiLU, embedding and page-table updates on the GPU against torch with the same rounding."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from step_driver import make_step, to_cuda

from minisgl_fast.backend.reference import ReferenceBackend
from minisgl_fast.backend.step import DeviceState

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

HIDDEN_SIZES = [8, 576, 896, 1024, 2048, 2560, 4096, 5120, 8192]
ROWS = [0, 1, 7, 256, 8192]
EPS = 1e-6


@pytest.fixture(scope="module")
def backend() -> Any:
    from minisgl_fast.backend.cuda import CudaBackend
    from minisgl_fast.backend.kernel import get_kernel

    backend = CudaBackend(torch.device("cuda", torch.cuda.current_device()))
    # What ``prepare`` would also load, without the attention of some model.
    for spec, entry in (
        ("step", "apply_updates"),
        ("step", "embed"),
    ):
        setattr(backend, f"_{entry}", get_kernel(spec, entry))
    return backend


@pytest.fixture(scope="module")
def linears() -> Any:
    from minisgl_fast.backend.cuda_linear import Linears

    return Linears(torch.device("cuda", torch.cuda.current_device()), 300, 1003)


def draw(*shape: int, seed: int = 0, scale: float = 1.0) -> torch.Tensor:
    generator = torch.Generator("cuda").manual_seed(seed)
    return (torch.randn(shape, generator=generator, device="cuda") * scale).bfloat16()


def norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    wide = x.float()
    scaled = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)
    return weight * scaled.bfloat16()


def assert_alike(got: torch.Tensor, expected: torch.Tensor) -> None:
    """The order of a sum, or an exponential, may turn a rounding to bf16: rarely, by one unit."""
    assert got.shape == expected.shape and got.dtype == expected.dtype
    if got.numel() == 0:
        return
    difference = (got.double() - expected.double()).norm() / expected.double().norm()
    assert difference < 1e-3
    assert (got == expected).float().mean() > 0.99
    assert torch.isfinite(got).all()


@pytest.mark.parametrize("hidden", HIDDEN_SIZES)
@pytest.mark.parametrize("rows", ROWS)
def test_rms_norm(linears, rows, hidden):
    x, weight = draw(rows, hidden, scale=3), draw(hidden, seed=1) + 1
    kept = x.clone()
    out = linears.rms_norm(x, weight, EPS)
    assert_alike(out, norm(x, weight))
    assert torch.equal(x, kept)
    assert torch.equal(linears.rms_norm(x, weight, EPS), out)


@pytest.mark.parametrize("rows", [0, 1, 7, 16, 17, 31, 32, 33, 300])
@pytest.mark.parametrize(("out", "width"), [(1024, 512), (96, 1024), (1003, 64), (48, 72)])
def test_products_are_those_of_the_reference(linears, rows, out, width):
    """Whoever computes them, with what surrounds them; 1003 is a vocabulary of odd size."""
    from minisgl_fast.backend.cuda_linear import make_matrix

    reference = ReferenceBackend()
    x, residual = draw(rows, width, scale=20), draw(rows, out, seed=2, scale=3)
    weight, bias = draw(out, width, seed=3, scale=width**-0.5), draw(out, seed=4)
    norm = (draw(width, seed=5) * 0.1 + 1, EPS)
    x64, residual64 = x.double().cpu(), residual.double().cpu()

    def check(got: torch.Tensor, expected: torch.Tensor) -> None:
        assert got.shape == expected.shape and got.dtype == torch.bfloat16
        if rows:
            assert (got.double().cpu() - expected).norm() / expected.norm() < 1e-2

    for the_bias in (None, bias):
        for the_norm, may_fold in ((None, False), (norm, False), (norm, True)):
            matrix = make_matrix(weight.clone(), the_bias, the_norm, may_fold=may_fold)
            wide = reference.make_matrix(
                weight.double().cpu(),
                None if the_bias is None else the_bias.double().cpu(),
                None if the_norm is None else (the_norm[0].double().cpu(), EPS),
            )
            expected = reference.linear(x64, wide)
            y, scaled_by, eps = linears.unscaled(x, matrix)
            if scaled_by is not None:
                scale = torch.rsqrt(scaled_by.float().pow(2).mean(-1, keepdim=True) + eps)
                y = (y * scale + (0.0 if the_bias is None else the_bias.float())).bfloat16()
            check(y, expected)
            if the_norm is None:
                total = reference.linear_add(x64, wide, residual64.clone())
                check(linears.linear_add(x, matrix, residual.clone()), total)
            if the_bias is None and out % 16 == 0:
                gated = reference.linear_silu_mul(x64, wide)
                check(linears.linear_silu_mul(x, matrix), gated)
            if the_bias is None and out <= 1003 and rows <= 300:
                check(linears.logits(x, matrix), expected)


@pytest.mark.parametrize("rows", [9, 33, 64, 65])
def test_rows_of_large_products_are_scaled_once(linears, rows):
    """By the product, or after it by who takes it; then comes the bias."""
    from minisgl_fast.backend.interface import Matrix

    n, k = 4112, 4096
    x, bias = draw(rows, k, scale=3), draw(n, seed=2)
    x *= torch.arange(1, rows + 1, device="cuda")[:, None]
    weight, ones = draw(n, k, seed=1, scale=k**-0.5), torch.ones_like(x[0])
    scale = torch.rsqrt(x.double().pow(2).mean(-1, keepdim=True) + EPS)
    for the_bias in (None, bias):
        matrix = Matrix(weight, the_bias, (ones, EPS), unit_norm=True)
        y, scaled_by, eps = linears.unscaled(x, matrix)
        if the_bias is None and linears._wide.fits(rows, n, k):
            assert scaled_by is None
        if scaled_by is not None:
            assert scaled_by is x and eps == EPS
            y = y * scale + (0.0 if the_bias is None else the_bias.double())
        expected = (x.double() * scale) @ weight.double().T
        if the_bias is not None:
            expected += the_bias.double()
        assert ((y.double() - expected).norm() / expected.norm()) < 1e-2


def test_norms_of_tiny_and_large_values_are_finite(linears):
    weight = torch.ones(1024, dtype=torch.bfloat16, device="cuda")
    x = torch.zeros(3, 1024, dtype=torch.bfloat16, device="cuda")
    x[1], x[2] = 1e-30, 1e15
    assert_alike(linears.rms_norm(x, weight, EPS)[1:], norm(x, weight)[1:])
    assert (linears.rms_norm(x, weight, EPS)[0] == 0).all()


@pytest.mark.parametrize("width", [8, 1536, 3072, 4864, 17408])
@pytest.mark.parametrize("rows", [0, 1, 7, 256, 2048])
def test_silu_mul(linears, rows, width):
    gate_up = draw(rows, 2 * width, scale=4)
    if rows:
        gate_up[0, : min(width, 8)] = torch.tensor(
            [0.0, -0.0, 100.0, -100.0, 3e38, -3e38, 1e-30, -1e-30], device="cuda"
        ).bfloat16()
        gate_up[0, width : width + 8] = 0.5
    gate, up = gate_up.chunk(2, dim=-1)
    out = linears.silu_mul(gate_up)
    assert_alike(out, F.silu(gate) * up)
    assert torch.equal(linears.silu_mul(gate_up), out)


@pytest.mark.parametrize("hidden", HIDDEN_SIZES)
@pytest.mark.parametrize("rows", [0, 1, 7, 256, 4096])
def test_embed(backend, rows, hidden):
    vocab = 1000
    weight = draw(vocab, hidden)
    state = DeviceState(rows + 1, 1, 8, torch.device("cuda"))
    generator = torch.Generator("cuda").manual_seed(rows)
    state.last_token.random_(0, vocab, generator=generator)
    ids = torch.randint(0, vocab, (rows,), generator=generator, device="cuda").int()
    ids[: rows // 2] = -1  # decode rows look their token up
    slots = torch.randperm(rows + 1, generator=generator, device="cuda")[:rows].int()
    step = SimpleNamespace(num_tokens=rows, input_ids=ids, seq_slots=slots)
    expected = torch.where(ids < 0, state.last_token[slots.long()], ids)
    assert torch.equal(backend.embed(step, state, weight), weight[expected.long()])


@pytest.mark.parametrize("num_updates", [0, 1, 255, 256, 700])
def test_apply_updates_reads_its_count_on_the_device(backend, num_updates):
    state = DeviceState(300, 40, 8, torch.device("cuda"))
    state.page_table.fill_(-7)
    expected = state.page_table.cpu()
    cells = torch.randperm(300 * 40, generator=torch.Generator().manual_seed(1))[:900].tolist()
    updates = [(cell // 40, cell % 40, index) for index, cell in enumerate(cells)]
    step = to_cuda(make_step(updates=updates))
    step.header[5] = num_updates  # fewer than the buffers hold
    for slot, column, page in updates[:num_updates]:
        expected[slot, column] = page
    backend.apply_updates(step, state)
    assert torch.equal(state.page_table.cpu(), expected)
