"""Products of a few rows: ours against cuBLAS, one by one and as the chain of a decode step.

    python tools/bench_gemm.py [--tune 10] [--rows 1 16] [--model 0.6B]

A product's weights are those of all layers in turn, so that nothing comes out of the L2 cache; the
launches of a figure are one CUDA graph, the median of its replays counts. "products" is the chain
of all layers' products, each on the result of the one before; "step" has the other kernels of a
decode step between them. --tune tries many plans a product in such a step, for so many seconds.
--sweep compares only whole steps: cuBLAS with norms that add the residual, cuBLAS that adds it and
norms left to others, and what the engine does.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from random import Random
from typing import Any

import torch
import torch.nn.functional as F

from minisgl_fast.backend.cuda_attention import DecodeAttention, NewTokens
from minisgl_fast.backend.cuda_gemm import Plan, SmallGemm
from minisgl_fast.backend.cuda_linear import Linears
from minisgl_fast.backend.interface import Matrix
from minisgl_fast.backend.kernel import get_kernel

MODELS: dict[str, tuple[int, tuple[tuple[int, int], ...], int]] = {
    # layers; (N, K) of qkv, o, gate_up, down and LM head; query heads (8 key heads of 128)
    "0.6B": (28, ((4096, 1024), (1024, 2048), (6144, 1024), (1024, 3072), (151936, 1024)), 16),
    "4B": (18, ((6144, 2560), (2560, 4096), (19456, 2560), (2560, 9728), (151936, 2560)), 32),
    "8B": (9, ((6144, 4096), (4096, 4096), (24576, 4096), (4096, 12288), (151936, 4096)), 32),
    "14B": (6, ((7168, 5120), (5120, 5120), (34816, 5120), (5120, 17408), (151936, 5120)), 40),
    "32B": (4, ((10240, 5120), (5120, 8192), (51200, 5120), (5120, 25600), (151936, 5120)), 64),
}
Linear = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
NAMES = ("qkv", "o", "gate_up", "down", "lm_head")


def time_us(launches: Sequence[Callable[[], Any]], replays: int = 9) -> float:
    """Microseconds of all of ``launches``, as one graph."""
    torch._C._cuda_clearCublasWorkspaces()  # may lie in the memory of a graph that is gone
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        launches[0]()
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for launch in launches:
                launch()
        times = []
        for _ in range(replays + 2):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) * 1e3)
    return float(sorted(times[2:])[replays // 2])


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16) * 0.03


def single(shape: tuple[int, int], weights: list[torch.Tensor], rows: int, call: Linear) -> float:
    """Microseconds of one product."""
    x = random(rows, shape[1])
    repeat = 8 // len(weights) or 1
    return time_us([partial(call, x, w) for w in weights * repeat]) / (len(weights) * repeat)


class Planned(SmallGemm):
    """With plans of our own for some products."""

    def __init__(self, plans: dict[tuple[int, int], Plan]) -> None:
        super().__init__(torch.device("cuda"))
        self._plans = plans

    def plan(self, num_rows: int, n: int, k: int) -> Plan | None:
        return self._plans.get((n, k)) or super().plan(num_rows, n, k) or Plan(2, 4, 5, 3, 1)


class Step:
    """What a decode step launches, with real attention between the products; for one model."""

    def __init__(self, model: str, rows: int, context: int) -> None:
        from minisgl_fast.backend.kv_layout import layer_shape

        self.rows = rows
        self.num_layers, self.shapes, self.num_heads = MODELS[model]
        shapes = [self.shapes[:4]] * self.num_layers
        self.layers = [[random(n, k) for n, k in layer] for layer in shapes]
        self.head = random(*self.shapes[4])
        pages = context // 64 * rows
        shape = layer_shape(pages, 8, 64, 128)
        self.kv = [torch.randn(shape, device="cuda").bfloat16() for _ in range(self.num_layers)]
        self.table = torch.randperm(pages, device="cuda").int().view(rows, -1)
        self.slots = torch.arange(rows, dtype=torch.int32, device="cuda")
        self.lengths = torch.full_like(self.slots, context)
        self.rope = torch.ones(context, 128, device="cuda")
        self.scale = torch.ones(self.shapes[0][1], dtype=torch.bfloat16, device="cuda")
        self.head_scale = self.scale[:128]
        self.attention = DecodeAttention(self.num_heads, 8, 128, 64)
        self.norm_kernel = get_kernel("rms_norm", "add_rms_norm")
        self.silu_kernel = get_kernel("silu_mul", "silu_mul")

    def attend(
        self,
        qkv: torch.Tensor,
        kv: torch.Tensor,
        real: bool,
        rows: torch.Tensor | None = None,
        eps: float = 0.0,
    ) -> torch.Tensor:
        out = torch.empty(self.rows, self.num_heads * 128, dtype=qkv.dtype, device="cuda")
        if not real:
            return qkv.view(-1)[: out.numel()].view_as(out)
        new = NewTokens(qkv, self.head_scale, self.head_scale, 1e-6, self.rope, rows, eps)
        batch = (self.lengths, self.slots, self.table, self.rows, 0.088)
        self.attention(new, kv, out, *batch, pdl=True)
        return out

    def add_norm(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        out = torch.empty_like(x)
        hidden = x.shape[1]
        self.norm_kernel.launch(
            (len(x),),
            hidden // 8,
            (*(i.data_ptr() for i in (out, x, residual, self.scale)), hidden, 1e-6),
            pdl=True,
        )
        return out

    def fused(self, gemm: SmallGemm, real: bool, head: bool) -> None:
        residual = self.start
        for (qkv, o, gate_up, down), kv in zip(self.layers, self.kv, strict=True):
            y = self.attend(gemm.linear(residual, qkv, norm_eps=1e-6), kv, real)
            gemm.linear_add(y, o, residual)
            gemm.linear_add(gemm.linear_silu_mul(residual, gate_up, 1e-6), down, residual)
        if head:
            gemm.linear(residual, self.head)

    def separate(self, linear: Linear, real: bool, head: bool, *, small: bool = True) -> None:
        residual = self.start
        hidden = residual
        for (qkv, o, gate_up, down), kv in zip(self.layers, self.kv, strict=True):
            y = linear(self.attend(linear(hidden, qkv), kv, real), o)
            hidden = self.add_norm(y, residual) if small else y
            x = linear(hidden, gate_up)
            width = x.shape[1] // 2
            middle = x.view(-1)[: x.numel() // 2].view(-1, width)
            if small:
                middle = torch.empty(self.rows, width, dtype=x.dtype, device="cuda")
                self.silu_kernel.launch(
                    (self.rows, -(-width // 1024)),
                    128,
                    (middle.data_ptr(), x.data_ptr(), 0, width, 0, 0.0),
                    pdl=True,
                )
            y = linear(middle, down)
            hidden = self.add_norm(y, residual) if small else y
        if head:
            linear(hidden, self.head)

    def engine(self, linears: Linears, head: bool) -> None:
        """As model/qwen3.py has it."""
        hidden, norm = self.start, (self.scale, 1e-6)
        for (qkv, o, gate_up, down), kv in zip(self.layers, self.kv, strict=True):
            y, rows, eps = linears.unscaled(hidden, Matrix(qkv, None, norm, unit_norm=True))
            y = self.attend(y, kv, True, rows, eps)
            hidden = linears.linear_add(y, Matrix(o), hidden)
            y = linears.linear_silu_mul(hidden, Matrix(gate_up, None, norm, unit_norm=True))
            hidden = linears.linear_add(y, Matrix(down), hidden)
        if head:
            linears.logits(hidden, Matrix(self.head, None, norm))

    def prepare(self) -> None:
        self.start = random(self.rows, self.shapes[0][1])


def candidates(gemm: SmallGemm, rows: int, n: int, k: int) -> list[Plan]:
    """Plans worth a try."""
    found = []
    for cluster in (1, 2, 4, 8):
        for row_tiles in (1, 2):
            for warps in range(4, 9):
                share = -(-(k // 64) // cluster)
                turns = -(-share // warps)
                if share < warps or turns * warps > 1.34 * share:
                    continue
                for stages in (1, 2, 3, 4, 6, 8):
                    for blocks in (1, 2, 3, 4):
                        plan = Plan(row_tiles, cluster, warps, stages, blocks)
                        grid, shared = gemm._launch_shape(plan, rows, n, k, norm=True)
                        one_tile = grid >= -(-n // 16 // row_tiles) * cluster
                        per_sm = -(-grid // 132)
                        if (one_tile and (stages > turns or stages * 2 < turns)) or grid < 100:
                            continue
                        if per_sm < blocks or per_sm * (shared + 1024) > 228 * 1024:
                            continue
                        if per_sm * warps > 24 or shared > 227 * 1024:
                            continue
                        if not one_tile and per_sm * warps * stages * row_tiles < 20:
                            continue
                        found.append(plan)
    return found


def tune(step: Step, seconds: float) -> None:
    """The best plans of each product, the whole step around it; the best so far is kept."""
    best: dict[tuple[int, int], Plan] = {}

    def measure(shape: tuple[int, int], plan: Plan) -> float:
        gemm = Planned({**best, shape: plan})
        if shape == step.shapes[4]:
            return time_us([lambda: step.fused(gemm, True, True)], replays=3)
        return time_us([lambda: step.fused(gemm, True, False)], replays=3)

    for shape in step.shapes[:4]:
        base = SmallGemm(torch.device("cuda"))
        results = []
        plans = candidates(base, step.rows, *shape)
        Random(0).shuffle(plans)
        usual = Planned({}).plan(step.rows, *shape)
        assert usual is not None
        now = measure(shape, usual)
        deadline = time.monotonic() + seconds / 4
        for plan in plans:
            if time.monotonic() > deadline:
                break
            results.append((measure(shape, plan), plan))
        results.sort(key=lambda pair: pair[0])
        if results and results[0][0] < now:
            best[shape] = results[0][1]
        text = "  ".join(
            f"{us:.1f} {p.row_tiles, p.cluster, p.warps, p.stages, p.blocks_per_sm}"
            for us, p in results[:5]
        )
        print(
            f"tune {shape} rows {step.rows}, now {now:.1f}, {len(results)} of {len(plans)}: {text}",
            flush=True,
        )


def compare(step: Step) -> None:
    """Times of the products one by one, of all of them, and of the step around them."""
    device = torch.device("cuda")
    ours = {
        "early": SmallGemm(device),
        "late": SmallGemm(device, early=False),
        "no pdl": SmallGemm(device, pdl=False),
    }
    rows = step.rows
    all_fit = all(ours["early"].fits(rows, *shape) for shape in step.shapes)
    linears: list[Linear] = [F.linear, *(_linear(one) for one in ours.values())]
    print(f"rows {rows}, us           cuBLAS" + "".join(f"{name:>9}" for name in ours))
    columns = [[layer[i] for layer in step.layers] for i in range(4)] + [[step.head]]
    for name, shape, weights in zip(NAMES, step.shapes, columns, strict=True):
        times = [single(shape, weights, rows, linear) for linear in linears]
        rate = shape[0] * shape[1] * 2 / times[1] / 1e6
        print(f"{rows:3} {name:20}" + "".join(f"{us:9.2f}" for us in times), f"  {rate:.2f} TB/s")

    def line(name: str, runs: Iterable[Callable[[], None]]) -> None:
        times = [time_us([run]) for run in runs]
        blank = "        -" * (4 - len(times))
        print(f"{rows:3} {name:20}" + blank + "".join(f"{us:9.1f}" for us in times), flush=True)

    for real, head, name in ((False, False, "products"), (False, True, "products + head")):
        line(name, [partial(step.separate, f, real, head, small=False) for f in linears])
    line("step, 9 launches", [partial(step.separate, f, True, True) for f in linears])
    if all_fit:
        line("fused products", [partial(step.fused, g, False, False) for g in ours.values()])
        line("step, 6 launches", [partial(step.fused, g, True, True) for g in ours.values()])


def sweep(step: Step) -> None:
    """Whole steps by who computes the products, one line."""
    linears = Linears(torch.device("cuda"), step.rows, step.shapes[4][0])
    blas = Linears(torch.device("cuda"), step.rows, step.shapes[4][0])
    blas._gemm.fits = lambda *_: False  # type: ignore[method-assign]
    times = []
    times.append(time_us([partial(step.separate, F.linear, True, True)]))
    times.append(time_us([partial(step.engine, blas, True)]))
    times.append(time_us([partial(step.engine, linears, True)]))
    print(f"{step.rows:4}" + "".join(f"{us:10.1f}" for us in times), flush=True)


def _linear(gemm: SmallGemm) -> Linear:
    """Ours where it fits, else cuBLAS."""

    def linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return gemm.linear(x, weight) if gemm.fits(len(x), *weight.shape) else F.linear(x, weight)

    return linear


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tune", type=float, default=0.0, help="seconds for a model and row count")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    parser.add_argument("--model", choices=MODELS, nargs="+", default=list(MODELS))
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--sweep", action="store_true")
    options = parser.parse_args()
    with torch.inference_mode():
        for model in options.model:
            if options.sweep:
                print(f"{model}: rows, us of a step with cuBLAS, cuBLAS that adds, the engine's")
            for rows in options.rows:
                step = Step(model, rows, options.context)
                step.prepare()
                if options.sweep:
                    sweep(step)
                    continue
                print(f"{model}, {step.num_layers} layers")
                if options.tune:
                    tune(step, options.tune)
                    continue
                compare(step)
                del step
                torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
