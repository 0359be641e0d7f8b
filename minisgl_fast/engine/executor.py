"""Executors: a filled plan goes to the device, sampled tokens come back.

``launch`` hands a plan over and returns at once; ``collect`` waits for its tokens. A step with
grammars (``StepPlan.masks``) is launched in two parts: ``launch_forward``, then, while the device
computes the logits, the engine commits the step before and fills ``StepBuffers.masks``, then
``launch_sample``. Every other step is one ``launch``, as if there were no grammars. On a CPU the
step is computed when it is collected, in the engine's one thread: scheduling takes microseconds
there, and a thread of its own would only split torch's OpenMP threads into pools that crowd each
other out (SmolLM2, 8 requests on 2 cores: 36 tokens a second instead of 100).

Rules: a plan's memory belongs to its StepBuffers and is not written between ``launch`` (or
``launch_forward``) and ``collect``, its masks not between ``launch_sample`` and ``collect``; steps
run in the order of their launch; between the two parts of a step nothing else is launched, but
steps launched before are collected.
"""

from __future__ import annotations

import ctypes
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from minisgl_fast.backend.step import StepTensors
from minisgl_fast.engine.grammar import MaskRow
from minisgl_fast.engine.outputs import Output, to_bytes
from minisgl_fast.engine.runner import ModelRunner
from minisgl_fast.progress import Progress
from minisgl_fast.sched.plan import PlanCapacity, StepPlan

FLOAT_SECTIONS = frozenset(
    ("temperature", "top_p", "min_p", "presence", "frequency", "repetition", "bias_value")
)


