"""Products of dozens of rows with large and medium matrices on a Hopper GPU: against float64, with
NaN around all that is read or written, and the same bits however launches of all kinds follow one
another.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.nn.functional as F
from gpu_products import draw, product, relative_error

if TYPE_CHECKING:
    from minisgl_fast.backend.cuda_wide import WideGemm

# (N, K); gate_up is of both kinds, and the vocabulary is Qwen3-0.6B's.
GATE_UP = [(19456, 2560), (24576, 4096), (34816, 5120), (51200, 5120)]  # 4B, 8B, 14B, 32B
OTHERS = {
    "4B": [(2560, 9728)],
    "8B": [(6144, 4096), (4096, 4096), (4096, 12288)],
    "14B": [(7168, 5120), (5120, 5120), (5120, 17408)],
    "32B": [(10240, 5120), (5120, 8192), (5120, 25600)],
    "0.6B": [(151936, 1024)],
}
# Just large enough, N no multiple of a tile. In turn: K in three parts, in two, stream-K, with the
# least K that there may be, and (gated) with dozens of blocks to a tile.
ODD = [(1040, 16192), (7184, 2368), (8464, 1984), (87392, 192), (272, 61696)]
ROWS = (9, 15, 16, 17, 24, 32, 33, 48, 63, 64)
# Layers of 0.6B; then N no multiple of a tile, with K in 8, 4, 2 and 1 parts, and little K.
MEDIUM = [(4096, 1024), (1024, 2048), (6144, 1024), (1024, 3072)]
MEDIUM += [(1008, 2112), (1936, 1152), (4112, 1088), (8464, 896), (12304, 512)]
MEDIUM_ROWS = (1, 17, 33, 48, 63, 64)
MAX_ROWS = 64
GUARD = 256  # elements before and behind an output
STEP = 2**-8  # what rounding to bfloat16 may change, relative
ODD_CASES = [pytest.param(n, k, (m,), id=f"{n}x{k}-{m}") for n, k in ODD for m in ROWS]
GATED_CASES = [pytest.param(n, k, ROWS, id=f"{n}x{k}") for n, k in GATE_UP]
PLAIN_CASES = [pytest.param(n, k, ROWS, id=f"{n}x{k}") for of in OTHERS.values() for n, k in of]
MEDIUM_CASES = [pytest.param(n, k, MEDIUM_ROWS, id=f"{n}x{k}") for n, k in MEDIUM]

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0),
        reason="the wide products need a Hopper GPU",
    ),
]


@pytest.fixture(scope="module")
def gemm() -> WideGemm:
    from minisgl_fast.backend.cuda_wide import WideGemm
    from minisgl_fast.backend.kernel import warm
    from minisgl_fast.backend.kernels_table import GEMM_WIDE

    warm(GEMM_WIDE)  # compiled side by side
    return WideGemm(torch.device("cuda", torch.cuda.current_device()))


class Output:
    """[num_rows, n] of NaN with a row stride, in memory of NaN that nobody may write."""

    def __init__(self, num_rows: int, n: int, stride: int) -> None:
        shape, strides = (num_rows, n), (stride, 1)
        self._whole = torch.full((2 * GUARD + num_rows * stride,), float("nan"), device="cuda")
        self._whole = self._whole.bfloat16()
        self._before = self._whole.clone()
        self.out = self._whole.as_strided(shape, strides, GUARD)
        self._inside = self._before.as_strided(shape, strides, GUARD)

    def guards_hold(self) -> bool:
        """Whether nothing else was written."""
        self._inside.copy_(self.out)
        return torch.equal(self._whole.view(torch.int16), self._before.view(torch.int16))


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[Output]:
    """Outputs that the products make themselves, the last one last."""
    found: list[Output] = []

    def empty(num_rows: int, n: int, **_: Any) -> torch.Tensor:
        found[:] = [Output(num_rows, n, n)]
        return found[0].out

    monkeypatch.setattr(torch, "empty", empty)
    return found


def operands(
    n: int, k: int, seed: int = 0, scale: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """(x of MAX_ROWS rows, weight), both followed by NaN."""
    x, weight = draw(seed, MAX_ROWS + 8, k), draw(seed + 1, n + 8, k, scale=scale)
    x[MAX_ROWS:], weight[n:] = float("nan"), float("nan")
    return x[:MAX_ROWS], weight[:n]


def row_sizes() -> torch.Tensor:
    """A factor for each row, no two alike."""
    return torch.logspace(-5, 2, MAX_ROWS, base=2, device="cuda").bfloat16()[:, None]


def slack_of(xs: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """What float sums may be off by: far less than one of their products."""
    norms = [part.float().norm(dim=1).double() for part in weight.split(16384)]
    return xs.float().norm(dim=1).double()[:, None] * torch.cat(norms) * 2**-19


def within(got: torch.Tensor, exact: torch.Tensor, bound: torch.Tensor) -> bool:
    """Whether each element is ``exact`` but for ``bound``; not with NaN."""
    return bool(((got.double() - exact).abs() <= bound).all())


def workspace_is_clean(gemm: WideGemm) -> bool:
    """Whether the next launch finds no message, and a counter of 0."""
    *scales, counter = gemm._scales.tolist()
    return counter == 0 and set(scales) == {-1} and bool(gemm._partials.eq(-1).all())


@pytest.mark.parametrize(
    ("n", "k", "row_counts"), [*PLAIN_CASES, *GATED_CASES, *ODD_CASES, *MEDIUM_CASES]
)
def test_product_alone_or_of_normed_rows_or_added_to_a_residual(
    gemm: WideGemm, made: list[Output], n: int, k: int, row_counts: tuple[int, ...]
) -> None:
    xs, weight = operands(n, k)
    xs *= row_sizes()
    expected, slack = product(xs, weight), slack_of(xs, weight)
    mean_squares = xs.double().square().mean(dim=1, keepdim=True)
    old = draw(2, MAX_ROWS, n, scale=k**0.5)
    for index, num_rows in enumerate(row_counts):
        assert gemm.fits(num_rows, n, k)
        rows = slice(MAX_ROWS - num_rows, None)  # NaN follows the last
        x, exact = xs[rows], expected[rows]
        strided = Output(num_rows, n, n + 8 * (index % 3) + 8)
        assert gemm.linear(x, weight, strided.out) is strided.out
        own = gemm.linear(x, weight)
        assert own is made[0].out
        assert torch.equal(own, strided.out), num_rows
        assert relative_error(own, exact) < 3e-3, num_rows
        assert within(own, exact, exact.abs() * STEP + slack[rows]), num_rows
        for eps in (1e-6, 0.5):  # the last decides about small rows
            normed, scale = Output(num_rows, n, n + 16), torch.rsqrt(mean_squares[rows] + eps)
            assert gemm.linear(x, weight, normed.out, norm_eps=eps) is normed.out
            scaled, off = exact * scale, slack[rows] * scale * 2
            assert relative_error(normed.out, scaled) < 3e-3, (num_rows, eps)
            assert within(normed.out, scaled, scaled.abs() * STEP + off), (num_rows, eps)
            assert normed.guards_hold(), (num_rows, eps)
        residual = Output(num_rows, n, n)
        residual.out.copy_(old[rows])
        assert gemm.linear_add(x, weight, residual.out) is residual.out
        total = exact + old[rows].double()
        assert within(residual.out, total, total.abs() * STEP + slack[rows]), num_rows
        assert all(o.guards_hold() for o in (strided, made[0], residual)), num_rows
        assert workspace_is_clean(gemm), num_rows


def gated(products: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up in float64, rounded wherever separate operations would."""
    gate, up = products.bfloat16().chunk(2, dim=1)
    return (F.silu(gate.float()).bfloat16() * up).double()


