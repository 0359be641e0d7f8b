"""How wide products are cut, without a GPU: every launch keeps the contract of gemm_wide.cu."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from minisgl_fast.backend import cuda_wide
from minisgl_fast.backend.cuda_wide import MAX_ROWS, STEP_K, WideGemm
from minisgl_fast.backend.kernels_table import GEMM_WIDE

NUM_SMS = 132
SM_BYTES = 228 * 1024  # of shared memory; a block may take all but BLOCK_RESERVE
LARGE = [
    *((6144, 4096), (4096, 4096), (24576, 4096), (4096, 12288)),
    *((7168, 5120), (5120, 5120), (34816, 5120), (5120, 17408)),
    *((10240, 5120), (5120, 8192), (51200, 5120), (5120, 25600)),
    *((151936, 1024), (1040, 16192), (7184, 2368), (8464, 1984), (87392, 192), (16, 1 << 20)),
]
MEDIUM = [
    *((4096, 1024), (1024, 2048), (6144, 1024), (1024, 3072)),
    *((2048, 2048), (896, 4864), (16368, 512), (16, 1 << 17)),
]
CASES = [
    *((n, k, gated) for n, k in LARGE for gated in (False, True)),
    *((n, k, False) for n, k in MEDIUM),
]


def make(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], *, has_launcher: bool = True
) -> WideGemm:
    properties = SimpleNamespace(
        multi_processor_count=NUM_SMS,
        shared_memory_per_block_optin=SM_BYTES - cuda_wide.BLOCK_RESERVE,
        major=capability[0],
        minor=capability[1],
    )
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    monkeypatch.setattr(cuda_wide, "HAS_LAUNCHER", has_launcher)
    monkeypatch.setattr(cuda_wide, "get_kernel", lambda name, *_: name)
    return WideGemm(torch.device("cpu"))


@pytest.fixture
def gemm(monkeypatch: pytest.MonkeyPatch) -> WideGemm:
    return make(monkeypatch, (9, 0))


@pytest.mark.parametrize(("n", "k", "gated"), CASES)
def test_launch_keeps_the_contract_of_the_kernel(
    gemm: WideGemm, n: int, k: int, gated: bool
) -> None:
    kernels = {spec.name: dict(spec.defines) for spec in GEMM_WIDE}
    for num_rows in range(1, MAX_ROWS + 1):
        assert gemm.fits(num_rows, n, k, gated=gated)
        launch = gemm._launch_of(num_rows, n, k, gated)
        assert launch is not None
        constants, (grid,) = kernels[launch.kernel], launch.grid  # type: ignore[index]
        columns, groups, split = (constants[i] for i in ("COLUMNS", "WARPGROUPS", "SPLIT"))
        assert columns >= num_rows
        assert constants["GATED"] == gated
        # Blocks that wait for each other run at once.
        tiles = -(-n // (2 if gated else 1) // (64 * groups))
        steps = k // STEP_K
        assert grid <= NUM_SMS
        if split > 1:
            assert grid == tiles * split
            assert steps >= split
        else:
            assert grid <= tiles * steps
            assert gemm._partials.numel() >= grid * (1 + gated) * 64 * groups * columns
        # What stands beside in an SM.
        stage = (64 * groups * (1 + gated) + columns) * STEP_K * 2
        assert launch.shared_bytes == 1024 + launch.stages * stage
        assert 3 <= launch.stages <= 16
        num_blocks = 1 if gated else 2
        assert num_blocks * (launch.shared_bytes + cuda_wide.BLOCK_RESERVE) <= SM_BYTES


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize(
    ("num_rows", "n", "k"),
    [
        (0, 5120, 5120),
        (65, 5120, 5120),
        (64, 8448, 1984),  # too small
        (64, 8464, 2000),
        (64, 8472, 1984),
        (64, 131072, 128),  # less K than three blocks could share
        (65, 4096, 1024),
        (64, 1024, 2032),
        (64, 8448, 1024),  # between medium and large
        (64, 8192, 256),  # less K than eight could
    ],
)
def test_what_does_not_fit_is_said(
    gemm: WideGemm, num_rows: int, n: int, k: int, gated: bool
) -> None:
    assert not gemm.fits(num_rows, n, k, gated=gated)
    assert gemm.plan(num_rows, n, k, gated=gated) is None


@pytest.mark.parametrize(
    ("capability", "has_launcher"), [((8, 0), True), ((10, 0), True), ((9, 0), False)]
)
def test_other_devices_have_none(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], has_launcher: bool
) -> None:
    gemm = make(monkeypatch, capability, has_launcher=has_launcher)
    assert not gemm.fits(16, 5120, 5120)
    assert not gemm.fits(16, 5120, 5120, gated=True)
    assert gemm._partials.numel() == 0


@pytest.mark.parametrize(("n", "k", "gated"), CASES)
def test_order_of_the_sums_does_not_depend_on_the_number_of_rows(
    gemm: WideGemm, n: int, k: int, gated: bool
) -> None:
    cuts = set()
    for num_rows in range(1, MAX_ROWS + 1):
        launch = gemm._launch_of(num_rows, n, k, gated)
        assert launch is not None
        cuts.add((launch.plan.warpgroups, launch.plan.split, launch.grid))
    assert len(cuts) == 1
