"""Every matrix product of a model at many row counts: torch's choices, cuBLASLt's, ours, the floor.

    python tools/bench_products.py --model 14B [--json FILE] [--seconds 60]

One line a product and row count, microseconds: torch's default, torch with cuBLASLt preferred, the
best of cuBLASLt's own candidates with W stored [out, in] and with W stored [in, out], and the small
products of this project where they take such a shape. Then what the best of these reaches: TB/s of
the bytes of W, x and out, TFLOP/s, and its share of the floor, the longer of the two times at
--bandwidth and --rate. Weights take turns, so that nothing comes out of the L2 cache. A figure is
the median of replays of a CUDA graph; candidates are first compared by launches behind a sleeping
kernel. All graphs and warm-ups run on one stream, whose workspaces therefore outlive the graphs.
When --seconds are over, what is left is left out.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from bench_gemm import MODELS, NAMES, random

from minisgl_fast.backend.cublaslt import Algorithm, CublasLt, Product, load_cublaslt
from minisgl_fast.backend.cuda_gemm import SmallGemm

ROWS = (16, 32, 64, 128, 192, 256, 16384, 4096, 24, 512, 8, 1)  # what matters most first
MAX_HEAD_ROWS = 256  # only sampled tokens meet the LM head
CACHE_BYTES = 200 << 20  # of weights in turn: over three times the L2 cache
MAX_CANDIDATES = 16
SLEEP_CYCLES = 400_000  # 0.2 ms in which launches queue up
Launch = Callable[[], Any]
Result = dict[str, Any]


class Bench:
    """One stream, one cuBLASLt, one small product."""

    def __init__(self, bandwidth: float, rate: float) -> None:
        device = torch.device("cuda", torch.cuda.current_device())
        self.stream = torch.cuda.Stream()
        self.lt: CublasLt | None = load_cublaslt(device)
        self.gemm = SmallGemm(device)
        self._bandwidth = bandwidth * 1e12
        self._rate = rate * 1e12

    def graph_us(self, launches: Sequence[Launch], replays: int = 5) -> float:
        """Microseconds of a launch: the median replay of a graph of all of them."""
        with torch.cuda.stream(self.stream):
            launches[0]()
            self.stream.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=self.stream):
                for launch in launches:
                    launch()
            graph.replay()
            times = [self._elapsed_us([graph.replay]) for _ in range(replays)]
        return sorted(times)[replays // 2] / len(launches)

    def quick_us(self, launches: Sequence[Launch]) -> float:
        """The same without a graph: launches queue up behind a sleeping kernel."""
        with torch.cuda.stream(self.stream):
            launches[0]()
            times = [self._elapsed_us(launches, sleep=True) for _ in range(2)]
        return min(times) / len(launches)

    def _elapsed_us(self, launches: Sequence[Launch], sleep: bool = False) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        if sleep:
            torch.cuda._sleep(SLEEP_CYCLES)
        start.record()
        for launch in launches:
            launch()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) * 1e3

    def best_candidate(
        self, product: Product, x: torch.Tensor, weights: Sequence[torch.Tensor], repeat: int
    ) -> tuple[float, str]:
        """(microseconds, rank of how many and configuration) of cuBLASLt's fastest algorithm."""
        if self.lt is None:
            return float("nan"), "-"
        out = torch.empty(product.num_rows, product.n, dtype=x.dtype, device="cuda")
        found: list[tuple[float, int]] = []
        algorithms = self.lt.algorithms(product, MAX_CANDIDATES)
        runs = [self._runs(product, one, x, weights, out, repeat) for one in algorithms]
        for rank, launches in enumerate(runs):
            found.append((self.quick_us(launches), rank))
        if not found:
            return float("nan"), "-"
        # The first three again, as graphs.
        best = min((self.graph_us(runs[rank]), rank) for _, rank in sorted(found)[:3])
        text = self.lt.describe(algorithms[best[1]])
        return best[0], f"{best[1]}/{len(algorithms)} {text}"

    def _runs(
        self,
        product: Product,
        algorithm: Algorithm,
        x: torch.Tensor,
        weights: Sequence[torch.Tensor],
        out: torch.Tensor,
        repeat: int,
    ) -> list[Launch]:
        assert self.lt is not None
        return [
            partial(self.lt.run, product, algorithm, x, weight, out, add=False)
            for weight in [*weights] * repeat
        ]

    def line(self, name: str, rows: int, n: int, k: int, weights: list[torch.Tensor]) -> Result:
        """Measure one product and print its line."""
        x = random(rows, k)
        repeat = max(1, (8 if rows <= 512 else 2) // len(weights))
        every = weights * repeat
        result: Result = {"product": name, "rows": rows, "n": n, "k": k}
        for library in ("cublas", "cublaslt"):
            torch.backends.cuda.preferred_blas_library(library)
            result[f"torch_{library}"] = self.graph_us([partial(F.linear, x, w) for w in every])
        torch.backends.cuda.preferred_blas_library("default")
        turned = [w.view(k, n) for w in weights]
        for layout, matrices in (("out_in", weights), ("in_out", turned)):
            product = Product(rows, n, k, n, layout == "in_out")
            us, choice = self.best_candidate(product, x, matrices, repeat)
            result[f"lt_{layout}"], result[f"choice_{layout}"] = us, choice
        result["ours"] = float("nan")
        if self.gemm.fits(rows, n, k):
            result["ours"] = self.graph_us([partial(self.gemm.linear, x, w) for w in every])
        self._print(result)
        return result

    def _print(self, result: Result) -> None:
        rows, n, k = result["rows"], result["n"], result["k"]
        columns = ("torch_cublas", "torch_cublaslt", "lt_out_in", "lt_in_out", "ours")
        times = [result[name] for name in columns]
        best = min(time for time in times if time == time)
        num_bytes, operations = 2 * (n * k + rows * (n + k)), 2 * n * k * rows
        floor = 1e6 * max(num_bytes / self._bandwidth, operations / self._rate)
        result["floor"] = floor
        print(
            f"{result['product']:8}{rows:6}"
            + "".join(f"{time:10.1f}" if time == time else "         -" for time in times)
            + f"{num_bytes / best / 1e6:8.2f}{operations / best / 1e6:7.0f}{floor / best:7.1%}"
            + f"  {result['choice_out_in']}",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=MODELS, default="14B")
    parser.add_argument("--rows", type=int, nargs="+", default=list(ROWS))
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--bandwidth", type=float, default=4.45, help="TB/s")
    parser.add_argument("--rate", type=float, default=750.0, help="TFLOP/s")
    parser.add_argument("--json", help="write every figure to this file")
    options = parser.parse_args()
    deadline = time.monotonic() + options.seconds
    bench = Bench(options.bandwidth, options.rate)
    version = "none" if bench.lt is None else bench.lt.version
    print(f"{options.model}, cuBLASLt {version}, microseconds of a product")
    print(
        f"{'':8}{'rows':>6}{'torch':>10}{'torch lt':>10}{'lt [o,i]':>10}{'lt [i,o]':>10}"
        f"{'ours':>10}{'TB/s':>8}{'TFLOP':>7}{'floor':>7}  rank of lt [o,i], its configuration"
    )
    results: list[Result] = []
    shapes = list(zip(NAMES, MODELS[options.model][1], strict=True))
    # All products of a row count, then the next count: the first ones matter most.
    with torch.inference_mode():
        weights = {
            name: [random(n, k) for _ in range(max(1, CACHE_BYTES // (2 * n * k)))]
            for name, (n, k) in shapes
        }
        for rows in options.rows:
            for name, (n, k) in shapes:
                if name == "lm_head" and rows > MAX_HEAD_ROWS:
                    continue
                if time.monotonic() > deadline:
                    print(f"no time for {name} at {rows} rows")
                    continue
                results.append(bench.line(name, rows, n, k, weights[name]))
            if options.json:
                with open(options.json, "w") as file:
                    json.dump(results, file, indent=1)


if __name__ == "__main__":
    main()