def gated_bound(products: torch.Tensor, slack: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(silu(gate) * up without any rounding, what it may be off by).

    Gate and up are rounded, and may be off by ``slack`` before; silu'(x) is below 1.1; its result
    is rounded, and so is that times up.
    """
    gate, up = products.chunk(2, dim=1)
    gate_off, up_off = (products.abs() * STEP + slack).chunk(2, dim=1)
    left = F.silu(gate).abs()
    left_off = 1.1 * gate_off * (1 + STEP) + left * STEP
    exact = F.silu(gate) * up
    off = left * up_off + left_off * up.abs() + left_off * up_off
    return exact, off * (1 + STEP) + exact.abs() * STEP + 1e-6


@pytest.mark.parametrize(("n", "k", "row_counts"), [*GATED_CASES, *ODD_CASES])
def test_silu_of_the_gate_times_up(
    gemm: WideGemm, made: list[Output], n: int, k: int, row_counts: tuple[int, ...]
) -> None:
    xs, weight = operands(n, k, seed=5, scale=k**-0.5)
    xs *= row_sizes()
    products, slack = product(xs, weight), slack_of(xs, weight) * 2
    mean_squares = xs.double().square().mean(dim=1, keepdim=True)
    for eps in (None, 1e-6, 0.5):  # the last decides about small rows
        scale = 1.0 if eps is None else torch.rsqrt(mean_squares + eps)
        expected = gated(products * scale)
        exact, bound = gated_bound(products * scale, slack * scale)
        for num_rows in row_counts:
            assert gemm.fits(num_rows, n, k, gated=True)
            rows = slice(MAX_ROWS - num_rows, None)
            got = gemm.linear_silu_mul(xs[rows], weight, eps)
            what = f"{num_rows} rows, eps {eps}"
            assert got is made[0].out
            assert got.shape == (num_rows, n // 2)
            assert within(got, exact[rows], bound[rows]), what
            assert relative_error(got, expected[rows]) < 6e-3, what
            # Only sums beside the edge of a rounding differ: all would if one step were left out.
            assert (got == expected[rows]).double().mean().item() > 0.9, what
            assert made[0].guards_hold(), what
            assert workspace_is_clean(gemm), what


Launch = Callable[[], torch.Tensor]


def launch_of(gemm: WideGemm, kind: str, num_rows: int, n: int, k: int, seed: int) -> Launch:
    """A product that gives a new tensor every time."""
    xs, weight = operands(n, k, seed, scale=k**-0.5)
    x = xs[:num_rows]
    eps = 1e-6 if "normed" in kind else None
    if "linear" in kind:
        return partial(gemm.linear, x, weight, norm_eps=eps)
    if kind == "add":
        old = draw(seed + 2, num_rows, n)
        return lambda: gemm.linear_add(x, weight, old.clone())
    return partial(gemm.linear_silu_mul, x, weight, eps)


# They share a workspace, or leave it alone: each alternates with the next one.
KINDS = [
    ("linear", 24576, 4096),
    ("normed gated", 19456, 2560),
    ("normed linear", 7168, 5120),
    ("gated", 272, 61696),
    ("normed linear", 1040, 16192),
    ("normed linear", 4096, 1024),
    ("add", 1024, 3072),
    ("add", 87392, 192),
    ("normed linear", 8464, 1984),
    ("normed linear", 87392, 192),
    ("linear", 5120, 5120),
    ("normed gated", 1040, 16192),
    ("add", 8464, 1984),
    ("gated", 8464, 1984),
]


@pytest.mark.parametrize("num_rows", [16, 32, 33])
def test_repeated_and_alternating_launches_give_the_same_bits(
    gemm: WideGemm, num_rows: int
) -> None:
    launches = [launch_of(gemm, kind, num_rows, n, k, seed=10) for kind, n, k in KINDS]
    expected = []
    for launch in launches:  # each alone on the GPU
        torch.cuda.synchronize()
        expected.append(launch())
        assert torch.isfinite(expected[-1]).all()
    for first in range(len(KINDS)):
        pair = first, (first + 1) % len(KINDS)
        for turns in ([0] * 12, [0, 1] * 12, [0, 0, 1] * 6):
            order = [pair[turn] for turn in turns]
            torch.cuda.synchronize()
            results = [launches[which]() for which in order]
            for which, result in zip(order, results, strict=True):
                assert torch.equal(result, expected[which]), (KINDS[which], turns)
        assert workspace_is_clean(gemm)


@pytest.mark.parametrize("bits", [0x7FC0, -1])  # the last: of messages that nobody has written
@pytest.mark.parametrize(("kind", "n", "k"), KINDS)
def test_nan_of_one_row_stays_there(gemm: WideGemm, kind: str, n: int, k: int, bits: int) -> None:
    xs, weight = operands(n, k, 50, scale=k**-0.5)
    x, eps = xs[:17].clone(), 1e-6 if "normed" in kind else None
    product = gemm.linear_silu_mul if "gated" in kind else gemm.linear
    clean = product(x, weight, norm_eps=eps)
    x[5].view(torch.int16).fill_(bits)
    result = product(x, weight, norm_eps=eps)
    assert result[5].isnan().all()
    others = torch.arange(17, device="cuda") != 5
    assert torch.equal(result[others], clean[others])
    assert workspace_is_clean(gemm)


def test_other_numbers_of_rows_may_follow(gemm: WideGemm) -> None:
    """Flags and scales of more or fewer rows are no matter to who comes next."""
    xs, weight = operands(19456, 2560, 20, scale=2560**-0.5)
    other = draw(22, 7168, 2560, scale=2560**-0.5)
    launches: list[Callable[[torch.Tensor], torch.Tensor]] = [
        lambda x: gemm.linear_silu_mul(x, weight, 1e-6),
        lambda x: gemm.linear(x, other, norm_eps=1e-6),
    ]
    order = [(m, which) for m in (64, 9, 33, 16, 64, 17) for which in (0, 1, 0)]
    expected = {}
    for num_rows, which in order:
        torch.cuda.synchronize()
        expected[num_rows, which] = launches[which](xs[:num_rows])
    results = [(key, launches[key[1]](xs[: key[0]])) for _ in range(5) for key in order]
    assert all(torch.equal(result, expected[key]) for key, result in results)
    assert workspace_is_clean(gemm)


@pytest.mark.parametrize(
    ("num_rows", "hidden", "width", "attention"),
    [
        (16, 2560, 9728, 7168),
        (48, 2560, 9728, 7168),
        (40, 1024, 3072, 2048),
        (64, 1024, 3072, 2048),
    ],
)
def test_chain_in_a_graph_equals_single_launches(
    gemm: WideGemm, num_rows: int, hidden: int, width: int, attention: int
) -> None:
    """Launches that overlap, each on the result of the one before, replayed with other x."""
    layers = [
        (
            draw(i, 2 * width, hidden, scale=hidden**-0.5),  # gated, if large
            draw(i + 30, hidden, width, scale=width**-0.5),
            draw(i + 60, width, hidden, scale=hidden**-0.5),
            draw(i + 90, attention, hidden, scale=hidden**-0.5),
            draw(i + 120, hidden, attention, scale=attention**-0.5),
        )
        for i in range(3)
    ]
    has_gated = gemm.fits(num_rows, 2 * width, hidden, gated=True)  # loaded before a capture
    assert has_gated == (hidden > 1024)
    assert all(gemm.fits(num_rows, *weight.shape) for weight in layers[0][1:])

    def chain(residual: torch.Tensor, *, wait: bool) -> None:
        def done(result: torch.Tensor) -> torch.Tensor:
            if wait:
                torch.cuda.synchronize()
            return result

        for gate_up, down, up, qkv, o in layers:
            middle = done(gemm.linear(residual, qkv, norm_eps=1e-6))
            done(gemm.linear_add(middle, o, residual))
            if has_gated:
                middle = done(gemm.linear_silu_mul(residual, gate_up, 1e-6))
                done(gemm.linear_add(middle, down, residual))
            middle = done(gemm.linear(residual, up, norm_eps=1e-6))
            done(gemm.linear_add(middle, down, residual))

    starts = [draw(seed, num_rows, hidden) for seed in range(200, 208)]
    expected = [start.clone() for start in starts]
    for residual in expected:
        chain(residual, wait=True)
        assert torch.isfinite(residual).all()
    residual = torch.empty_like(starts[0])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        chain(residual, wait=False)
    for start, result in zip(starts, expected, strict=True):
        residual.copy_(start)
        graph.replay()
        assert torch.equal(residual, result)
    assert workspace_is_clean(gemm)


@pytest.mark.parametrize("num_rows", [16, 64])
@pytest.mark.parametrize("kind", ["linear", "normed linear", "normed gated"])
@pytest.mark.parametrize(("n", "k"), [(5120, 17408), (19456, 2560)])
def test_x_that_the_kernel_before_writes_is_waited_for(
    gemm: WideGemm, n: int, k: int, kind: str, num_rows: int
) -> None:
    xs, weight = operands(n, k, 30, scale=k**-0.5)
    x = xs[:num_rows]
    sources = [draw(seed, num_rows, k, scale=1 + seed % 4) for seed in range(40, 44)]

    def compute(rows: torch.Tensor) -> torch.Tensor:
        if "linear" in kind:
            return gemm.linear(rows, weight, norm_eps=1.0 if "normed" in kind else None)
        return gemm.linear_silu_mul(rows, weight, 1.0)

    expected = []
    for source in sources:
        doubled = source * 2
        torch.cuda.synchronize()
        expected.append(compute(doubled))
    torch.cuda.synchronize()
    results = []
    for index in range(12):  # x is written while the product before still runs
        torch.mul(sources[index % 4], 2, out=x)
        results.append(compute(x))
    assert all(torch.equal(result, expected[i % 4]) for i, result in enumerate(results))
