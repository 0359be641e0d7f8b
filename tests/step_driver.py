"""Builds steps by hand, as the scheduler and the runner would, over randomly permuted pages."""

from __future__ import annotations

import random
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch

from minisgl_fast.backend import make_backend, pick_device
from minisgl_fast.backend.interface import Backend, ModelShape
from minisgl_fast.backend.reference import ReferenceBackend
from minisgl_fast.backend.step import DeviceState, StepTensors
from minisgl_fast.model.config import ModelConfig
from minisgl_fast.model.qwen3 import Qwen3
from minisgl_fast.model.weights import LayerWeights, load_weights
from minisgl_fast.progress import silent

SAMPLE_DEFAULTS: dict[str, float] = {
    "temperature": 0.0,
    "top_k": 0,
    "top_p": 1.0,
    "min_p": 0.0,
    "seed_lo": 0,
    "seed_hi": 0,
    "presence": 0.0,
    "frequency": 0.0,
    "repetition": 1.0,
    "sample_flags": 0,
    "mask_rows": 0,
}
# Parameters that cut a distribution, or not.
FILTERS: dict[str, dict[str, float]] = {
    "plain": {},
    "cold": {"temperature": 0.5},
    "hot": {"temperature": 3.0},
    "top_k": {"top_k": 7},
    "top_p": {"top_p": 0.8},
    "min_p": {"min_p": 0.1},
    "all": {"temperature": 1.5, "top_k": 20, "top_p": 0.9, "min_p": 0.02},
}
FLOAT_FIELDS = ("temperature", "top_p", "min_p", "presence", "frequency", "repetition")


