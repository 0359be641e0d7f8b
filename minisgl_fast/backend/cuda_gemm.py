"""Matrix products of a handful of rows, with what surrounds them: ``kernels/gemm_small.cu``.

    gemm = SmallGemm(device)
    if gemm.fits(num_rows, n, k): y = gemm.linear(x, weight, bias)

All methods: x [num_rows, K] and weight [N, K] contiguous bfloat16, outputs from torch's allocator,
one launch on the current stream, nothing waits. They round where separate operations would (see
each method), so that they may replace those. A row's result does not depend on the other rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from minisgl_fast.backend.kernel import Kernel, get_kernel
from minisgl_fast.errors import EngineError

MAX_ROWS = 32
MAX_EARLY_ROWS = 8  # from here on the next kernel's blocks are only in the way
STEP_K = 64  # K of a warp's step
MAX_WARPS = 8
MAX_STAGES = 8
BLOCK_RESERVE = 1024  # shared memory that the system takes of every block
WIDE_ROWS = 16
MAX_SHARE = 80  # steps a block; x lies in shared memory
MAX_WIDE_X = WIDE_ROWS * 3072  # elements of x, with more than 8 rows; then cuBLAS is faster
MAX_TALL_X, MAX_TALL_W = 32 * 3072, 1 << 23  # elements of x and W, with more than 16 rows
STEP_BYTES = 16 * STEP_K * 2  # of W, a 16-row tile, warp and step
SMALL_TILE = 64 << 10
MBARRIER_BYTES = 16  # of a cluster's exchange


@dataclass(frozen=True, slots=True)
class Plan:
    """How a product is cut: constants of gemm_small.cu and its launch."""

    row_tiles: int  # 16-row tiles of W a block
    cluster: int  # blocks that share K
    warps: int
    stages: int  # steps in a warp's ring
    blocks_per_sm: int  # at most; with fewer tiles there are fewer blocks


@dataclass(frozen=True, slots=True)
class _Launch:
    kernel: Kernel
    grid: tuple[int]
    block: int
    shared_bytes: int
    stages: int


class SmallGemm:
    """The products of one device. ``pdl`` and ``early`` are for measurements."""

    def __init__(self, device: torch.device, *, pdl: bool = True, early: bool = True) -> None:
        properties = torch.cuda.get_device_properties(device)
        self._num_sms: int = properties.multi_processor_count
        self._max_shared: int = properties.shared_memory_per_block_optin  # type: ignore[attr-defined]
        self._has_clusters: bool = properties.major >= 9
        self._pdl = pdl
        self._early = int(early)
        self._launches: dict[tuple[int, int, int, bool], _Launch] = {}
        self._fits: dict[tuple[int, int, int], bool] = {}

    def fits(self, num_rows: int, n: int, k: int) -> bool:
        """Whether such a product is ours: where it was not faster than cuBLAS, it is not."""
        key = (num_rows, n, k)
        fits = self._fits.get(key)
        if fits is None:
            fits = self._fits[key] = _may_fit(*key) and self.plan(*key) is not None
        return fits

    def linear(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        norm_eps: float | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        """[num_rows, N] = x W^T + bias, summed in float and rounded once.

        ``norm_eps``: the product of x / rms(x); the rows' scales are part of the float sums.
        ``out``: contiguous; a new one by default.
        """
        if out is None:
            out = torch.empty(len(x), len(weight), dtype=x.dtype, device=x.device)
        self._run(out, x, weight, bias=bias, norm_eps=norm_eps)
        return out

    def linear_add(
        self, x: Tensor, weight: Tensor, residual: Tensor, bias: Tensor | None = None
    ) -> Tensor:
        """residual += x W^T + bias, in place: the product is rounded, then the sum.

        Returns residual.
        """
        self._run(residual, x, weight, bias=bias, residual=residual)
        return residual

    def linear_silu_mul(self, x: Tensor, weight: Tensor, norm_eps: float | None = None) -> Tensor:
        """[num_rows, N / 2]: the backend's ``silu_mul`` of ``linear``; W is gate rows, then up."""
        out = torch.empty(len(x), len(weight) // 2, dtype=x.dtype, device=x.device)
        self._run(out, x, weight, norm_eps=norm_eps, gated=True)
        return out

    def plan(self, num_rows: int, n: int, k: int) -> Plan | None:
        """How to cut this product, None where it does not fit; fitted to what the H200 showed."""
        cluster, warps = self._split(num_rows, n, k)
        turns = -(-k // STEP_K // cluster // warps)
        tile_bytes = 32 * k * 2 // cluster
        blocks = -(-n // 32) * cluster
        wanted: list[
            tuple[int, int, range]
        ] = []  # row tiles, blocks an SM, stages: first that fits
        if _is_long(n, k):
            wanted.append((2, 1, range(6, 0, -1)))
        elif blocks <= self._num_sms:
            wanted.append((2, 1, range(min(turns, MAX_STAGES), 0, -1)))
        elif blocks <= 3 * self._num_sms:  # all tiles at once
            most = min(turns, MAX_STAGES)
            least = min(most, -(-SMALL_TILE // (2 * warps * STEP_BYTES)))
            wanted.append((2, -(-blocks // self._num_sms), range(most, least - 1, -1)))
        elif tile_bytes <= SMALL_TILE:  # while one block ends a tile, the other's ring is full
            wanted.append((2, 2, range(2, 1, -1)))
        slots = self._num_sms // cluster
        rounds = {r: -(-n // 16 // r // slots) * slots * r for r in (1, 2)}  # of 16-row tiles
        row_tiles = 1 if 1.05 * rounds[1] < rounds[2] else 2
        wanted.append((row_tiles, 1, range(MAX_STAGES, 0, -1)))
        for row_tiles, blocks_per_sm, depths in wanted:
            for stages in depths:
                plan = Plan(row_tiles, cluster, warps, stages, blocks_per_sm)
                if plan.cluster == 1 and warps < row_tiles * _n_tiles(num_rows):
                    continue  # a thread finishes one sum
                _, shared_bytes = self._launch_shape(plan, num_rows, n, k, norm=True)
                if (
                    blocks_per_sm * (shared_bytes + BLOCK_RESERVE)
                    <= self._max_shared + BLOCK_RESERVE
                ):
                    return plan
        return None

    def _split(self, num_rows: int, n: int, k: int) -> tuple[int, int]:
        """(cluster, warps): how K is shared. The order of the sums depends on it, so it is the same
        for up to 8 rows, and for more.
        """
        steps = k // STEP_K
        cluster = 1
        if self._has_clusters:
            few = 0.9 * self._num_sms  # blocks
            least = 2 if _is_long(n, k) else 1
            while cluster < 8 and (
                cluster < least
                or -(-n // 32) * cluster < few
                or steps > MAX_SHARE * cluster * least
            ):
                cluster *= 2
        share = -(-steps // cluster)
        if num_rows > 8 and share <= 8:
            return cluster, max(
                4, share // 2
            )  # two turns: x of a turn comes beside the first's sums
        idle = {warps: -(-share // warps) * warps - share for warps in range(4, 9)}
        return cluster, max(warps for warps in idle if idle[warps] <= min(idle.values()))

    def _launch_shape(
        self, plan: Plan, num_rows: int, n: int, k: int, *, norm: bool
    ) -> tuple[int, int]:
        """(blocks, bytes of shared memory); the layout is that of gemm_small.cu."""
        n_tiles = _n_tiles(num_rows)
        step_bytes = plan.row_tiles * STEP_BYTES
        sum_bytes = plan.row_tiles * n_tiles * 512
        slice_bytes = -(-k // STEP_K // plan.cluster) * STEP_K * 2
        clusters = -(-n // 16 // plan.row_tiles)
        single = clusters * plan.cluster <= self._num_sms * plan.blocks_per_sm
        if not single:
            clusters = self._num_sms * plan.blocks_per_sm // plan.cluster
        shared_bytes = plan.warps * plan.stages * step_bytes + num_rows * slice_bytes
        if norm:
            shared_bytes += (MAX_WARPS + 8) * n_tiles * 32
        if plan.cluster > 1:
            shared_bytes += 2 * sum_bytes + MBARRIER_BYTES
        if not single:
            shared_bytes += 2 * plan.warps * sum_bytes
        return clusters * plan.cluster, shared_bytes

    def _make_launch(self, num_rows: int, n: int, k: int, norm: bool) -> _Launch:
        plan = self.plan(num_rows, n, k)
        if plan is None:
            raise EngineError(f"no small product for {num_rows} rows, N {n}, K {k}")
        grid, shared_bytes = self._launch_shape(plan, num_rows, n, k, norm=norm)
        n_tiles = _n_tiles(num_rows)
        name = f"gemm_small_r{plan.row_tiles}_n{n_tiles}_c{plan.cluster}"
        kernel = get_kernel(name, "gemm_small", self._max_shared)
        block = plan.warps * 32
        if plan.cluster > 1 and grid < -(-n // 16 // plan.row_tiles) * plan.cluster:
            # A cluster lies within a GPC, so not all SMs may find one: what does not run at once
            # would run when all others have ended.
            most = kernel.max_clusters(plan.cluster, block, shared_bytes)
            grid = min(grid, plan.cluster * (most or grid))
        return _Launch(kernel, (grid,), block, shared_bytes, plan.stages)

    def _run(
        self,
        out: Tensor,
        x: Tensor,
        weight: Tensor,
        *,
        bias: Tensor | None = None,
        residual: Tensor | None = None,
        norm_eps: float | None = None,
        gated: bool = False,
    ) -> None:
        num_rows, k = x.shape
        n = weight.shape[0]
        key = (num_rows, n, k, norm_eps is not None)
        launch = self._launches.get(key)
        if launch is None:
            launch = self._launches[key] = self._make_launch(*key)
        launch.kernel.launch(
            launch.grid,
            launch.block,
            (
                out.data_ptr(),
                x.data_ptr(),
                weight.data_ptr(),
                0 if bias is None else bias.data_ptr(),
                0 if residual is None else residual.data_ptr(),
                num_rows,
                n,
                k,
                int(norm_eps is not None),
                int(gated),
                launch.stages,
                self._early and int(num_rows <= MAX_EARLY_ROWS),
                norm_eps or 0.0,
            ),
            launch.shared_bytes,
            self._pdl,
        )


def _n_tiles(num_rows: int) -> int:
    """Tiles of 8 rows, of which the kernel has variants."""
    return next(tiles for tiles in (1, 2, 4) if num_rows <= 8 * tiles)


def _may_fit(num_rows: int, n: int, k: int) -> bool:
    """What the kernel can do, and where it pays."""
    if not 0 < num_rows <= MAX_ROWS or n % 16 or k % STEP_K or n * k >= 1 << 32:
        return False
    if num_rows > WIDE_ROWS:
        return num_rows * k <= MAX_TALL_X and n * k <= MAX_TALL_W
    return num_rows <= 8 or num_rows * k <= MAX_WIDE_X


def _is_long(n: int, k: int) -> bool:
    """Many steps of K and not too many tiles: two blocks with deep rings share a tile."""
    return k > 40 * STEP_K and 32 * 100 < n <= 1 << 16