class StepBuffers:
    """One plan with the host memory it lives in, and the place where its results arrive.

    masks [max_seqs, ceil(vocab_size / 32)] int32: those of ``plan.masks``, one a row;
    ``mask_rows`` are the same memory for those who fill it.
    """

    def __init__(self, capacity: PlanCapacity, vocab_size: int, *, pinned: bool) -> None:
        self.words = torch.zeros(capacity.num_words, dtype=torch.int32, pin_memory=pinned)
        self.plan = StepPlan(self.words.data_ptr(), capacity)
        self.tokens = torch.zeros(capacity.max_seqs, dtype=torch.int32, pin_memory=pinned)
        self.outputs: list[Output] = []  # of plan.spans
        shape = (capacity.max_seqs, -(-vocab_size // 32))
        self.masks = torch.zeros(shape, dtype=torch.int32, pin_memory=pinned)
        num_bytes = self.masks.numel() * 4
        address = self.masks.data_ptr()
        bits = memoryview((ctypes.c_uint8 * num_bytes).from_address(address)).cast("B")
        row_bytes = shape[1] * 4
        self.mask_rows = [
            MaskRow(address + first, bits[first : first + row_bytes])
            for first in range(0, num_bytes, row_bytes)
        ]
        # The scheduler reads the tokens through the buffer protocol, which tensors do not have.
        memory = (ctypes.c_int32 * capacity.max_seqs).from_address(self.tokens.data_ptr())
        self._token_view = memoryview(memory).cast("B").cast("i")

    def collected(self) -> memoryview:
        """The tokens of the plan's samples, int32."""
        return self._token_view[: self.plan.num_samples]

    def collected_outputs(self) -> list[bytes | None]:
        """What the plan's spans brought; to be asked for once, after ``collect``."""
        if not self.outputs:
            return []
        outputs, self.outputs = self.outputs, []
        return to_bytes(outputs)


class Executor(Protocol):
    """What the engine asks of a device.

    takes_masks: whether its steps may have masks.
    """

    takes_masks: bool

    def make_buffers(self, capacity: PlanCapacity, count: int) -> list[StepBuffers]:
        """Memory for ``count`` plans in flight."""

    def launch(self, buffers: StepBuffers) -> None:
        """Start the step of ``buffers.plan``, which has no masks."""

    def launch_forward(self, buffers: StepBuffers) -> None:
        """Start the step of ``buffers.plan`` up to its logits; its masks are not there yet."""

    def launch_sample(self, buffers: StepBuffers) -> None:
        """Start the rest of it: the first ``len(plan.masks)`` rows of ``masks`` are filled."""

    def collect(self, buffers: StepBuffers) -> memoryview:
        """Wait for a launched step; its tokens, int32 [num_samples].

        Then ``buffers.outputs`` are on the host too.
        """

    def close(self) -> None:
        """Wait for what is in flight and let the device go."""


class CpuExecutor:
    """Steps on a CPU, each computed when its tokens are asked for."""

    takes_masks = True

    def __init__(self, runner: ModelRunner) -> None:
        self._runner = runner
        self._launched: dict[int, StepTensors] = {}

    def make_buffers(self, capacity: PlanCapacity, count: int) -> list[StepBuffers]:
        vocab_size = self._runner.model_config.vocab_size
        return [StepBuffers(capacity, vocab_size, pinned=False) for _ in range(count)]

    def launch(self, buffers: StepBuffers) -> None:
        views = plan_views(buffers.words, buffers.plan.capacity)
        self._launched[id(buffers)] = step_tensors(views, Counts.of(buffers.plan))

    def launch_forward(self, buffers: StepBuffers) -> None:
        self.launch(buffers)

    def launch_sample(self, buffers: StepBuffers) -> None:
        self._launched[id(buffers)].masks = buffers.masks

    @torch.inference_mode()
    def collect(self, buffers: StepBuffers) -> memoryview:
        step = self._launched.pop(id(buffers))
        logits = self._runner.forward(step, buffers.plan.histories, buffers.plan.spans)
        tokens = self._runner.sample(step, logits)
        buffers.outputs = self._runner.outputs(buffers.plan.spans, logits, tokens)
        buffers.tokens[: step.num_samples].copy_(tokens)
        return buffers.collected()

    def close(self) -> None:
        self._launched.clear()


def plan_views(words: Tensor, capacity: PlanCapacity) -> dict[str, Tensor]:
    """A view of every section of a plan's words, at its full capacity."""
    views = {
        name: words[offset : offset + length]
        for name, (offset, length) in capacity.offsets().items()
    }
    for name in FLOAT_SECTIONS:
        views[name] = views[name].view(torch.float32)
    return views


class Counts(NamedTuple):
    """How much of each section a step uses, as the host knows it."""

    num_tokens: int
    num_decode: int
    num_seqs: int
    num_samples: int
    num_updates: int
    num_bias: int
    max_q_len: int
    max_context: int

    @classmethod
    def of(cls, plan: StepPlan) -> Counts:
        return cls(*(getattr(plan, name) for name in cls._fields))


def step_tensors(views: dict[str, Tensor], counts: Counts) -> StepTensors:
    """The used part of every section of a plan."""
    tokens, seqs, samples = (
        slice(counts.num_tokens),
        slice(counts.num_seqs),
        slice(counts.num_samples),
    )
    bias, updates = slice(counts.num_bias), slice(counts.num_updates)
    return StepTensors(
        num_tokens=counts.num_tokens,
        num_decode=counts.num_decode,
        num_seqs=counts.num_seqs,
        num_samples=counts.num_samples,
        max_q_len=counts.max_q_len,
        max_context=counts.max_context,
        header=views["header"],
        input_ids=views["input_id"][tokens],
        positions=views["position"][tokens],
        kv_slots=views["kv_slot"][tokens],
        seq_slots=views["seq_slot"][seqs],
        q_start=views["q_start"][: counts.num_seqs + 1],
        context_lens=views["context_len"][seqs],
        sample_rows=views["sample_row"][samples],
        sample_slots=views["sample_slot"][samples],
        sample_positions=views["sample_position"][samples],
        temperature=views["temperature"][samples],
        top_k=views["top_k"][samples],
        top_p=views["top_p"][samples],
        min_p=views["min_p"][samples],
        seed_lo=views["seed_lo"][samples],
        seed_hi=views["seed_hi"][samples],
        presence=views["presence"][samples],
        frequency=views["frequency"][samples],
        repetition=views["repetition"][samples],
        sample_flags=views["sample_flags"][samples],
        mask_rows=views["mask_row"][samples],
        bias_start=views["bias_start"][: counts.num_samples + 1],
        bias_ids=views["bias_id"][bias],
        bias_values=views["bias_value"][bias],
        update_slots=views["update_slot"][updates],
        update_columns=views["update_column"][updates],
        update_pages=views["update_page"][updates],
    )


def make_executor(runner: ModelRunner, max_graph_size: int, progress: Progress) -> Executor:
    """The executor of the runner's device."""
    if runner.device.type == "cuda":
        from minisgl_fast.engine.cuda_executor import CudaExecutor

        return CudaExecutor(runner, max_graph_size, progress)
    return CpuExecutor(runner)
