"""Which of cuBLASLt's algorithms computes a product: the one that was fastest on this very card.

    plans = ProductPlans(device)
    with plans.planning():      # at start, before CUDA graphs are captured
        plans.run(x, weight, out)
    if not plans.run(x, weight, out): ...  # torch computes it

Inside ``planning`` a product of a shape and row count not met before is timed with every algorithm,
out of a cold cache, and beside torch's own choice. The fastest is kept from then on if it beats
torch's by MARGIN; all else stays with torch, and so does what was never planned: an eager step may
have any number of rows, and must not wait for a measurement.

Every algorithm sums in float32 and rounds once, so a choice moves a result by no more than the
order of its sums; the choice is fixed for the life of the process, so equal steps give equal bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from minisgl_fast.backend.cublaslt import (
    ALIGNMENT,
    Algorithm,
    CublasLt,
    Product,
    load_cublaslt,
)

MARGIN = 0.02  # by which an algorithm must be faster than torch's
MAX_ALGORITHMS = 12
NUM_TIMES = 7
FLUSH_BYTES = 128 << 20  # written before each timed launch: over twice the L2 cache


class ProductPlans:
    """The choices for one device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._library: CublasLt | None = None
        self._is_planning = False
        self._flush: Tensor | None = None
        self._plans: dict[Product, Algorithm | None] = {}

    @contextmanager
    def planning(self) -> Iterator[None]:
        """Time what is not yet planned. Never in a capture: it waits for the device."""
        self._library = self._library or load_cublaslt(self._device)
        self._is_planning = self._library is not None
        try:
            yield
        finally:
            self._is_planning = False
            self._flush = None

    def run(self, x: Tensor, weight: Tensor, out: Tensor, *, add: bool = False) -> bool:
        """out [rows, n] = or += x [rows, k] weight [n, k]^T; False: torch is to compute it."""
        if self._library is None:
            return False
        n, k = weight.shape
        product = Product(len(x), n, k, out.stride(0))
        if product not in self._plans and self._is_planning:
            self._plans[product] = self._plan(product, x, weight, out, add)
        algorithm = self._plans.get(product)
        if algorithm is None or not _may_run(x, weight, out):
            return False
        self._library.run(product, algorithm, x, weight, out, add=add)
        return True

    def _plan(
        self, product: Product, x: Tensor, weight: Tensor, out: Tensor, add: bool
    ) -> Algorithm | None:
        """The fastest algorithm, None where torch's is good enough."""
        library = self._library
        assert library is not None
        scratch = out.clone() if out.is_contiguous() else torch.zeros_like(out)
        if scratch.stride() != out.stride() or not _may_run(x, weight, scratch):
            return None
        multiply = scratch.addmm_ if add else _into(scratch)
        best, best_us = None, (1.0 - MARGIN) * self._time_us(lambda: multiply(x, weight.T))
        for algorithm in library.algorithms(product, MAX_ALGORITHMS):

            def launch(algorithm: Algorithm = algorithm) -> None:
                library.run(product, algorithm, x, weight, scratch, add=add)

            us = self._time_us(launch)
            if us < best_us:
                best, best_us = algorithm, us
        return best

    def _time_us(self, launch: Callable[[], object]) -> float:
        """The median of single launches, none of whose input is in the cache."""
        if self._flush is None:
            self._flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=self._device)
        launch()
        events = [
            (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True))
            for _ in range(NUM_TIMES)
        ]
        for start, end in events:
            self._flush.zero_()
            start.record()
            launch()
            end.record()
        events[-1][1].synchronize()
        times = sorted(start.elapsed_time(end) for start, end in events)
        return 1e3 * float(times[NUM_TIMES // 2])


def _into(out: Tensor) -> Callable[[Tensor, Tensor], object]:
    return lambda x, weight: torch.mm(x, weight, out=out)


def _may_run(x: Tensor, weight: Tensor, out: Tensor) -> bool:
    """Whether tensors are as the algorithms were asked for."""
    return (
        x.is_contiguous()
        and weight.is_contiguous()
        and out.stride(1) == 1
        and not any(tensor.data_ptr() % ALIGNMENT for tensor in (x, weight, out))
    )