def int32(values: list[int]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def to_cuda(step: StepTensors) -> StepTensors:
    """The same step on the GPU."""
    values = {one.name: getattr(step, one.name) for one in fields(step)}
    moved = {name: x.cuda() for name, x in values.items() if isinstance(x, torch.Tensor)}
    return replace(step, **moved)


def make_step(
    *,
    input_ids: list[int] = (),  # type: ignore[assignment]
    positions: list[int] = (),  # type: ignore[assignment]
    kv_slots: list[int] = (),  # type: ignore[assignment]
    seq_slots: list[int] = (),  # type: ignore[assignment]
    q_lens: list[int] = (),  # type: ignore[assignment]
    context_lens: list[int] = (),  # type: ignore[assignment]
    num_decode: int = 0,
    sample_rows: list[int] = (),  # type: ignore[assignment]
    sample_slots: list[int] = (),  # type: ignore[assignment]
    sample_positions: list[int] = (),  # type: ignore[assignment]
    params: list[dict[str, float]] | None = None,
    biases: list[dict[int, float]] | None = None,
    updates: list[tuple[int, int, int]] = (),  # type: ignore[assignment]
) -> StepTensors:
    """A step from plain lists; ``params`` and ``biases`` hold one dict per sample."""
    num_samples = len(sample_slots)
    params = params or [{}] * num_samples
    biases = biases or [{}] * num_samples
    columns: dict[str, Any] = {}
    for name, default in SAMPLE_DEFAULTS.items():
        dtype = torch.float32 if name in FLOAT_FIELDS else torch.int32
        columns[name] = torch.tensor([p.get(name, default) for p in params], dtype=dtype)
    starts = [0]
    for length in q_lens:
        starts.append(starts[-1] + length)
    bias_start = [0]
    for bias in biases:
        bias_start.append(bias_start[-1] + len(bias))
    return StepTensors(
        num_tokens=len(input_ids),
        num_decode=num_decode,
        num_seqs=len(seq_slots),
        num_samples=num_samples,
        max_q_len=max(q_lens, default=0),
        max_context=max(context_lens[num_decode:], default=0),
        header=int32(
            [0, len(input_ids), num_decode, len(seq_slots), num_samples, len(updates)]
            + [bias_start[-1], 0, 0, 0, 0, 0, 0, 0, 0, 0]
        ),
        input_ids=int32(list(input_ids)),
        positions=int32(list(positions)),
        kv_slots=int32(list(kv_slots)),
        seq_slots=int32(list(seq_slots)),
        q_start=int32(starts),
        context_lens=int32(list(context_lens)),
        sample_rows=int32(list(sample_rows)),
        sample_slots=int32(list(sample_slots)),
        sample_positions=int32(list(sample_positions or [0] * num_samples)),
        bias_start=int32(bias_start),
        bias_ids=int32([id for bias in biases for id in bias]),
        bias_values=torch.tensor([v for bias in biases for v in bias.values()]).float(),
        update_slots=int32([u[0] for u in updates]),
        update_columns=int32([u[1] for u in updates]),
        update_pages=int32([u[2] for u in updates]),
        **columns,
    )


def on_device(step: StepTensors, device: torch.device) -> StepTensors:
    """The step with its tensors moved."""
    moved = {
        one.name: value.to(device) if isinstance(value, torch.Tensor) else value
        for one in fields(step)
        if (value := getattr(step, one.name)) is not None
    }
    return StepTensors(**moved)


@dataclass
class Sequence:
    tokens: list[int]
    num_computed: int = 0
    pages: list[int] = field(default_factory=list)
    num_sent_pages: int = 0


class Driver:
    """A model with its cache, and sequences by slot."""

    def __init__(
        self,
        model: Qwen3,
        config: ModelConfig,
        *,
        page_size: int = 4,
        num_pages: int = 96,
        max_seqs: int = 16,
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
        backend: Backend | None = None,
    ) -> None:
        self.model = model
        self.backend = backend or ReferenceBackend()
        self.page_size = page_size
        self.kv = self.backend.allocate_kv(
            config.num_layers, num_pages, config.num_kv_heads, page_size, config.head_dim, dtype
        )
        for index in range(config.num_layers):  # stale contents must not matter
            self.kv.layer(index).normal_(std=100.0)
        self.device = self.kv.layer(0).device
        self.state = DeviceState(max_seqs, num_pages, config.vocab_size, self.device)
        self.state.page_table.random_(0, num_pages)
        self.free_pages = list(range(num_pages))
        random.Random(seed).shuffle(self.free_pages)
        self.sequences: dict[int, Sequence] = {}

    @classmethod
    def load(
        cls,
        path: Any,
        dtype: torch.dtype = torch.float32,
        *,
        device: str = "cpu",
        page_size: int = 4,
        max_seqs: int = 16,
        **options: Any,
    ) -> Driver:
        config = ModelConfig.load(path)
        backend = make_backend(pick_device(device))
        shape = ModelShape(
            num_heads=config.num_heads,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            hidden_size=config.hidden_size,
            vocab_size=config.vocab_size,
            qk_norm=config.qk_norm,
            page_size=page_size,
            max_seqs=max_seqs,
        )
        backend.prepare(shape, silent)
        model = Qwen3(config, load_weights(path, config, dtype, pick_device(device)), backend)
        sizes = {"page_size": page_size, "max_seqs": max_seqs}
        return cls(model, config, dtype=dtype, backend=backend, **sizes, **options)

    def add(self, slot: int, tokens: list[int], shared_with: int | None = None) -> None:
        """A new sequence; ``shared_with`` names a slot whose full computed pages it reuses."""
        sequence = Sequence(list(tokens))
        if shared_with is not None:
            other = self.sequences[shared_with]
            common = 0
            for mine, theirs in zip(tokens[:-1], other.tokens[: other.num_computed], strict=False):
                if mine != theirs:
                    break
                common += 1
            sequence.pages = other.pages[: common // self.page_size]
            sequence.num_computed = len(sequence.pages) * self.page_size
        self.sequences[slot] = sequence

    def step(self, chunks: list[tuple[int, int]], use_last_token: bool = False) -> StepTensors:
        """The step that computes the next n tokens of each (slot, n), decode rows first."""
        num_decode = sum(n == 1 for _, n in chunks)
        assert all(n == 1 for _, n in chunks[:num_decode]), "decode rows come first"
        columns: dict[str, list[Any]] = {
            name: []
            for name in ("input_ids", "positions", "kv_slots", "seq_slots", "q_lens")
            + ("context_lens", "sample_rows", "sample_slots", "sample_positions", "updates")
        }
        for slot, n in chunks:
            sequence = self.sequences[slot]
            start, end = sequence.num_computed, sequence.num_computed + n
            assert end <= len(sequence.tokens)
            while len(sequence.pages) * self.page_size < end:
                sequence.pages.append(self.free_pages.pop())
            for column in range(sequence.num_sent_pages, len(sequence.pages)):
                columns["updates"].append((slot, column, sequence.pages[column]))
            sequence.num_sent_pages = len(sequence.pages)
            new = sequence.tokens[start:end]
            if use_last_token and n == 1:
                self.state.last_token[slot] = new[0]
                new = [-1]
            columns["input_ids"] += new
            columns["positions"] += range(start, end)
            for position in range(start, end):
                page = sequence.pages[position // self.page_size]
                columns["kv_slots"].append(page * self.page_size + position % self.page_size)
            columns["seq_slots"].append(slot)
            columns["q_lens"].append(n)
            columns["context_lens"].append(end)
            columns["sample_rows"].append(len(columns["input_ids"]) - 1)
            columns["sample_slots"].append(slot)
            columns["sample_positions"].append(end)
            sequence.num_computed = end
        return make_step(num_decode=num_decode, **columns)

    @torch.inference_mode()
    def run(self, chunks: list[tuple[int, int]], use_last_token: bool = False) -> torch.Tensor:
        """Logits [len(chunks), vocab] of the last token of each chunk."""
        step = on_device(self.step(chunks, use_last_token), self.device)
        self.backend.apply_updates(step, self.state)
        hidden = self.model.forward(step, self.state, self.kv, step.sample_rows)
        return self.model.logits(hidden)


def load_rounded(path: Path) -> Qwen3:
    """A model in float32, its weights rounded to bfloat16 first, as those of SmolLM2's goldens."""
    config = ModelConfig.load(path)
    weights = load_weights(path, config, torch.bfloat16, torch.device("cpu"))
    weights.embed_tokens = weights.lm_head = weights.embed_tokens.float()
    weights.norm = weights.norm.float()
    for layer in weights.layers:
        for one in fields(LayerWeights):
            tensor = getattr(layer, one.name)
            setattr(layer, one.name, None if tensor is None else tensor.float())
    return Qwen3(config, weights, ReferenceBackend())
