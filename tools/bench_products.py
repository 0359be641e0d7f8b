"""Every matrix product of a model at some row counts: torch, our small and our wide one, the floor.

    python tools/bench_products.py [--model 14B] [--rows 16 64] [--products o down] [--json FILE]

One line a product and row count, microseconds; what a step does with the product is part of it: o
and down add the residual, qkv is of x / rms(x) (torch: of x, the next kernel scales), gate_up ends
with SiLU of x / rms(x) (torch: a product, then the ``silu_mul`` kernel). The small and wide product
stand where they take such a shape. Then the floor, the longer of the times of the bytes of W, x and
out at --bandwidth and of the operations at --rate; what the fastest way reaches of it, and in GB/s;
by how much the wide product is faster than the best of the others. "layer" is the sum of a layer's
products, each by its fastest way: its last figure is what having the wide ones gains.

Several layers' weights follow one another in a CUDA graph, so that none comes out of the L2 cache;
the graphs of all ways are launched in turns, and the median counts.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any, NamedTuple

import torch
from bench_gemm import MODELS, NAMES, random

from minisgl_fast.backend.cuda_gemm import SmallGemm
from minisgl_fast.backend.cuda_linear import Linears
from minisgl_fast.backend.cuda_wide import WideGemm
from minisgl_fast.backend.kernel import warm
from minisgl_fast.backend.kernels_table import GEMM_WIDE

CACHE_BYTES = 3 << 29  # of weights in turn, two at least: many times the L2 cache
TIMED_BYTES = 3 << 30  # read in one timing: most of a millisecond
TURNS = 9
EPS = 1e-6
KINDS = ("torch", "small", "wide")
LAYER = NAMES[:4]
Way = Callable[[torch.Tensor], Any]  # of a weight


class Result(NamedTuple):
    """Microseconds of each kind, NaN where there is none."""

    product: str
    rows: int
    times: dict[str, float]
    floor: float
    num_bytes: int

    def best(self, kinds: Sequence[str] = KINDS) -> float:
        """Of the fastest."""
        return min(us for kind, us in self.times.items() if kind in kinds and us == us)


class Ways:
    """How to compute a product, as a step would."""

    def __init__(self, device: torch.device) -> None:
        self._linears = Linears(device, 1, 8)
        self._small = SmallGemm(device)
        self._wide = WideGemm(device)

    def of(self, name: str, rows: int, n: int, k: int) -> dict[str, Way]:
        """By kind; torch first."""
        small, wide = self._small, self._wide
        x, out = random(rows, k), random(rows, n)
        fits_wide = wide.fits(rows, n, k, gated=name == "gate_up")
        fits = {"torch": True, "small": small.fits(rows, n, k), "wide": fits_wide}
        found: dict[str, Way]
        if name == "gate_up":
            found = {
                "torch": lambda w: self._linears.silu_mul(torch.mm(x, w.T, out=out), x, EPS),
                "small": lambda w: small.linear_silu_mul(x, w, EPS),
                "wide": lambda w: wide.linear_silu_mul(x, w, EPS),
            }
        elif name in ("o", "down"):
            found = {
                "torch": lambda w: out.addmm_(x, w.T),
                "small": lambda w: small.linear_add(x, w, out),
                "wide": lambda w: wide.linear_add(x, w, out),
            }
        else:
            eps = EPS if name == "qkv" else None
            found = {
                "torch": lambda w: torch.mm(x, w.T, out=out),
                "small": lambda w: small.linear(x, w, norm_eps=eps, out=out),
                "wide": lambda w: wide.linear(x, w, out, eps),
            }
        return {kind: found[kind] for kind in KINDS if fits[kind]}


def times_us(ways: Sequence[Way], weights: Sequence[torch.Tensor]) -> list[float]:
    """Of one product, each way's median."""
    torch._C._cuda_clearCublasWorkspaces()  # may lie in the memory of graphs that are gone
    weights = [*weights] * -(-TIMED_BYTES // (len(weights) * weights[0].numel() * 2))
    times: list[list[float]] = [[] for _ in ways]
    with torch.cuda.stream(torch.cuda.Stream()):
        graphs = [capture(way, weights) for way in ways]
        for _ in range(TURNS + 1):
            for graph, found in zip(graphs, times, strict=True):
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record()
                graph.replay()
                end.record()
                end.synchronize()
                found.append(start.elapsed_time(end) * 1e3 / len(weights))
    return [median(found[1:]) for found in times]


def capture(way: Way, weights: Sequence[torch.Tensor]) -> torch.cuda.CUDAGraph:
    """A graph of the products with all ``weights``, on the current stream."""
    way(weights[0])
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
        for weight in weights:
            way(weight)
    return graph


def line(results: Sequence[Result], name: str) -> str:
    """The sums of products, each by its fastest way."""
    best, other = (sum(r.best(kinds) for r in results) for kinds in (KINDS, KINDS[:2]))
    floor, num_bytes = sum(r.floor for r in results), sum(r.num_bytes for r in results)
    times = [sum(r.times[kind] for r in results) for kind in KINDS]
    columns = "".join(f"{us:8.1f}" if us == us else f"{'-':>8}" for us in (*times, floor))
    gain = other / (best if len(results) > 1 else results[0].times["wide"]) - 1.0
    end = f"{gain:+8.1%}" if gain == gain else f"{'-':>8}"
    return (
        f"{name:8}{results[0].rows:5}{columns}{floor / best:8.1%}{num_bytes / best / 1e3:7.0f}{end}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=MODELS, default="14B")
    parser.add_argument("--rows", type=int, nargs="+", default=[9, 16, 24, 32, 48, 64])
    parser.add_argument("--products", choices=NAMES, nargs="+", default=list(LAYER))
    parser.add_argument("--bandwidth", type=float, default=4.2, help="TB/s")
    parser.add_argument("--rate", type=float, default=700.0, help="TFLOP/s")
    parser.add_argument("--json", help="write every figure to this file")
    options = parser.parse_args()
    warm(GEMM_WIDE)
    ways = Ways(torch.device("cuda", torch.cuda.current_device()))
    shapes = dict(zip(NAMES, MODELS[options.model][1], strict=True))
    print(f"{options.model}, microseconds of a product")
    titles = ("torch", "small", "wide", "floor", "reached")
    print(f"{'':8}{'rows':>5}" + "".join(f"{i:>8}" for i in titles) + f"{'GB/s':>7}{'gain':>8}")
    results: list[Result] = []
    with torch.inference_mode():
        weights = {
            name: [random(n, k) for _ in range(max(2, CACHE_BYTES // (2 * n * k)))]
            for name, (n, k) in shapes.items()
            if name in options.products
        }
        for rows in options.rows:
            for name, of_name in weights.items():
                n, k = shapes[name]
                found = ways.of(name, rows, n, k)
                times = dict.fromkeys(KINDS, math.nan)
                times.update(zip(found, times_us([*found.values()], of_name), strict=True))
                width = n // 2 if name == "gate_up" else n
                num_bytes = 2 * (n * k + rows * (width + k))
                floor = max(num_bytes / options.bandwidth, 2 * n * k * rows / options.rate) * 1e-6
                results.append(Result(name, rows, times, floor, num_bytes))
                print(line(results[-1:], name), flush=True)
            layer = [
                result for result in results if result.rows == rows and result.product in LAYER
            ]
            if len(layer) == len(LAYER):
                print(line(layer, "layer"), flush=True)
    if options.json:
        with open(options.json, "w") as file:
            json.dump([result._asdict() for result in results], file, indent=1)


if __name__ == "__main__":
    main()
