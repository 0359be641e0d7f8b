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

MAX_ROWS = 16
STEP_K = 64  # K of a warp's step
MAX_WARPS = 12
MAX_STAGES = 8
BLOCK_RESERVE = 1024  # shared memory that the system takes of every block


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
        self._max_shared: int = properties.shared_memory_per_block_optin
        self._has_clusters: bool = properties.major >= 9
        self._pdl = pdl
        self._early = int(early)
        self._launches: dict[tuple[int, int, int, bool], _Launch] = {}

    def fits(self, num_rows: int, n: int, k: int) -> bool:
        """Whether there is a launch for such a product."""
        if not 0 < num_rows <= MAX_ROWS or n % 16 or k % STEP_K or k < STEP_K * 8:
            return False
        plan = self.plan(num_rows, n, k)
        return self._launch_shape(plan, num_rows, n, k, norm=True)[1] <= self._max_shared

    def linear(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        norm: tuple[Tensor, float] | None = None,
    ) -> Tensor:
        """[num_rows, N] = x W^T + bias, summed in float and rounded once.

        ``norm`` (weight [K], eps): x is first normed as the backend's ``rms_norm`` does it.
        """
        out = torch.empty(len(x), len(weight), dtype=x.dtype, device=x.device)
        self._run(out, x, weight, bias=bias, norm=norm)
        return out

    def linear_add(self, x: Tensor, weight: Tensor, residual: Tensor) -> Tensor:
        """residual += x W^T, in place: the product is rounded, then the sum. Returns residual."""
        self._run(residual, x, weight, residual=residual)
        return residual

    def linear_silu_mul(
        self, x: Tensor, weight: Tensor, norm: tuple[Tensor, float] | None = None
    ) -> Tensor:
        """[num_rows, N / 2]: the backend's ``silu_mul`` of x W^T; W is gate rows, then up rows."""
        out = torch.empty(len(x), len(weight) // 2, dtype=x.dtype, device=x.device)
        self._run(out, x, weight, norm=norm, gated=True)
        return out

    def plan(self, num_rows: int, n: int, k: int) -> Plan:
        """How to cut this product. Sums depend on ``cluster`` and ``warps``: no choice of those
        may depend on ``num_rows``.
        """
        steps = k // STEP_K
        cluster = 1
        if self._has_clusters:
            while cluster < 8 and (
                -(-n // 32) * cluster < 0.9 * self._num_sms or steps // cluster > 48
            ):
                cluster *= 2
        share = -(-steps // cluster)
        warps = min(range(4, 9), key=lambda count: (-(-share // count) * count - share, -count))
        turns = -(-share // warps)
        one_tile = -(-n // 32) * cluster <= 3 * self._num_sms
        for blocks_per_sm in (3, 2, 1) if one_tile else (2, 1):
            for stages in range(min(turns, MAX_STAGES) if one_tile else MAX_STAGES, 1, -1):
                plan = Plan(2, cluster, warps, stages, blocks_per_sm)
                _, shared_bytes = self._launch_shape(plan, num_rows, n, k, norm=True)
                if blocks_per_sm * (shared_bytes + BLOCK_RESERVE) <= self._max_shared:
                    return plan
        return Plan(2, cluster, warps, 1, 1)

    def _launch_shape(
        self, plan: Plan, num_rows: int, n: int, k: int, *, norm: bool
    ) -> tuple[int, int]:
        """(blocks, bytes of shared memory); the layout is that of gemm_small.cu."""
        n_tiles = -(-num_rows // 8)
        step_bytes = plan.row_tiles * 16 * STEP_K * 2
        sum_bytes = plan.row_tiles * n_tiles * 512
        slice_bytes = -(-k // STEP_K // plan.cluster) * STEP_K * 2
        clusters = -(-n // 16 // plan.row_tiles)
        single = clusters * plan.cluster <= self._num_sms * plan.blocks_per_sm
        if not single:
            clusters = self._num_sms * plan.blocks_per_sm // plan.cluster
        shared_bytes = plan.warps * plan.stages * step_bytes + num_rows * slice_bytes
        if norm:
            shared_bytes += slice_bytes + (MAX_WARPS + 8) * n_tiles * 32
        if plan.cluster > 1:
            shared_bytes += 2 * sum_bytes
        if not single:
            shared_bytes += 2 * plan.warps * sum_bytes
        return clusters * plan.cluster, shared_bytes

    def _make_launch(self, num_rows: int, n: int, k: int, norm: bool) -> _Launch:
        plan = self.plan(num_rows, n, k)
        grid, shared_bytes = self._launch_shape(plan, num_rows, n, k, norm=norm)
        n_tiles = -(-num_rows // 8)
        name = f"gemm_small_r{plan.row_tiles}_n{n_tiles}_c{plan.cluster}"
        kernel = get_kernel(name, "gemm_small", self._max_shared)
        return _Launch(kernel, (grid,), plan.warps * 32, shared_bytes, plan.stages)

    def _run(
        self,
        out: Tensor,
        x: Tensor,
        weight: Tensor,
        *,
        bias: Tensor | None = None,
        residual: Tensor | None = None,
        norm: tuple[Tensor, float] | None = None,
        gated: bool = False,
    ) -> None:
        num_rows, k = x.shape
        n = weight.shape[0]
        key = (num_rows, n, k, norm is not None)
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
                0 if norm is None else norm[0].data_ptr(),
                num_rows,
                n,
                k,
                int(gated),
                launch.stages,
                self._early,
                0.0 if norm is None else norm[1],
            ),
            launch.shared_bytes,
            self._pdl,
        )
