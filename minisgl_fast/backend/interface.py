"""What the model and the runner ask of a backend: every operation of a step.

Shapes: N = num_tokens, H = num_heads, K = num_kv_heads, D = head_dim of a step and a model.
Rounding follows transformers: a norm is computed in float32, rounded to the activation's dtype and
then multiplied by its weight; cos and sin are rounded to that dtype; softmax is float32.
Rows that pad a CUDA graph (context_len 0, kv_slot -1) write nothing and yield finite garbage.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from minisgl_fast.backend.step import DeviceState, StepTensors
from minisgl_fast.progress import Progress


@dataclass(frozen=True, slots=True)
class ModelShape:
    """What a backend must know of the model and of the engine's sizes."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    hidden_size: int
    vocab_size: int
    qk_norm: bool
    page_size: int
    max_seqs: int


# RMSNorm before a product: its weight [in], and eps.
Norm = tuple[Tensor, float]


@dataclass(frozen=True, slots=True)
class Matrix:
    """A product y = norm(x) W^T + b as its backend keeps it (``Backend.make_matrix``)."""

    weight: Tensor  # [out, in], unless reordered
    bias: Tensor | None = None  # [out]
    norm: Norm | None = None  # of x; None: there is none
    reordered: bool = False  # the weight is in an order of the backend's own
    unit_norm: bool = False  # the norm's weight is 1 everywhere


# How many rows ``Backend.logits`` takes even if no step may have so many samples.
MIN_LOGIT_ROWS = 64


class KVCache(Protocol):
    """Keys and values of all layers; what a layer's tensor looks like is the backend's business."""

    def layer(self, index: int) -> Tensor: ...


class Backend(Protocol):
    """One device and its way to compute."""

    def pick_dtype(self, requested: str, checkpoint: str) -> torch.dtype:
        """Activation and weight type for ``--dtype`` (auto or a name) and a checkpoint's dtype."""

    def prepare(self, shape: ModelShape, progress: Progress) -> None:
        """Compile, load and allocate what such a model needs; before everything else.

        ConfigError where the backend has no kernel for the shape.
        """

    def allocate_kv(
        self,
        num_layers: int,
        num_pages: int,
        num_kv_heads: int,
        page_size: int,
        head_dim: int,
        dtype: torch.dtype,
    ) -> KVCache:
        """A zeroed cache: masked positions are multiplied by 0, which needs finite values."""

    def apply_updates(self, step: StepTensors, state: DeviceState) -> None:
        """page_table[slot, column] = page for every update of the step."""

    def embed(self, step: StepTensors, state: DeviceState, weight: Tensor) -> Tensor:
        """[N, hidden]; input id -1 means ``state.last_token`` of the row's slot."""

    def make_matrix(
        self,
        weight: Tensor,
        bias: Tensor | None = None,
        norm: Norm | None = None,
        *,
        may_fold: bool = False,
    ) -> Matrix:
        """A weight [out, in] as the products below want it.

        ``may_fold``: for ``qkv`` and ``linear_silu_mul`` alone. The backend may multiply the
        norm's weight into ``weight``, and leave the rest of the norm to those two.
        """

    def linear_add(self, x: Tensor, matrix: Matrix, residual: Tensor) -> Tensor:
        """residual [n, out] + the product; may overwrite ``residual``."""

    def linear_silu_mul(self, x: Tensor, matrix: Matrix) -> Tensor:
        """[n, out / 2]: silu(first half) * second half of the product."""

    def logits(self, x: Tensor, matrix: Matrix) -> Tensor:
        """[n, vocab] in the model's dtype, valid until the next call.

        x has as many rows as a step may have samples, or up to MIN_LOGIT_ROWS.
        """

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """The norm of each row of x [n, hidden], by itself."""

    def qkv(
        self,
        x: Tensor,
        matrix: Matrix,
        q_norm: Tensor | None,
        k_norm: Tensor | None,
        eps: float,
        rope_table: Tensor,
        step: StepTensors,
        kv_layer: Tensor,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
    ) -> Any:
        """The heads of the product [N, (H + 2K) * D]: norm, rotate, store K and V; the queries, as
        ``attention`` takes them. A part of this may be left to ``attention``.

        K and V go to ``step.kv_slots`` (-1: nowhere). No request can spoil another's results: what
        is stored is finite whatever the input, or nobody uses what lies beyond his sequence.
        """

    def attention(
        self, q: Any, kv_layer: Tensor, step: StepTensors, state: DeviceState, scale: float
    ) -> Tensor:
        """[N, H * D]: token row t of a sequence attends to its positions 0..positions[t]."""

    def sample(
        self, logits: Tensor, step: StepTensors, state: DeviceState, vocab_limit: int
    ) -> Tensor:
        """int32 [num_samples] by the rules of ``backend/sampling.py``; -1 for a broken row.

        Leaves ``logits`` as they are: log-probabilities are computed from them afterwards
        (``backend/logprobs.py``).

        Also sets ``state.last_token`` of the sampled slots (0 for a broken row) and counts the
        token in ``state.counts`` for rows with penalties.
        """

    def reset_counts(
        self, state: DeviceState, slot: int, tokens: array[int], num_prompt: int
    ) -> None:
        """Set ``state.counts[slot]`` to that of ``tokens``, the first ``num_prompt`` the prompt."""
