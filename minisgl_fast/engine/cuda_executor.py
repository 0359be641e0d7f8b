"""CudaExecutor: plans to a GPU and tokens back, pure-decode steps as CUDA graphs.

A step is one copy of the plan's words from pinned memory, the work, one copy of the tokens into it
and an event; the host never waits in between. All plans land in the same device buffer: the
copy of step N+1 is behind step N on the stream, so N has read its words by then.

A pure-decode step of up to ``--cuda-graph-max-bs`` rows is one graph launch from page-table updates
to logits, and one launch of the sampler. A graph is captured for 1, 2, 4, 8 and then every 8th
batch size; a step is padded with rows that touch nothing (``StepPlan.pad``) and are not sampled.
"""

from __future__ import annotations

import torch
from torch import Tensor

from minisgl_fast.backend.step import StepTensors
from minisgl_fast.engine.cuda_copy import UsedWords, WordCopier
from minisgl_fast.engine.executor import Counts, StepBuffers, plan_views, step_tensors
from minisgl_fast.engine.runner import ModelRunner
from minisgl_fast.errors import ConfigError
from minisgl_fast.progress import Progress
from minisgl_fast.sched.plan import PlanCapacity

STAGE = "Capturing CUDA graphs"


class CudaExecutor:
    """``engine.executor.Executor`` for one GPU, on torch's current stream."""

    takes_masks = True

    def __init__(self, runner: ModelRunner, max_graph_size: int, progress: Progress) -> None:
        self._runner = runner
        self._graph_sizes = graph_sizes(min(max_graph_size, runner.sizes.max_seqs))
        self._progress = progress
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}
        self._views: dict[str, Tensor] = {}
        self._decode_steps: dict[int, StepTensors] = {}

    def make_buffers(self, capacity: PlanCapacity, count: int) -> list[StepBuffers]:
        device = self._runner.device
        self._words = torch.zeros(capacity.num_words, dtype=torch.int32, device=device)
        self._views = plan_views(self._words, capacity)
        vocab_size = self._runner.model_config.vocab_size
        buffers = [StepBuffers(capacity, vocab_size, pinned=True) for _ in range(count)]
        self._masks = torch.zeros_like(buffers[0].masks, device=device)
        self._events = {id(one): torch.cuda.Event() for one in buffers}
        self._copy = WordCopier()
        self._used_words = UsedWords(capacity)
        self._capture(buffers[0])
        return buffers

    def launch(self, buffers: StepBuffers) -> None:
        self.launch_forward(buffers)
        self.launch_sample(buffers)

    @torch.inference_mode()
    def launch_forward(self, buffers: StepBuffers) -> None:
        plan = buffers.plan
        size = self._graph_size(buffers)
        if size:
            plan.pad(size)
        used = self._used_words(plan, size or plan.num_tokens)
        self._copy(self._words, buffers.words, used)
        if size:
            self._graphs[size].replay()
            step = self._decode_step(plan.num_seqs, plan.capacity)
            logits = self._logits[: plan.num_seqs]
        else:
            step = step_tensors(self._views, Counts.of(plan))
            logits = self._runner.forward(step, plan.histories, plan.spans)
        self._forwarded = step, logits

    @torch.inference_mode()
    def launch_sample(self, buffers: StepBuffers) -> None:
        step, logits = self._forwarded
        plan = buffers.plan
        num_masks = len(plan.masks)
        step.masks = None
        if num_masks:
            self._masks[:num_masks].copy_(buffers.masks[:num_masks], non_blocking=True)
            step.masks = self._masks
        tokens = self._runner.sample(step, logits)
        buffers.outputs = self._runner.outputs(plan.spans, logits, tokens)
        if step.num_samples:
            self._copy(buffers.tokens, tokens, [(0, step.num_samples)])
        self._events[id(buffers)].record()

    def collect(self, buffers: StepBuffers) -> memoryview:
        self._events[id(buffers)].synchronize()
        return buffers.collected()

    def close(self) -> None:
        torch.cuda.synchronize(self._runner.device)
        self._graphs.clear()
        _forget_workspaces()

    def _graph_size(self, buffers: StepBuffers) -> int:
        """The graph that takes this step, 0 for none."""
        plan = buffers.plan
        if plan.num_tokens != plan.num_decode or plan.histories:
            return 0
        return next((size for size in self._graph_sizes if size >= plan.num_seqs), 0)

    def _decode_step(self, num_rows: int, capacity: PlanCapacity) -> StepTensors:
        """The tensors of every decode step of so many rows; lengths are for the device to read."""
        step = self._decode_steps.get(num_rows)
        if step is None:
            rows = (num_rows, num_rows, num_rows, num_rows)
            counts = Counts(*rows, capacity.max_updates, capacity.max_bias, 0, 0)
            step = self._decode_steps[num_rows] = step_tensors(self._views, counts)
        return step

    def _capture(self, buffers: StepBuffers) -> None:
        try:
            self._capture_all(buffers)
        except torch.OutOfMemoryError as error:
            raise ConfigError(
                "Out of GPU memory for CUDA graphs. Lower --memory-ratio, --num-pages or "
                "--cuda-graph-max-bs."
            ) from error

    @torch.inference_mode()
    def _capture_all(self, buffers: StepBuffers) -> None:
        """Capture all graphs, the largest first: the smaller ones fit in its memory."""
        _forget_workspaces()
        pool = None
        total = len(self._graph_sizes)
        for index, size in enumerate(reversed(self._graph_sizes)):
            self._progress(STAGE, index, total)
            buffers.plan.pad(size)
            self._words.copy_(buffers.words)
            step = self._decode_step(size, buffers.plan.capacity)
            # Once eagerly: libraries and kernels set themselves up outside a capture.
            logits = self._runner.forward(step, ())
            torch.cuda.synchronize(self._runner.device)
            if pool is None:
                self._logits = logits  # of all graphs: the backend has one place for them
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
                self._runner.forward(step, ())
            pool = pool or graph.pool()
            self._graphs[size] = graph
        if total:
            self._progress(STAGE, total, total)


def _forget_workspaces() -> None:
    """Have cuBLAS take new workspaces: what it took in a capture goes with the graphs."""
    torch._C._cuda_clearCublasWorkspaces()


def graph_sizes(largest: int) -> list[int]:
    """1, 2, 4, 8 and every 8th size up to ``largest``, which is in the list itself."""
    sizes = [size for size in (1, 2, 4, *range(8, largest + 1, 8)) if size <= largest]
    return sizes if not sizes or sizes[-1] == largest else [*sizes, largest]
