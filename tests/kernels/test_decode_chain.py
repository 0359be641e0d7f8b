"""Decode steps of whole layers in a CUDA graph: launches that begin before the ones before have
ended leave the bits of launches that wait for each other.

Between replays the page table, the lengths, the hidden states and all keys and values change, so a
read that came too early finds what was there before.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from gpu_products import draw
from torch import Tensor

from minisgl_fast.backend.cuda_attention import DecodeAttention, NewTokens
from minisgl_fast.backend.cuda_linear import Linears, make_matrix
from minisgl_fast.backend.interface import Matrix
from minisgl_fast.backend.kv_layout import layer_shape

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

PAGE = 64
COLUMNS = 12  # pages a sequence
HEAD_DIM = 128
EPS = 1e-6
SHAPES = {  # hidden, query heads, kv heads, intermediate
    "0.6B": (1024, 16, 8, 3072),
    "14B": (5120, 40, 8, 17408),
}


class Layer:
    """One layer's matrices and cache."""

    def __init__(self, shape: tuple[int, int, int, int], num_pages: int, seed: int) -> None:
        hidden, num_heads, num_kv_heads, width = shape
        norm = (torch.ones(hidden, dtype=torch.bfloat16, device="cuda"), EPS)

        def matrix(index: int, n: int, k: int, *, normed: bool) -> Matrix:
            weight = draw(seed + index, n, k, scale=k**-0.5)
            return make_matrix(weight, None, norm if normed else None, may_fold=True)

        rows = (num_heads + 2 * num_kv_heads) * HEAD_DIM
        self.qkv = matrix(0, rows, hidden, normed=True)
        self.o = matrix(1, hidden, num_heads * HEAD_DIM, normed=False)
        self.gate_up = matrix(2, 2 * width, hidden, normed=True)
        self.down = matrix(3, hidden, width, normed=False)
        shape_of_kv = layer_shape(num_pages, num_kv_heads, PAGE, HEAD_DIM)
        self.kv = torch.zeros(shape_of_kv, dtype=torch.bfloat16, device="cuda")


@pytest.mark.parametrize(
    ("model", "num_rows"),
    [("0.6B", 1), ("0.6B", 8), ("0.6B", 16), ("0.6B", 48), ("0.6B", 100), ("14B", 1), ("14B", 16)],
)
def test_overlapping_launches_leave_the_bits_of_single_ones(model: str, num_rows: int) -> None:
    shape = SHAPES[model]
    hidden, num_heads, num_kv_heads, _ = shape
    num_pages = num_rows * COLUMNS
    num_layers = 6 if model == "0.6B" else 2
    layers = [Layer(shape, num_pages, 10 * index) for index in range(num_layers)]
    device = layers[0].kv.device
    linears = Linears(device, 8, 1024)
    attention = DecodeAttention(num_heads, num_kv_heads, HEAD_DIM, PAGE)
    angles = torch.rand(COLUMNS * PAGE, HEAD_DIM // 2, device="cuda") * 6
    rope_table = torch.cat((angles.cos(), angles.sin()), dim=-1)
    head_norm = torch.ones(HEAD_DIM, dtype=torch.bfloat16, device="cuda")
    table = torch.zeros(num_rows, COLUMNS, dtype=torch.int32, device="cuda")
    slots = torch.arange(num_rows, dtype=torch.int32, device="cuda")
    lengths = torch.ones(num_rows, dtype=torch.int32, device="cuda")
    residual = torch.zeros(num_rows, hidden, dtype=torch.bfloat16, device="cuda")

    def change(turn: int) -> None:
        """What a step finds: the same for the same turn."""
        generator = torch.Generator("cuda").manual_seed(turn)
        pages = torch.randperm(num_pages, generator=generator, device="cuda")
        table.copy_(pages.view(num_rows, COLUMNS))
        lengths.random_(1, COLUMNS * PAGE, generator=generator)
        residual.normal_(generator=generator)
        for layer in layers:
            layer.kv.normal_(generator=generator)

    def step(done: Callable[[], None]) -> None:
        for layer in layers:
            value, rows, rows_eps = linears.unscaled(residual, layer.qkv)
            done()
            new = NewTokens(value, head_norm, head_norm, EPS, rope_table, rows, rows_eps)
            out = torch.empty(num_rows, num_heads * HEAD_DIM, dtype=torch.bfloat16, device=device)
            scale = HEAD_DIM**-0.5
            attention(new, layer.kv, out, lengths, slots, table, num_rows, scale, pdl=True)
            done()
            linears.linear_add(out, layer.o, residual)
            done()
            middle = linears.linear_silu_mul(residual, layer.gate_up)
            done()
            linears.linear_add(middle, layer.down, residual)
            done()

    def state() -> list[Tensor]:
        return [residual.clone(), *(layer.kv.clone() for layer in layers)]

    expected = []
    for turn in range(4):
        change(turn)
        step(torch.cuda.synchronize)
        expected.append(state())
        assert torch.isfinite(residual).all()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step(lambda: None)
    for turn in (0, 1, 2, 3) * 3:
        change(turn)
        graph.replay()
        for got, wanted in zip(state(), expected[turn], strict=True):
            assert torch.equal(got.view(torch.int16), wanted.view(torch.int16)), turn
