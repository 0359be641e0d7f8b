"""Which of cuBLASLt's algorithms computes a product: the one that is fastest on this very card.

    plans = ProductPlans(device)
    with plans.planning():      # at start, around an eager step, before its CUDA graph is captured
        plans.run(x, weight, out)
    if not plans.run(x, weight, out): ...  # torch computes it

Inside ``planning`` torch computes everything; on leaving, each product of a shape and row count not
met before is timed with every algorithm and as torch does it: the products of several layers one
after another in a CUDA graph, as they will run, so that no weight comes from the cache. The fastest
is kept from then on if it beats torch's by MARGIN; all else stays with torch, and so does what was
never planned: an eager step may have any number of rows, and must not wait for a measurement. With
more than MAX_ROWS rows a large model is held by the card's power, and no choice made a run faster.

Every algorithm sums in float32 and rounds once, so a choice moves a result by no more than the
order of its sums; the choice is fixed for the life of the process, so equal steps give equal bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from minisgl_fast.backend.cublaslt import (
    ALIGNMENT,
    Algorithm,
    CublasLt,
    Product,
    load_cublaslt,
)

MAX_ROWS = 64
MARGIN = 0.005  # by which an algorithm must be faster than torch's
MAX_ALGORITHMS = 16
MAX_LAYERS = 8  # in one timing: a few hundred megabytes of weights
QUICK_TIMES, FINAL_TIMES = 2, 7  # of each, and of the best of them
NUM_FINALISTS = 3

Launch: TypeAlias = Callable[[Tensor], object]


class _Met(NamedTuple):
    """A product to be planned, with the weights of some layers."""

    x: Tensor
    out: Tensor
    add: bool
    weights: list[Tensor]


class ProductPlans:
    """The choices for one device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._library: CublasLt | None = None
        self._met: dict[Product, _Met] | None = None
        self._plans: dict[Product, Algorithm | None] = {}

    @contextmanager
    def planning(self) -> Iterator[None]:
        """Time what was met inside and is not yet planned. Never in a capture."""
        self._library = self._library or load_cublaslt(self._device)
        met: dict[Product, _Met] = {}
        self._met = met
        try:
            yield
        finally:
            self._met = None
        for product, use in met.items():
            self._plans[product] = self._plan(product, use)

    def run(self, x: Tensor, weight: Tensor, out: Tensor, *, add: bool = False) -> bool:
        """out [rows, n] = or += x [rows, k] weight [n, k]^T; False: torch is to compute it."""
        if self._library is None:
            return False
        n, k = weight.shape
        product = Product(len(x), n, k, out.stride(0))
        if self._met is not None and product not in self._plans:
            if len(x) <= MAX_ROWS and _may_run(x, weight, out):
                use = self._met.setdefault(product, _Met(x, out, add, []))
                if len(use.weights) < MAX_LAYERS:
                    use.weights.append(weight)
            return False
        algorithm = self._plans.get(product)
        if algorithm is None or not _may_run(x, weight, out):
            return False
        self._library.run(product, algorithm, x, weight, out, add=add)
        return True

    def _plan(self, product: Product, use: _Met) -> Algorithm | None:
        """The fastest algorithm, None where torch's is good enough."""
        library = self._library
        assert library is not None
        x, add = use.x, use.add
        out = torch.zeros_like(use.out)
        if out.stride() != use.out.stride():
            return None

        def by_torch(weight: Tensor) -> object:
            return out.addmm_(x, weight.T) if add else torch.mm(x, weight.T, out=out)

        def by(algorithm: Algorithm) -> Launch:
            return lambda weight: library.run(product, algorithm, x, weight, out, add=add)

        algorithms = library.algorithms(product, MAX_ALGORITHMS)
        times = self._times(list(map(by, algorithms)), use.weights, QUICK_TIMES)
        order = sorted(range(len(algorithms)), key=times.__getitem__)
        finalists = [algorithms[index] for index in order[:NUM_FINALISTS]]
        launches = [by_torch, *map(by, finalists)]
        torchs, *times = self._times(launches, use.weights, FINAL_TIMES)
        best = min(times, default=torchs)
        return finalists[times.index(best)] if best < (1.0 - MARGIN) * torchs else None

    def _times(
        self, launches: Sequence[Launch], weights: Sequence[Tensor], num_times: int
    ) -> list[float]:
        """The median of each launch, of all weights together, in milliseconds, taken in turns."""
        graphs = []
        for launch in launches:
            launch(weights[0])  # libraries load what they need, which a capture forbids
            torch.cuda.synchronize(self._device)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                for weight in weights:
                    launch(weight)
            graphs.append(graph)
        times: list[list[float]] = [[] for _ in launches]
        for _ in range(num_times):
            for graph, those in zip(graphs, times, strict=True):
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record()
                graph.replay()
                end.record()
                end.synchronize()
                those.append(start.elapsed_time(end))
        # What torch's products took in the captures goes with their graphs.
        torch._C._cuda_clearCublasWorkspaces()
        return [sorted(those)[num_times // 2] for those in times]


def _may_run(x: Tensor, weight: Tensor, out: Tensor) -> bool:
    """Whether tensors are as the algorithms were asked for."""
    return (
        x.is_contiguous()
        and weight.is_contiguous()
        and out.stride(1) == 1
        and not any(tensor.data_ptr() % ALIGNMENT for tensor in (x, weight, out))
    )
