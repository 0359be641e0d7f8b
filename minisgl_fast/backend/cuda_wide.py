"""Matrix products of up to 64 rows with large and medium matrices on Hopper: launches of
``gemm_wide.cu``.

    gemm = WideGemm(device)
    if gemm.fits(num_rows, n, k): ...             # also where SmallGemm does not
    y = gemm.linear(x, weight)                    # x W^T, W [N, K]
    y = gemm.linear(x, weight, norm_eps=eps)      # of x / rms(x)
    gemm.linear_add(x, weight, residual)          # residual += x W^T
    y = gemm.linear_silu_mul(x, weight, eps)      # silu(gate) * up of the product of x / rms(x)

``cuda_gemm.py`` serves fewer rows and smaller matrices, cuBLAS all else. Every sum is kept in float
and rounded once, the residual with it. Plans are what was fastest on the H200 (docs/kernel-log.md).

Blocks of a launch wait for each other's sums (stream-K) and scales of rows (``norm_eps``), so all
of them must run at once: a grid is never larger than the device. What goes from block to block lies
in a workspace that all launches of the stream share, each after the one before.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from minisgl_fast.backend.kernel import HAS_LAUNCHER, UNWRITTEN, Kernel, get_kernel, tensor_map

MAX_ROWS = 64
MIN_LARGE = 1 << 24  # elements of W: the time is that of its bytes
MIN_MEDIUM, MAX_MEDIUM = 1 << 21, 1 << 23  # that of a launch, which the one before hides here
STEP_K = 64
BARRIER_BYTES = 1024
NUM_SCALES = 256  # of rows, in the workspace; a counter follows
MAX_STAGES = 16
MAX_LARGE_SPLIT, MAX_SPLIT = 3, 8
BLOCK_RESERVE = 1024  # shared memory that the driver takes for each block


@dataclass(frozen=True, slots=True)
class WidePlan:
    """How a product is cut: one variant of the kernel."""

    columns: int  # room for rows of x
    gated: bool
    warpgroups: int
    split: int  # blocks that share K of a tile; 1: stream-K

    @property
    def name(self) -> str:
        """Of the kernel."""
        name = f"gemm_wide_c{self.columns}_w{self.warpgroups}_k{self.split}"
        return name + "_gated" * self.gated

    @property
    def features(self) -> int:
        """Columns of the result that a block computes."""
        return 64 * self.warpgroups

    @property
    def stage_bytes(self) -> int:
        """Shared memory of one step of K."""
        return (self.features * (1 + self.gated) + self.columns) * STEP_K * 2

    @property
    def blocks_per_sm(self) -> int:
        """That must fit: with 2 the next kernel's blocks wait beside, their rings full."""
        return 1 if self.gated else 2


@dataclass(frozen=True, slots=True)
class _Launch:
    plan: WidePlan
    kernel: Kernel
    grid: tuple[int]
    stages: int
    shared_bytes: int


