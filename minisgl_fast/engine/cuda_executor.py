"""CudaExecutor: plans to a GPU and tokens back, pure-decode steps as CUDA graphs.

A step is one copy of the plan's words to the device, the work, one copy of the tokens into pinned
memory and an event; the host never waits in between. All plans land in the same device buffer: the
copy of step N+1 is behind step N on the stream, so N has read its words by then.

A pure-decode step of up to ``--cuda-graph-max-bs`` rows is one graph launch: page-table updates,
embedding, layers, sampling. A graph is captured for 1, 2, 4, 8 and then every 8th batch size; a
step is padded with rows that touch nothing (``StepPlan.pad``).
"""

from __future__ import annotations

import torch
from torch import Tensor

from minisgl_fast.engine.executor import Counts, StepBuffers, plan_views, step_tensors
from minisgl_fast.engine.runner import ModelRunner
from minisgl_fast.progress import Progress
from minisgl_fast.sched.plan import PlanCapacity

STAGE = "Capturing CUDA graphs"


class CudaExecutor:
    """``engine.executor.Executor`` for one GPU, on torch's current stream."""

    def __init__(self, runner: ModelRunner, max_graph_size: int, progress: Progress) -> None:
        self._runner = runner
        self._graph_sizes = graph_sizes(min(max_graph_size, runner.sizes.max_seqs))
        self._progress = progress
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}
        self._views: dict[str, Tensor] = {}

    def make_buffers(self, capacity: PlanCapacity, count: int) -> list[StepBuffers]:
        device = self._runner.device
        self._words = torch.zeros(capacity.num_words, dtype=torch.int32, device=device)
        self._tokens = torch.zeros(capacity.max_seqs, dtype=torch.int32, device=device)
        self._views = plan_views(self._words, capacity)
        buffers = [StepBuffers(capacity, pinned=True) for _ in range(count)]
        self._events = {id(one): torch.cuda.Event() for one in buffers}
        self._capture(buffers[0])
        return buffers

    @torch.inference_mode()
    def launch(self, buffers: StepBuffers) -> None:
        plan = buffers.plan
        num_samples = plan.num_samples
        size = self._graph_size(buffers)
        if size:
            plan.pad(size)
        self._words.copy_(buffers.words, non_blocking=True)
        if size:
            self._graphs[size].replay()
        else:
            step = step_tensors(self._views, Counts.of(plan))
            tokens = self._runner.run(step, plan.histories)
            self._tokens[:num_samples].copy_(tokens)
        buffers.tokens.copy_(self._tokens, non_blocking=True)
        self._events[id(buffers)].record()

    def collect(self, buffers: StepBuffers) -> memoryview:
        self._events[id(buffers)].synchronize()
        return buffers.collected()

    def close(self) -> None:
        torch.cuda.synchronize(self._runner.device)
        self._graphs.clear()

    def _graph_size(self, buffers: StepBuffers) -> int:
        """The graph that takes this step, 0 for none."""
        plan = buffers.plan
        if plan.num_tokens != plan.num_decode or plan.histories:
            return 0
        return next((size for size in self._graph_sizes if size >= plan.num_seqs), 0)

    @staticmethod
    def _graph_counts(size: int, capacity: PlanCapacity) -> Counts:
        """Those of every decode step of ``size`` rows; lengths are for the device to read."""
        rows = (size, size, size, size)
        return Counts(*rows, capacity.max_updates, capacity.max_bias, 0, 0)

    @torch.inference_mode()
    def _capture(self, buffers: StepBuffers) -> None:
        """Capture all graphs, the largest first: the smaller ones fit in its memory."""
        pool = None
        total = len(self._graph_sizes)
        for index, size in enumerate(reversed(self._graph_sizes)):
            self._progress(STAGE, index, total)
            buffers.plan.pad(size)
            self._words.copy_(buffers.words)
            step = step_tensors(self._views, self._graph_counts(size, buffers.plan.capacity))
            if pool is None:  # once eagerly: libraries set up their workspaces outside a capture
                self._runner.run(step, ())
                torch.cuda.synchronize(self._runner.device)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
                self._tokens[:size].copy_(self._runner.run(step, ()))
            pool = pool or graph.pool()
            self._graphs[size] = graph
        if total:
            self._progress(STAGE, total, total)


def graph_sizes(largest: int) -> list[int]:
    """1, 2, 4, 8 and every 8th size up to ``largest``, which is in the list itself."""
    sizes = [size for size in (1, 2, 4, *range(8, largest + 1, 8)) if size <= largest]
    return sizes if not sizes or sizes[-1] == largest else [*sizes, largest]
