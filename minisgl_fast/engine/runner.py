"""ModelRunner: the model with its cache and per-slot state, on one device.

``forward`` and ``sample`` compute one step from its tensors, ``outputs`` what it brings beside
tokens; how a filled plan gets to the device and its results back is the executor's part:
executor.py for a CPU, cuda_executor.py for a GPU.

Rules: every size is fixed here, before the first request; nothing here looks at a sampled token.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from minisgl_fast.backend import make_backend, pick_device
from minisgl_fast.backend.interface import ModelShape
from minisgl_fast.backend.reference import pick_num_threads
from minisgl_fast.backend.step import DeviceState, StepTensors
from minisgl_fast.config import Config
from minisgl_fast.engine.memory import plan_sizes
from minisgl_fast.engine.outputs import Output, compute
from minisgl_fast.errors import ConfigError
from minisgl_fast.model.config import ModelConfig
from minisgl_fast.model.qwen3 import Qwen3
from minisgl_fast.model.weights import dummy_weights, load_weights
from minisgl_fast.progress import Progress
from minisgl_fast.sched.plan import Span

# (slot, token ids, how many of them are the prompt): StepPlan.histories
History = tuple[int, "array[int]", int]


class ModelRunner:
    """``sizes``, ``dtype`` and ``device`` are fixed at start."""

    def __init__(
        self, config: Config, model_path: Path, vocab_limit: int, progress: Progress
    ) -> None:
        self.model_config = ModelConfig.load(model_path)
        self.device = pick_device(config.device)
        self.backend = make_backend(self.device)
        self.dtype = self.backend.pick_dtype(config.dtype, self.model_config.dtype)
        torch.set_num_threads(config.num_threads or pick_num_threads())
        self._model = self._load_model(config, model_path, progress)
        self._vocab_limit = min(vocab_limit, self.model_config.vocab_size)
        self.sizes = plan_sizes(config, self.model_config, self.dtype, self.device)
        self._allocate(progress)

    def _load_model(self, config: Config, path: Path, progress: Progress) -> Qwen3:
        model, place = self.model_config, (self.dtype, self.device)
        try:
            if config.dummy_weight:
                weights = dummy_weights(model, *place)
            else:
                weights = load_weights(path, model, *place, progress)
            return Qwen3(model, weights, self.backend)
        except torch.OutOfMemoryError as error:
            raise ConfigError(
                "Out of GPU memory for the weights. Take a smaller model, or end what else uses "
                "the GPU."
            ) from error

    def _allocate(self, progress: Progress) -> None:
        """The KV cache, the per-slot state and the backend's own memory."""
        model, sizes = self.model_config, self.sizes
        try:
            self._kv = self.backend.allocate_kv(
                model.num_layers,
                sizes.num_pages,
                model.num_kv_heads,
                sizes.page_size,
                model.head_dim,
                self.dtype,
            )
            self.state = DeviceState(
                max_seqs=sizes.max_seqs,
                max_pages_per_seq=sizes.max_pages_per_seq,
                vocab_size=model.vocab_size,
                device=self.device,
            )
            shape = ModelShape(
                num_heads=model.num_heads,
                num_kv_heads=model.num_kv_heads,
                head_dim=model.head_dim,
                hidden_size=model.hidden_size,
                vocab_size=model.vocab_size,
                qk_norm=model.qk_norm,
                page_size=sizes.page_size,
                max_seqs=sizes.max_seqs,
            )
            self.backend.prepare(shape, progress)
        except torch.OutOfMemoryError as error:
            raise ConfigError(
                f"Out of GPU memory for {sizes.num_pages} KV pages of {sizes.page_size} tokens. "
                "Lower --memory-ratio, --num-pages or --max-running-requests."
            ) from error

    def forward(
        self, step: StepTensors, histories: Sequence[History], spans: Sequence[Span] = ()
    ) -> Tensor:
        """The model's part of a step; logits [num_samples, vocab], valid until the next one.

        ``spans``: what ``outputs`` will be asked for.
        """
        self.backend.apply_updates(step, self.state)
        for slot, tokens, num_prompt in histories:
            self.backend.reset_counts(self.state, slot, tokens, num_prompt)
        # Else every token is sampled, in order.
        rows = step.sample_rows if step.num_samples < step.num_tokens else None
        if not any(span.sample < 0 for span in spans):
            self._hidden = None
            return self._model.logits(self._model.forward(step, self.state, self._kv, rows))
        hidden = self._hidden = self._model.forward(step, self.state, self._kv)
        return self._model.logits(hidden if rows is None else hidden.index_select(0, rows))

    def sample(self, step: StepTensors, logits: Tensor) -> Tensor:
        """The rest of it; the sampled tokens [num_samples] int32 on the device.

        ``logits`` are left as they are.
        """
        return self.backend.sample(logits, step, self.state, self._vocab_limit)

    def outputs(self, spans: Sequence[Span], logits: Tensor, tokens: Tensor) -> list[Output]:
        """What the step of the latest ``forward`` brings beside tokens; after ``sample``.

        The copies to the host are under way: ``engine.outputs.to_bytes`` reads them when the device
        has come that far. Spans of prompts need the ``forward`` to have run by itself, not as part
        of a graph.
        """
        if not spans:
            return []
        return compute(spans, self._model, self._hidden, logits, tokens, self._vocab_limit)