class WideGemm:
    """The products of one device; x, W and the residual are contiguous bfloat16."""

    def __init__(self, device: torch.device) -> None:
        properties = torch.cuda.get_device_properties(device)
        self._num_sms: int = properties.multi_processor_count
        self._max_shared: int = properties.shared_memory_per_block_optin  # type: ignore[attr-defined]
        self._is_served = HAS_LAUNCHER and (properties.major, properties.minor) == (9, 0)
        self._launches: dict[tuple[int, int, int, bool], _Launch | None] = {}
        self._weight_maps: dict[tuple[int, int, int, int], bytes] = {}
        # Of stream-K: partial sums of a tile a block; the scales of rows and a counter. Every
        # launch leaves them as they are here.
        num_floats = self._num_sms * 256 * MAX_ROWS if self._is_served else 0
        self._partials = torch.full((num_floats,), UNWRITTEN, dtype=torch.int32, device=device)
        self._scales = torch.full((NUM_SCALES + 1,), UNWRITTEN, dtype=torch.int32, device=device)
        self._scales[NUM_SCALES] = 0

    def fits(self, num_rows: int, n: int, k: int, *, gated: bool = False) -> bool:
        """Whether such a product is ours. The first time of a shape, it loads what that needs:
        not inside a capture.
        """
        return self._launch_of(num_rows, n, k, gated) is not None

    def linear(
        self,
        x: Tensor,
        weight: Tensor,
        out: Tensor | None = None,
        norm_eps: float | None = None,
    ) -> Tensor:
        """[num_rows, N] = x W^T; ``out``: its rows may have a stride; a new one by default.

        ``norm_eps``: the product of x / rms(x); the rows' scales are part of the float sums.
        """
        if out is None:
            out = torch.empty(len(x), len(weight), dtype=x.dtype, device=x.device)
        self._run(out, x, weight, norm_eps=norm_eps)
        return out

    def linear_add(self, x: Tensor, weight: Tensor, residual: Tensor) -> Tensor:
        """residual += x W^T, in place, rounded once. Returns residual."""
        self._run(residual, x, weight, add=True)
        return residual

    def linear_silu_mul(self, x: Tensor, weight: Tensor, norm_eps: float | None = None) -> Tensor:
        """[num_rows, N / 2]: the backend's ``silu_mul`` of the product; W is gate rows, then up.

        ``norm_eps``: as of ``linear``.
        """
        out = torch.empty(len(x), len(weight) // 2, dtype=x.dtype, device=x.device)
        self._run(out, x, weight, gated=True, norm_eps=norm_eps)
        return out

    def plan(self, num_rows: int, n: int, k: int, *, gated: bool = False) -> WidePlan | None:
        """How to cut this product; None where it is not ours."""
        size = n * k
        if not self._is_served or not 0 < num_rows <= MAX_ROWS or n % 16 or k % STEP_K:
            return None
        columns = max(16, 1 << (num_rows - 1).bit_length())
        if size >= MIN_LARGE and k >= MAX_LARGE_SPLIT * STEP_K:
            if gated:
                return WidePlan(columns, True, 2, 1)
            split = min(MAX_LARGE_SPLIT, self._num_sms // -(-n // 128))
            return (
                WidePlan(columns, False, 2, split) if split > 1 else WidePlan(columns, False, 1, 1)
            )
        if MIN_MEDIUM <= size <= MAX_MEDIUM and k >= MAX_SPLIT * STEP_K and not gated:
            # Few bytes: as many blocks as find room wait for x with their share of W.
            room = self._num_sms // -(-n // 64)
            split = max(split for split in (1, 2, 4, MAX_SPLIT) if split <= max(room, 1))
            return WidePlan(64, False, 1, split)
        return None

    def _launch_of(self, num_rows: int, n: int, k: int, gated: bool) -> _Launch | None:
        key = (num_rows, n, k, gated)
        if key not in self._launches:
            plan = self.plan(num_rows, n, k, gated=gated)
            self._launches[key] = None if plan is None else self._load(plan, n, k)
        return self._launches[key]

    def _load(self, plan: WidePlan, n: int, k: int) -> _Launch:
        room = (self._max_shared + BLOCK_RESERVE) // plan.blocks_per_sm - BLOCK_RESERVE
        stages = min(MAX_STAGES, (room - BARRIER_BYTES) // plan.stage_bytes)
        shared_bytes = BARRIER_BYTES + stages * plan.stage_bytes
        kernel = get_kernel(plan.name, "gemm_wide", shared_bytes)
        num_tiles = -(-n // (1 + plan.gated) // plan.features)
        if plan.split > 1:
            grid = num_tiles * plan.split
        else:
            grid = min(self._num_sms, num_tiles * (k // STEP_K))
        return _Launch(plan, kernel, (grid,), stages, shared_bytes)

    def _run(
        self,
        out: Tensor,
        x: Tensor,
        weight: Tensor,
        *,
        add: bool = False,
        gated: bool = False,
        norm_eps: float | None = None,
    ) -> None:
        num_rows, k = x.shape
        n = weight.shape[0]
        launch = self._launch_of(num_rows, n, k, gated)
        assert launch is not None, "asked for a product that does not fit"
        plan = launch.plan
        launch.kernel.launch(
            launch.grid,
            128 * (plan.warpgroups + 1),
            (
                self._weight_map(weight, plan.features),
                tensor_map(x, plan.columns, STEP_K),
                out.data_ptr(),
                x.data_ptr(),
                self._partials.data_ptr(),
                self._scales.data_ptr(),
                num_rows,
                n,
                k,
                out.stride(0),
                launch.stages,
                int(add),
                int(norm_eps is not None),
                norm_eps or 0.0,
            ),
            launch.shared_bytes,
            True,
        )

    def _weight_map(self, weight: Tensor, box_rows: int) -> bytes:
        """A map depends on nothing but these numbers, and weights stay where they are."""
        n, k = weight.shape
        key = (weight.data_ptr(), n, k, box_rows)
        found = self._weight_maps.get(key)
        if found is None:
            found = self._weight_maps[key] = tensor_map(weight, box_rows, STEP_K)
        return found
